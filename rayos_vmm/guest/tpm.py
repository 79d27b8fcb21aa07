"""A machine's TPM, with its errors as the service's: registers, log, quote, storage, secret."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rayos_tpm import pcr
from rayos_tpm.client import TpmClient
from rayos_tpm.errors import TpmError, Unavailable
from rayos_tpm.event_log import Log
from rayos_tpm.explain import explain
from rayos_tpm.policy import Policy
from rayos_tpm.protocol import Attestation, DeviceInfo, Status
from rayos_vmm.errors import Conflict, GuestGone, Invalid
from rayos_vmm.machine.machine import Machine


def parse_pcrs(text: str | None) -> list[int] | None:
    """Registers from text such as `0,4,8-11`; None stands for the profile's.

    Raises:
        Invalid: a part is not a register or a range.
    """
    if text is None:
        return None
    try:
        return list(pcr.parse_list(text))
    except ValueError as error:
        raise Invalid(f"pcrs: {error}", hint="such as 0,4,8-11") from None


class MachineTpm:
    """One machine's TPM. Every method raises Conflict when it has none now, GuestGone when it cannot attest."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    @contextmanager
    def _asked(self) -> Iterator[TpmClient]:
        machine = self._machine
        if not machine.record.spec.tpm:
            raise Conflict(
                f"{machine.name} has no TPM", hint="it was defined with tpm = false", code="no_tpm"
            )
        if not machine.is_live:
            raise Conflict(
                f"{machine.name} is {machine.state.value}; its TPM runs while it does",
                hint=f"rayos start {machine.name}",
            )
        try:
            yield TpmClient(machine.runtime)
        except TpmError as error:
            raise GuestGone(
                f"{machine.name}: {error}",
                hint=f"rayos tpm status {machine.name} says what became of its TPM",
                code="attestation_unavailable" if isinstance(error, Unavailable) else "tpm_failed",
            ) from None

    async def status(self) -> Status:
        """The TPM at a glance; of one that died the last word it left."""
        with self._asked() as client:
            return await client.status()

    async def pcrs(self, chosen: str | None) -> dict[int, bytes]:
        """The registers as they are now.

        Raises:
            Invalid: `chosen` is no list of registers.
        """
        with self._asked() as client:
            return await client.pcrs(parse_pcrs(chosen))

    async def log(self) -> Log:
        """Everything that changed the registers since the last reset."""
        with self._asked() as client:
            return await client.log()

    async def explain(self, chosen: str | None) -> list[str]:
        """A line for each change of a register and who caused it, then the values that it leads to.

        Raises:
            Invalid: `chosen` is no list of registers.
        """
        return explain(await self.log(), pcrs=parse_pcrs(chosen))

    async def attest(self, nonce: bytes, chosen: str | None) -> Attestation:
        """A quote over registers with up to 64 bytes of nonce, and the log of the same moment.

        Raises:
            Invalid: `chosen` is no list of registers.
        """
        with self._asked() as client:
            return await client.attest(nonce, parse_pcrs(chosen))

    async def extend(self, description: str, digest: bytes) -> int:
        """Extend the launch phase's register by one more event of the host's; returns the register."""
        with self._asked() as client:
            return await client.extend(description, digest)

    async def read_nv(self) -> bytes:
        """The policy storage: 256 bytes that the guest can read, not change or delete."""
        with self._asked() as client:
            return await client.read_policy()

    async def write_nv(self, data: bytes) -> None:
        """Write the policy storage: up to 256 bytes, filled with zeroes."""
        with self._asked() as client:
            await client.write_policy(data)

    async def unseal(self) -> bytes:
        """The secret of the machine's specification.

        Raises:
            Conflict: it names none.
            GuestGone: the registers are not what they were when the guest started.
        """
        secret = self._machine.record.spec.tpm_options.secret
        if secret is None:
            raise Conflict(
                f"{self._machine.name} has no secret",
                hint=f"name one in [vm.{self._machine.name}.tpm.secret]",
            )
        with self._asked() as client:
            return await client.unseal(parse_pcrs(secret.pcrs) or [])

    async def device(self) -> DeviceInfo:
        """Returns the TPM's description of itself: vendor, firmware, limits."""
        with self._asked() as client:
            return await client.device()

    async def policy(self) -> Policy:
        """The policy that accepts exactly what was launched; events after the launch are not part of it."""
        with self._asked() as client:
            return Policy.from_log((await client.baseline()).log)
