"""What a machine's TPM can be asked, with its errors as the service's: status, registers, log, quote."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rayos_vmm.errors import Conflict, GuestGone, Invalid
from rayos_vmm.vm.machine import Machine
from tpm import pcr
from tpm.client import TpmClient
from tpm.errors import TpmError
from tpm.event_log import Log
from tpm.explain import explain
from tpm.protocol import Attestation, Status


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
                f"attestation unavailable: {error}",
                hint=f"rayos tpm status {machine.name} says what became of its TPM",
                code="attestation_unavailable",
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
