"""The devices that a worker serves, as JSON from the service to the keeper. Descriptors are the reader's numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

import msgspec


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


class Device(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One device. `name` is unique in the VM; the socket for QEMU is `<name>.sock` in the VM's run directory."""

    kind: Literal["blk", "net", "gpu", "input", "console"]
    name: str
    #: Packed rings are on offer beside split ones.
    packed: bool = False
    #: blk: the image.
    fd: int = -1
    #: net: the tap's queues, one for each pair of the device's.
    queue_fds: tuple[int, ...] = ()
    #: blk
    read_only: bool = False
    serial: str = ""
    #: blk: request queues.
    queues: int = 1
    #: blk: the disk's size where that is more than the image's, the logical block that its driver is told, and
    #: whether flushes stay in the page cache.
    size_bytes: int = 0
    block_bytes: int = 512
    is_unsafe: bool = False
    #: Who connects: a vhost-user frontend, to the keeper; or QEMU's block layer by NBD (blk) or its `-netdev stream`
    #: (net), to a socket on which the worker itself accepts.
    front: Literal["vhost-user", "nbd", "stream"] = "vhost-user"
    #: net behind a stream
    mtu: int = 1500
    #: blk: storage; gpu: memory of all resources. Bytes.
    quota_bytes: int | None = None
    #: net, each direction; blk, together.
    rate_bytes_per_second: float | None = None
    #: blk
    operations_per_second: float | None = None
    #: net; None: every frame passes.
    firewall: Firewall | None = None
    #: input
    input_kind: Literal["keyboard", "mouse", "tablet", "touch"] = "keyboard"
    queue_limit: int = 64
    #: gpu, pixels; modes beside them
    width: int = 1280
    height: int = 800
    modes: tuple[tuple[int, int], ...] = ()
    scanouts: int = 1
    #: console: names of the ports; port 0 is the console.
    ports: tuple[str, ...] = ("",)
    #: console, where QEMU has no vhost-user console: one `<name>.<port>.sock` a port for its chardevs.
    chardev: bool = False

    @property
    def own_sockets(self) -> tuple[str, ...]:
        """The file names of sockets on which the worker accepts, and not the keeper; none: it is the keeper."""
        if self.chardev:
            return tuple(f"{self.name}.{port}.sock" for port in range(len(self.ports)))
        return () if self.front == "vhost-user" else (device_socket(self.name),)

    @property
    def queue_count(self) -> int:
        """Virtqueues, which the keeper must know before there is a backend."""
        match self.kind:
            case "blk":
                return self.queues
            case "console":
                return 2 + 2 * len(self.ports)  # VIRTIO 1.3, 5.3.2
            case "net":
                return 2 * len(self.queue_fds)
            case _:
                return 2

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
        return msgspec.structs.replace(
            self, fd=numbers.get(self.fd, -1), queue_fds=queue_fds, firewall=firewall
        )


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
