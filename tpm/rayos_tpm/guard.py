"""The TPM of one VM as the proxy holds it: swtpm, its turn, the journal, and what became of the launch.

Invariants: the journal's registers are the TPM's; a launch that is not measured completely is FAILED and
stays so, and every answer to QEMU is then a failure, so QEMU ends before its first instruction.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import time
from pathlib import Path
from typing import Final

import msgspec
import trio

from rayos_tpm import control, host, pcr
from rayos_tpm.control import ControlRequest
from rayos_tpm.emulator import Emulator
from rayos_tpm.errors import CommandFailed, MalformedMessage, TpmError, Unavailable
from rayos_tpm.event_log import Log, Source, replay
from rayos_tpm.journal import Journal
from rayos_tpm.measurement import Measurement
from rayos_tpm.phase import Phase, profile_named
from rayos_tpm.process import Process
from rayos_tpm.protocol import Attestation, Config, Status, TpmState
from rayos_tpm.state import Record

JOURNAL: Final = "journal.json"  # beside the state, written when QEMU saves the TPM for a migration


class StatusFile:
    """The last word of a TPM process, for whoever comes when it is gone.

    The process holds a descriptor and no directory: it may be confined to a root without one. Each word is one write,
    padded over the longer one before it.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._size = 0

    def write(self, data: bytes) -> None:
        """Replace what it says; a full disk must not end the TPM."""
        with contextlib.suppress(OSError):
            self._size = os.pwrite(self._fd, data.ljust(self._size), 0)


