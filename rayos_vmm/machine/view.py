"""A virtual machine and its events, as callers see them."""

from __future__ import annotations

import enum

import msgspec

from rayos_vmm.config.spec import VmSpec


class VmState(enum.StrEnum):
    """Where a machine is in its life; `lifecycle.py` has the transitions."""

    DEFINED = "defined"
    STARTING = "starting"
    ADOPTING = "adopting"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


class ExitReason(enum.StrEnum):
    """Why a machine does not run any more; a closed list."""

    POWERED_OFF = "powered_off"  # the guest turned itself off
    STOPPED = "stopped"  # we asked it to power down and it did, or QEMU was told to quit
    KILLED = "killed"  # kill(), or stop() after its time limit
    PANIC = "panic"  # the guest kernel said so
    TRIPLE_FAULT = "triple_fault"  # the processor reset before the guest was ready
    RESET_LOOP = "reset_loop"  # it reset itself again and again
    HANG = "hang"  # no progress for as long as its watchdog allows
    TIMED_OUT = "timed_out"  # it ran for as long as its watchdog allows
    DEBUG_EXIT = "debug_exit"  # the guest wrote to its debug exit port
    RESET = "reset"  # it reset itself, and on_reset says that this is the end
    PASSED = "passed"  # a console printed what its verdict passes on
    FAILED = "failed"  # a console printed what its verdict fails on
    QEMU_CRASHED = "qemu_crashed"  # QEMU died of a signal or an error of its own
    DEVICES_LOST = "devices_lost"  # a process died that its devices cannot do without
    START_FAILED = "start_failed"  # it never ran
    LOST = "lost"  # it ended while no daemon was there to see how


class VmView(msgspec.Struct, frozen=True, kw_only=True):
    """A machine as it is now.

    `boot` holds milliseconds since the start was asked for: `devices_ms`, `qemu_ms`, `running_ms`,
    `ready_ms`; and `guest_ms`, what the guest's own kernel says that it needed. `reason` is a sentence,
    `exit_reason` a word. `notes` are sentences on what was asked for beyond what the host has; `guest_exit_code` is
    QEMU's exit status, (V << 1) | 1, after the guest wrote V to its debug exit port.
    """

    spec: VmSpec
    state: VmState
    reason: str = ""
    exit_reason: ExitReason | None = None
    pid: int | None = None
    address: str | None = None
    mac: str | None = None
    boot: dict[str, float] = {}
    is_ready: bool = False
    notes: list[str] = []
    guest_exit_code: int | None = None
    created: float = 0.0
    started: float | None = None


class DiskView(msgspec.Struct, frozen=True, kw_only=True):
    """A disk: `allocated_bytes` is what its image takes of the host's storage, which `quota_bytes` bounds.

    `size_bytes` is its file's, which is the disk's where `format` is raw.
    """

    index: int
    path: str
    size_bytes: int
    allocated_bytes: int
    quota_bytes: int
    is_read_only: bool
    format: str
    queues: int
    bus: str = "virtio"


class NetView(msgspec.Struct, frozen=True, kw_only=True):
    """A network card: its cable, its limits, and what the driver asked of it over the control queue.

    `promiscuous`, or the addresses in `unicast` and `multicast`; `vlan` is "all" or "normal" (those in `vlans`). The
    bridge delivers by what it has learnt, whatever was asked; the guest ignores the rest. A card that is not virtio's
    does not tell what its driver asked for.
    """

    is_up: bool
    mac: str
    mtu: int
    queues: int
    promiscuous: bool
    unicast: list[str]
    multicast: list[str]
    vlan: str
    vlans: list[int]
    model: str = "virtio"


class ExecResult(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a command in the guest; the streams are bytes (base64 in JSON)."""

    exit_status: int
    stdout: bytes
    stderr: bytes


class Damage(msgspec.Struct, frozen=True, kw_only=True):
    """The part of a monitor's picture that changed, in pixels; `serial` is the one to ask with next."""

    serial: int
    scanout: int
    x: int
    y: int
    width: int
    height: int
