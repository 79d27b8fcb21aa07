"""The service's side of a VM's TPM process. It holds no connection, so a new service needs only the path."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TypeVar

import msgspec
import trio

from rayos_tpm import errors, protocol
from rayos_tpm.errors import TpmError, Unavailable
from rayos_tpm.event_log import Log
from rayos_tpm.guard import STATUS
from rayos_tpm.protocol import Answer, Attestation, DeviceInfo, Identity, QuoteBundle, Status, TpmState

T = TypeVar("T")
_ANSWER_LIMIT_S = 150.0  # a guest's RSA key generation may hold the TPM's turn


class TpmClient:
    """Asks one VM's TPM process. Every method raises Unavailable when that process is gone.

    run_dir: the directory in which the process has its sockets.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._path = run_dir / "tpm-control.sock"

    async def _ask(self, request: protocol.Request, kind: type[T], *, limit_s: float = _ANSWER_LIMIT_S) -> T:
        buffer = bytearray()
        try:
            with trio.fail_after(limit_s):
                async with await trio.open_unix_socket(self._path) as stream:
                    await stream.send_all(msgspec.json.encode(request) + b"\n")
                    async for chunk in stream:
                        buffer += chunk
                        if chunk.endswith(b"\n"):
                            break
        except trio.TooSlowError:
            raise Unavailable(
                f"the TPM process at {self._path} did not answer within {limit_s:g} s"
            ) from None
        except OSError as error:
            raise Unavailable(f"the TPM process is gone ({self._path}: {error.strerror})") from None
        except trio.BrokenResourceError:
            raise Unavailable("the TPM process ended instead of answering") from None
        if not buffer.endswith(b"\n"):
            raise Unavailable("the TPM process ended instead of answering")
        answer = msgspec.json.decode(buffer, type=Answer)
        if answer.error is not None:
            found = getattr(errors, answer.error.kind, TpmError)
            is_plain = (
                isinstance(found, type) and issubclass(found, TpmError) and found is not errors.CommandFailed
            )
            raise (found if is_plain else TpmError)(answer.error.text)
        return msgspec.json.decode(answer.ok, type=kind)

    async def ready(self) -> Identity:
        """Wait until QEMU may connect. TpmError: why the VM must not start."""
        return await self._ask(protocol.Ready(), Identity)

    async def status(self) -> Status:
        """The TPM at a glance; of a process that is gone the last word it left.

        Unavailable: it is gone and left none.
        """
        try:
            return await self._ask(protocol.GetStatus(), Status)
        except Unavailable:
            return self.last_status()

    def last_status(self) -> Status:
        """Returns the status that the process wrote at its last change of state."""
        try:
            return msgspec.json.decode((self._run_dir / STATUS).read_bytes(), type=Status)
        except (OSError, msgspec.DecodeError):
            raise Unavailable(f"there is no TPM process and no trace of one in {self._run_dir}") from None

    def note_death(self, reason: str) -> None:
        """Make FAILED, and why, the last word of a process that died without one. Nothing happens when it left none."""
        with contextlib.suppress(Unavailable, OSError):
            last = msgspec.structs.replace(self.last_status(), state=TpmState.FAILED, reason=reason)
            path = self._run_dir / STATUS
            temporary = path.with_suffix(".new")
            temporary.write_bytes(msgspec.json.encode(last))
            temporary.rename(path)

    async def wait_change(self, seen: TpmState) -> Status:
        """The status once the state differs from the one seen; ended when the process is gone."""
        try:
            return await self._ask(protocol.Watch(seen), Status, limit_s=float("inf"))
        except Unavailable:
            status = self.last_status()
            return (
                status
                if status.state is TpmState.FAILED
                else msgspec.structs.replace(status, state=TpmState.ENDED)
            )

    async def quote(self, nonce: bytes, pcrs: list[int] | None = None) -> QuoteBundle:
        """A quote over registers (the profile's by default) with up to 64 bytes of nonce."""
        return await self._ask(protocol.GetQuote(nonce, pcrs), QuoteBundle)

    async def attest(self, nonce: bytes, pcrs: list[int] | None = None) -> Attestation:
        """A quote and the log of the same moment, which explains it."""
        return await self._ask(protocol.Attest(nonce, pcrs), Attestation)

    async def baseline(self) -> Attestation:
        """The quote taken before the guest's first instruction, and its log."""
        return await self._ask(protocol.GetBaseline(), Attestation)

    async def pcrs(self, pcrs: list[int] | None = None) -> dict[int, bytes]:
        """The registers as they are now."""
        values = await self._ask(protocol.GetPcrs(pcrs), dict[str, bytes])
        return {int(index): value for index, value in values.items()}

    async def log(self) -> Log:
        """Everything that changed the registers since the last reset, the guest's extends too."""
        return await self._ask(protocol.GetLog(), Log)

    async def extend(self, description: str, digest: bytes) -> int:
        """Extend the launch phase's register by one more host event; returns the register."""
        return await self._ask(protocol.Extend(description, digest), int)

    async def read_policy(self) -> bytes:
        """The 256 bytes of policy storage."""
        return await self._ask(protocol.ReadPolicy(), bytes)

    async def write_policy(self, policy: bytes) -> None:
        """Write up to 256 bytes of policy storage; the guest can read them, not change or delete them."""
        await self._ask(protocol.WritePolicy(policy), None.__class__)

    async def unseal(self, pcrs: list[int]) -> bytes:
        """The sealed secret. Unavailable: these registers do not have the values it was sealed to."""
        return await self._ask(protocol.Unseal(pcrs), bytes)

    async def activate(self, blob: bytes, secret: bytes) -> bytes:
        """Open a credential made by rayos_tpm.signature.make_credential."""
        return await self._ask(protocol.Activate(blob, secret), bytes)

    async def identity(self) -> Identity:
        """The public keys and the endorsement certificate."""
        return await self._ask(protocol.GetIdentity(), Identity)

    async def device(self) -> DeviceInfo:
        """Vendor, firmware version and capabilities."""
        return await self._ask(protocol.GetDevice(), DeviceInfo)

    async def certify(self, certificate: bytes) -> None:
        """Hand over the endorsement key's certificate; the guest finds it from the next INIT on."""
        await self._ask(protocol.Certify(certificate), None.__class__)

    async def stop(self) -> None:
        """Ask the process to store the TPM's state and end."""
        await self._ask(protocol.Stop(), None.__class__)