class Guard:
    """One VM's TPM.

    turn: held by whoever talks to the TPM: a guest command, or a whole conversation of the host.
    """

    def __init__(
        self,
        config: Config,
        emulator: Emulator,
        process: Process,
        record: Record,
        key: bytes,
        status_file: StatusFile,
    ) -> None:
        self.config = config
        self.emulator = emulator
        self.process = process
        self.record = record
        self.nv_auth = nv_auth(key)
        self.profile = profile_named(config.profile)
        self.journal = Journal(self.profile)
        self.turn = trio.Lock()
        self.state = TpmState.STARTING
        self.reason = ""
        self.inits = 0
        self.locality = 0
        self.baseline: Attestation | None = None
        self.baseline_at = self.last_quote_at = 0.0
        self.quote_error = ""
        self._changed = trio.Event()
        self._status_file = status_file

    def enter(self, state: TpmState, reason: str = "") -> None:
        """Change the state, tell who watches, and leave it in the status file for whoever comes later.

        FAILED is left by nothing but ENDED, which keeps the reason.
        """
        if self.state is TpmState.FAILED and state is not TpmState.ENDED:
            return
        self.state = state
        self.reason = reason or (self.reason if state is TpmState.ENDED else "")
        self._changed.set()
        self._changed = trio.Event()
        self._status_file.write(msgspec.json.encode(self.status()))

    async def wait_change(self, seen: TpmState) -> None:
        """Return when the state differs from the one seen."""
        while self.state is seen:
            await self._changed.wait()

    def check_usable(self) -> None:
        """Unavailable, with the reason, unless the TPM is measured or restored."""
        if self.state not in (TpmState.MEASURED, TpmState.RESTORED):
            raise Unavailable(
                f"attestation unavailable: the TPM is {self.state}{self.reason and ': '}{self.reason}"
            )

    async def launch(self) -> None:
        """Launches behind a TPM_Init that restored nothing: measure, repair, baseline quote.

        TpmError: the VM must not run; the caller answers QEMU with failure.
        """
        self.journal = Journal(self.profile)
        self.inits += 1
        self.locality = 0
        measurements = self._allowed_measurements()
        await host.measure(self.emulator, self.journal, measurements)
        await host.check_identity(self.emulator, self.record)
        if self.record.ek_certificate:
            await host.store_certificate(self.emulator, self.record.ek_certificate)
        if self.config.nv_policy is not None:
            await host.write_policy(self.emulator, self.config.nv_policy, self.nv_auth)
        values = self.journal.bank.values
        if self.config.sealed is not None:
            chosen = {index: values[index] for index in self.config.sealed.pcrs}
            await host.seal_secret(self.emulator, self.config.sealed.secret, chosen)
        if self.config.locks_platform:
            await host.lock_platform(self.emulator)
        bundle = await host.take_quote(
            self.emulator, self.record, os.urandom(pcr.DIGEST_SIZE), self.profile.exposed, values=values
        )
        self.baseline = Attestation(bundle, self.log())
        self.baseline_at = time.time()
        self.enter(TpmState.MEASURED)

    def _allowed_measurements(self) -> list[Measurement]:
        chosen = []
        for item in self.config.measurements:
            allowed = self.config.allowed.get(item.phase)
            if allowed is not None and item.digest not in allowed:
                expected = " or ".join(digest.hex() for digest in allowed) or "nothing"
                raise TpmError(
                    f"{item.description} ({item.phase}) has SHA-256 {item.digest.hex()}, allowed is {expected}; "
                    "the guest is not started"
                )
            chosen.append(Measurement(Phase(item.phase), item.description, item.digest))
        return chosen

    async def resume(self) -> None:
        """Resumes behind a TPM_Init with restored state: injects nothing, finds the log that fits.

        Without a fitting log the registers are still quoted, and the reason says that they cannot be explained.
        TpmError: the TPM that was restored is not running, or is another VM's.
        """
        self.inits += 1
        self.baseline = None
        values = await host.read_pcrs(self.emulator, range(pcr.PCR_COUNT))
        with contextlib.suppress(CommandFailed):  # the guest took the key away: quotes will say so
            await host.check_identity(self.emulator, self.record)
        journal = Journal(self.profile)
        with contextlib.suppress(OSError, MalformedMessage, ValueError):
            log = Log.from_json(self._journal_path().read_bytes())
            journal.adopt(log.entries, log.missing)
        if journal.bank.values == values:
            self.journal = journal
            self.enter(TpmState.RESTORED)
        else:
            self.journal = Journal(self.profile, bank=pcr.Bank(values), missing=1)
            self.enter(
                TpmState.RESTORED, "no event log fits the restored registers; the next reset measures again"
            )

    def save_journal(self) -> None:
        """Keep the journal for the TPM that this state will be restored into."""
        path = self._journal_path()
        temporary = path.with_suffix(".new")
        temporary.write_bytes(self.log().to_json())
        temporary.rename(path)

    def _journal_path(self) -> Path:
        return Path(self.config.state_dir) / JOURNAL

    def log(self) -> Log:
        """The journal in a form to keep."""
        return Log(self.config.vm_uuid, self.profile.name, list(self.journal.entries), self.journal.missing)

    async def attest(self, nonce: bytes, chosen: list[int] | None) -> Attestation:
        """A quote over the chosen registers, by default the profile's, and the log of the same moment.

        Unavailable: not measured, failed, or the guest damaged the TPM.
        """
        self.check_usable()
        indices = self.indices(chosen)
        async with self.turn:
            bundle = await host.take_quote(self.emulator, self.record, nonce, indices)
            log = self.log()
        self.last_quote_at = time.time()
        return Attestation(bundle, log)

    def indices(self, chosen: list[int] | None) -> tuple[int, ...]:
        """Registers that a request names, checked; the profile's when it names none."""
        if chosen is None:
            return self.profile.exposed
        if not chosen:
            raise ValueError("no PCR was named; name some, such as 0,4,8-11")
        return tuple(sorted({pcr.check_index(index) for index in chosen}))

    async def quote_periodically(self) -> None:
        """Quote every quote_interval_s and note whether it worked. Never returns."""
        while True:
            await trio.sleep(self.config.quote_interval_s)
            if self.state not in (TpmState.MEASURED, TpmState.RESTORED):
                continue
            try:
                taken = await self.attest(os.urandom(pcr.DIGEST_SIZE), None)
                self.quote_error = "" if taken.log.missing else self._unexplained(taken)
            except TpmError as error:
                self.quote_error = str(error)

    @staticmethod
    def _unexplained(taken: Attestation) -> str:
        """Which registers the log does not lead to, as a sentence, else ""."""
        replayed = replay(taken.log.entries)
        changed = [str(index) for index, value in taken.bundle.values.items() if value != replayed[index]]
        return f"PCR {', '.join(changed)} differ from the event log" if changed else ""

    async def watch_swtpm(self) -> None:
        """Notice the death of swtpm. Returns then, the state is FAILED unless it had ENDED."""
        ended = await self.process.wait()
        if self.state is not TpmState.ENDED:
            self.enter(TpmState.FAILED, f"swtpm (process {self.process.pid}) ended with {ended}")

    async def stop_swtpm(self) -> None:
        """Let swtpm store its state and end; kill it when it does not."""
        self.enter(TpmState.ENDED)
        with trio.move_on_after(2):
            with contextlib.suppress(TpmError):
                await self.emulator.ask(ControlRequest(control.Control.SHUTDOWN))
        self.emulator.close()
        await self.process.stop()

    def status(self) -> Status:
        """The TPM at a glance."""
        entries = self.journal.entries
        host_events = sum(entry.source is Source.HOST for entry in entries)
        return Status(
            vm_uuid=self.config.vm_uuid,
            state=self.state,
            reason=self.reason,
            profile=self.profile.name,
            inits=self.inits,
            phase=self.journal.phase,
            host_events=host_events,
            guest_events=len(entries) - host_events,
            missing=self.journal.missing,
            swtpm_pid=self.process.pid,
            baseline_at=self.baseline_at,
            last_quote_at=self.last_quote_at,
            quote_error=self.quote_error,
        )


STATUS: Final = "tpm-status.json"


def nv_auth(key: bytes) -> bytes:
    """The authorization of the policy index, from the state key: the guest cannot know it."""
    return hmac.digest(key, b"RayOS VMM policy index", "sha256")
