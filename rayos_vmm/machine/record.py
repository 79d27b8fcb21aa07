"""The record of a machine, from which another daemon can take it over, or clear up after it."""

from __future__ import annotations

import time

import msgspec

from rayos_devices.levels import DEFAULT
from rayos_vmm.config.spec import VmSpec
from rayos_vmm.host.process import ProcessId
from rayos_vmm.machine.view import ExitReason, VmState, VmView


class Live(msgspec.Struct, kw_only=True):
    """The processes and files outside of the daemon for a machine; recorded as soon as they exist."""

    qemu: ProcessId | None = None
    keeper: ProcessId | None = None
    swtpm: ProcessId | None = None
    readers: list[ProcessId] = []  # of disks that are not raw, in their order
    tap: str | None = None
    ports: int = 0  # console ports that the worker serves
    link_is_up: bool = True  # of the network card


class Record(msgspec.Struct, kw_only=True):
    """A machine's row in the store. `uuid` is the TPM's idea of who it belongs to."""

    spec: VmSpec
    uuid: str
    state: VmState = VmState.DEFINED
    reason: str = ""
    exit_reason: ExitReason | None = None
    created: float = msgspec.field(default_factory=time.time)
    started: float | None = None
    mac: str | None = None
    address: str | None = None
    is_ready: bool = False
    notes: list[str] = []
    guest_exit_code: int | None = None
    boot: dict[str, float] = {}
    limits: dict[str, dict[str, int]] = {}  # by device, what was changed of `spec.quota`; 0 is unbounded
    level: int = DEFAULT  # of optimization
    live: Live = msgspec.field(default_factory=Live)

    @property
    def group(self) -> str:
        """The name of its control group: no other service's machine has it."""
        return f"{self.spec.name}-{self.uuid}"

    def view(self) -> VmView:
        """Returns the machine as callers see it."""
        return VmView(
            spec=self.spec,
            state=self.state,
            reason=self.reason,
            exit_reason=self.exit_reason,
            pid=self.live.qemu.pid if self.live.qemu else None,
            address=self.address,
            mac=self.mac,
            boot=dict(self.boot),
            is_ready=self.is_ready,
            notes=list(self.notes),
            guest_exit_code=self.guest_exit_code,
            created=self.created,
            started=self.started,
        )
