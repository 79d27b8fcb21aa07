"""The devices that a worker serves, as JSON from the service to the keeper. Descriptors are the reader's numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import msgspec

from rayos_devices.kind import DeviceOptions


class Firewall(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings that judge a network card's frames; see `rayos_vmm.worker.firewall`."""

    #: The guest's hardware address.
    mac: str
    #: Our DHCP server, "" for none.
    server: str = ""
    is_guarded: bool = True
    #: Addresses that need no lease.
    addresses: tuple[str, ...] = ()
    #: The page of leased addresses, open for reading; -1: none is ever leased.
    page_fd: int = -1
    #: As `rayos_vmm.worker.firewall.Settings`; a later one that the worker was told wins.
    revision: int = 0
    rules: list[dict[str, Any]] = []


@dataclass(frozen=True, slots=True, kw_only=True)
class Device(DeviceOptions):
    """One device: `kind` is one of `rayos_devices.kinds`; QEMU's socket is `<name>.sock` in the VM's run directory."""

    kind: str
    #: Packed rings are on offer beside split ones.
    packed: bool = False
    #: net; None: every frame passes.
    firewall: Firewall | None = None

    @property
    def own_sockets(self) -> tuple[str, ...]:
        """The file names of sockets on which the worker accepts, and not the keeper; none: it is the keeper."""
        if self.chardev:
            return tuple(f"{self.name}.{port}.sock" for port in range(len(self.ports)))
        return () if self.front == "vhost-user" else (device_socket(self.name),)

    @property
    def fds(self) -> list[int]:
        """All descriptors that the device needs."""
        page = self.firewall.page_fd if self.firewall else -1
        return [fd for fd in (self.fd, *self.queue_fds, page) if fd >= 0]

    def with_fds(self, numbers: Mapping[int, int]) -> Self:
        """The same device in a process where its descriptors have other numbers."""
        queue_fds = tuple(numbers[fd] for fd in self.queue_fds)
        firewall = self.firewall
        if firewall is not None:
            firewall = msgspec.structs.replace(firewall, page_fd=numbers.get(firewall.page_fd, -1))
        return replace(self, fd=numbers.get(self.fd, -1), queue_fds=queue_fds, firewall=firewall)


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything a keeper needs to know. `run_dir` exists and is private to the VM."""

    vm: str
    run_dir: str
    devices: tuple[Device, ...]
    #: The workers' user, 0 where they stay who they are; the guest's memory, 0 unknown.
    uid: int = 0
    memory_bytes: int = 0
    #: The gate page, open for reading; -1: everything may happen.
    gate_fd: int = -1
    #: The file of accounts, open for reading and writing; -1: nobody reads them.
    accounts_fd: int = -1
    #: See `rayos_vmm.worker.sandbox.Mode`.
    sandbox: Literal["on", "trap", "off"] = "on"

    @property
    def fds(self) -> list[int]:
        """All descriptors that it names."""
        own = [fd for fd in (self.gate_fd, self.accounts_fd) if fd >= 0]
        return [*(fd for device in self.devices for fd in device.fds), *own]

    def with_fds(self, numbers: Mapping[int, int]) -> Self:
        """The same in a process where the descriptors have other numbers."""
        return msgspec.structs.replace(
            self,
            devices=tuple(device.with_fds(numbers) for device in self.devices),
            gate_fd=numbers.get(self.gate_fd, -1),
            accounts_fd=numbers.get(self.accounts_fd, -1),
        )


CONTROL_SOCKET = "worker.sock"
KEEPER_SOCKET = "keeper.sock"


def device_socket(name: str) -> str:
    """The file name of the vhost-user socket of a device."""
    return f"{name}.sock"
