"""Measured boot by the service: the guest's registers, the log's events, and what happens when the TPM dies."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import msgspec
import pytest
import trio

from rayos_tpm import appraisal, event_log, signature
from rayos_tpm.client import TpmClient
from rayos_tpm.measurement import Measurement
from rayos_tpm.phase import Phase
from rayos_tpm.policy import Policy
from rayos_tpm.protocol import TpmState
from rayos_vmm.config.spec import Gpu, Net, Secret, Tpm, VmSpec
from rayos_vmm.errors import GuestGone, RayosError
from rayos_vmm.events import Event
from rayos_vmm.hardware.keeper import WorkerHardware
from rayos_vmm.service.service import Service
from tests.integration.service_lab import home, lab, running, traces

pytestmark = [pytest.mark.guest, pytest.mark.root]

SPEC = VmSpec(name="a", append="tpm.test=1", net=Net(enabled=False), gpu=Gpu(enabled=False))
READ_PCRS = 'for i in $(seq 0 15); do read v </sys/class/tpm/tpm0/pcr-sha256/$i; echo "$i $v"; done'


async def guest_pcrs(service: Service) -> dict[int, bytes]:
    """The registers as the guest's kernel shows them."""
    result = await service.guests.exec("a", READ_PCRS, 30)
    lines = result.stdout.decode().splitlines()
    return {int(index): bytes.fromhex(value) for index, value in map(str.split, lines)}


async def _until(events: AsyncIterator[Event], type_: str) -> AsyncIterator[Event]:
    """The TPM's events before the first of another type."""
    async for event in events:
        if event.type == type_:
            return
        if event.type == "vm.tpm":
            yield event


async def test_a_guest_is_measured_boot_after_boot() -> None:
    """Its registers are the replay of our log, over a reset and a restart; all six phases are named."""
    async with home() as paths, lab(paths, hardware=WorkerHardware()) as service:
        before = traces(paths)
        await running(service, SPEC)
        client = TpmClient(paths.vm_runtime("a"))
        seen = []
        for round_ in range(3):
            if round_ == 1:
                await service.machines.reset("a")
                await service.machines.wait("a", "ready", 60)
            elif round_ == 2:
                await service.machines.stop("a", 20)
                await service.machines.start("a")
                await service.machines.wait("a", "ready", 60)
            seen.append(await guest_pcrs(service))
            taken = await client.attest(b"nonce")
            replayed = event_log.replay(taken.log.entries)
            assert seen[-1] == {index: replayed[index] for index in range(16)} == taken.bundle.values
        assert seen[0] == seen[1] == seen[2]
        named = {entry.phase: entry.description for entry in taken.log.entries if entry.phase}
        assert set(named) == set(Phase)
        assert named["kernel"] == "kernel vmlinux" and "tpm.test=1" in named["configuration"]
        async with aclosing(service.events(0)) as events:
            states = [event.data["state"] async for event in _until(events, "vm.ready")]
        assert "measured" in states and "failed" not in states
        await service.machines.stop("a", 20)
        assert traces(paths) == before


async def test_a_dead_tpm_is_told_and_the_guest_goes_on() -> None:
    """swtpm killed: an event with the reason, no attestation, and the guest still answers."""
    async with home() as paths, lab(paths, hardware=WorkerHardware()) as service:
        await running(service, SPEC)
        client = TpmClient(paths.vm_runtime("a"))
        os.kill((await client.status()).swtpm_pid, signal.SIGKILL)
        with trio.fail_after(10):
            async with aclosing(service.events(0)) as events:
                async for event in events:
                    if event.type == "vm.tpm" and event.data["state"] == "failed":
                        assert "ended with signal 9" in event.data["reason"]
                        break
        assert (await client.status()).state is TpmState.FAILED
        assert (await service.guests.exec("a", "echo alive", 30)).stdout == b"alive\n"


async def test_a_verifier_with_the_files_accepts_the_launch() -> None:
    """Quote and log of a running machine hold against the policy of its events."""
    async with home() as paths, lab(paths, hardware=WorkerHardware()) as service:
        await running(service, SPEC)
        taken = await TpmClient(paths.vm_runtime("a")).attest(b"nonce")
        events = [entry for entry in taken.log.entries if entry.phase]
        policy = Policy.from_measurements(
            [Measurement(Phase(entry.phase), entry.description, entry.digest) for entry in events]
        )
        findings = appraisal.appraise(
            taken.log, policy, taken.bundle.message, taken.bundle.signature,
            signature.public_key(taken.bundle.ak_public), nonce=b"nonce", values=taken.bundle.values,
        )  # fmt: skip
        assert findings == []


async def test_a_machine_with_a_policy_runs_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    """The policy of one launch accepts the next, and stops another command line before its first instruction. It
    works with TIS and the host's own register; the secret is there until the host extends its register.
    """
    (tmp_path / "secret").write_bytes(b"for this launch alone")
    secret = Secret(path=str(tmp_path / "secret"), pcrs="17")
    options = Tpm(model="tis", profile="host-reserved", secret=secret, quote_interval="100ms")
    spec = msgspec.structs.replace(SPEC, tpm=options)
    async with home() as paths, lab(paths, hardware=WorkerHardware()) as service:
        before = traces(paths)
        await running(service, spec)
        tpm = service.guests.tpm("a")
        assert (await service.guests.exec("a", "cat /sys/class/tpm/tpm0/device/modalias", 30)).stdout
        assert (await tpm.pcrs("0")) == {0: bytes(32)}
        assert await tpm.unseal() == b"for this launch alone"
        with trio.fail_after(30):
            while not (status := await tpm.status()).last_quote_at:  # noqa: ASYNC110 (a quote is no event)
                await trio.sleep(0.1)
        assert (status.profile, status.quote_error) == ("host-reserved", "")
        (tmp_path / "policy.json").write_bytes((await tpm.policy()).to_json())
        await tpm.extend("the test", b"t" * 32)
        with pytest.raises(GuestGone, match="the secret stays sealed"):
            await tpm.unseal()
        await service.machines.stop("a", 20)
        await service.machines.remove("a")

        bound = msgspec.structs.replace(options, policy=str(tmp_path / "policy.json"), profile=None)
        await service.machines.define(msgspec.structs.replace(spec, tpm=bound, append="tpm.test=2"))
        with pytest.raises(RayosError, match=r"tpm\.test=2.*the guest is not started"):
            await service.machines.start("a")
        await service.machines.remove("a")
        await service.machines.define(msgspec.structs.replace(spec, tpm=bound))
        await service.machines.start("a")
        await service.machines.wait("a", "ready", 60)
        assert await service.guests.tpm("a").unseal() == b"for this launch alone"
        await service.machines.stop("a", 20)
        await service.machines.remove("a")
        wrong = msgspec.structs.replace(bound, profile="seed")
        await service.machines.define(msgspec.structs.replace(spec, tpm=wrong))
        with pytest.raises(RayosError, match="was made for 'host-reserved'"):
            await service.machines.start("a")
        await service.machines.remove("a")
        assert traces(paths) == before
