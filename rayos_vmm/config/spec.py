"""The specification of a virtual machine.

The same structs read TOML, JSON bodies of the API and records of the store; every unknown key is an
error. Paths are absolute once the specification reached the service (`rayos` resolves them first).
"""

from __future__ import annotations

import re
from typing import Annotated, Final, Literal, get_args

import msgspec
from msgspec import Meta

from rayos_vmm.config.firewall import FirewallConfig
from rayos_vmm.config.units import (
    Duration,
    Rate,
    Size,
    Throughput,
    parse_duration,
    parse_rate,
    parse_size,
    parse_throughput,
    spell_size,
)

NAME_PATTERN: Final = r"^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$"
MAC_PATTERN: Final = r"^[0-9a-f][02468ace](:[0-9a-f]{2}){5}$"
PORT_NAME_PATTERN: Final = r"^[A-Za-z][A-Za-z0-9._-]{0,62}$"
# Our guest booted 26 times of 30 with 96 MiB (System is deadlocked on memory), 30 of 30 with 104, 100 of 100 with this.
MEMORY_MINIMUM_BYTES: Final = 112 << 20
#: Of a kernel that is not ours.
FOREIGN_MEMORY_MINIMUM_BYTES: Final = 1 << 20
#: Processors of the largest board (rayos_vmm/qemu/arch).
CPUS_MAXIMUM: Final = 255
CPU_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]*(,[+-]?[A-Za-z0-9][A-Za-z0-9._-]*(=[A-Za-z0-9._-]*)?)*$"
#: COM1 to COM4, and four debug consoles.
LINE_NAMES: Final = (
    *("serial", "serial2", "serial3", "serial4"),
    *("debugcon", "debugcon2", "debugcon3", "debugcon4"),
)
IO_PORT_PATTERN: Final = r"^0x[0-9a-fA-F]{1,4}$"
REACTION_PATTERN: Final = r"^(auto|stop|reset|count=[1-9][0-9]{0,5})$"
RTC_PATTERN: Final = r"^(utc|localtime|[0-9]{4}-[0-9]{2}-[0-9]{2}(T[0-9]{2}:[0-9]{2}(:[0-9]{2})?)?)$"
DISKS_MAXIMUM: Final = 8
SIDE_MINIMUM: Final = 64
SIDE_MAXIMUM: Final = 4095  # 12 bits in an EDID's detailed timing
MODES_MAXIMUM: Final = 17  # what an EDID has room for beside the preferred mode and the first one
CONSOLE_PORT_NAMES: Final = ("org.rayos.console", "org.rayos.agent", "org.rayos.log")
PORTS_MAXIMUM: Final = 31 - len(CONSOLE_PORT_NAMES)  # QEMU's virtio-serial has 31
SCANOUTS_MAXIMUM: Final = 16  # VIRTIO 1.3, 5.7.6.8: VIRTIO_GPU_MAX_SCANOUTS
#: Bytes of a captured frame (rayos_devices.net.capture.MAX_SNAP).
SNAP_MAXIMUM: Final = (64 << 10) - 48
QUEUES_MAXIMUM: Final = 16
#: Queues of a device that was not told how many: one a CPU, so that no two CPUs share a lock, up to this.
QUEUES_DEFAULT: Final = 4
FIRMWARE_BIOS: Final = "bios"

Name = Annotated[
    str,
    Meta(pattern=NAME_PATTERN, description="1 to 32 of a-z, 0-9 and -, no - at the ends", examples=["dev"]),
]


Side = Annotated[int, Meta(ge=SIDE_MINIMUM, le=SIDE_MAXIMUM, description="pixels")]
Mode = Annotated[str, Meta(pattern=r"^[0-9]{2,4}x[0-9]{2,4}$", examples=["1920x1080"])]

PortName = Annotated[
    str,
    Meta(pattern=PORT_NAME_PATTERN, description="1 to 63 of a-z, 0-9, . _ -, a letter first"),
]
#: Fingers of a touch screen: what the default queue of 64 events takes in one report, with room to lift them.
FINGERS: Final = 8
InputName = Literal["keyboard", "mouse", "tablet", "touch"]
Layout = Literal["us", "de", "fr"]  # rayos_devices.input.keymap.LAYOUTS

CapabilityName = Literal[
    "CAP_NET", "CAP_DISK_R", "CAP_DISK_W", "CAP_GPU", "CAP_INPUT", "CAP_CONSOLE_R", "CAP_CONSOLE_W", "CAP_RNG"
]
CAPABILITIES: Final[tuple[CapabilityName, ...]] = get_args(CapabilityName)


#: Those beside raw are read by a qemu-storage-daemon.
DiskFormat = Literal["raw", "qcow2", "vmdk", "vdi", "vhdx"]


#: All but virtio's are controllers of QEMU's, which read the disk through our worker.
DiskBus = Literal["virtio", "ahci", "ide", "nvme", "usb", "scsi", "floppy", "sd"]
#: How many disks each bus takes.
BUS_MAXIMUM: Final[dict[str, int]] = {"ahci": 5, "ide": 3, "floppy": 2, "sd": 1}
#: The buses that take blocks of 4096 bytes.
LARGE_BLOCK_BUSES: Final = ("virtio", "nvme", "usb", "scsi")


class Disk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A disk image, a size for an empty one that lives and dies with the machine, or a directory as a FAT disk.

    `format` is never guessed: what a guest wrote to a raw disk must not decide how it is read. `snapshot`: the machine
    writes to a copy of the image, which is thrown away at its end; a file system that can clone files makes it at
    once. `directory` is copied to a disk of one FAT partition (GPT) at each start, and never written to.
    `cache = "unsafe"`: flushes stay in the host's memory, and a host that loses power loses what was promised.
    """

    path: str | None = None
    size: Size | None = None
    directory: str | None = None
    bus: DiskBus = "virtio"
    snapshot: bool = False
    cache: Literal["writeback", "unsafe"] = "writeback"
    logical_block_size: Literal[512, 4096] = 512
    format: DiskFormat = "raw"
    read_only: bool = False
    serial: Annotated[str, Meta(max_length=20)] = ""  # VIRTIO 1.3, 5.2.6: VIRTIO_BLK_ID_BYTES is 20
    queues: Annotated[int, Meta(ge=1, le=QUEUES_MAXIMUM)] | None = None  # None: one a CPU, at most 4

    @property
    def is_thrown_away(self) -> bool:
        """True when the machine's own copy is gone at its end."""
        return self.snapshot or self.directory is not None


PublishedPort = Annotated[
    str,
    Meta(
        pattern=r"^([0-9]{1,3}([.][0-9]{1,3}){3}:)?[0-9]{1,5}:[0-9]{1,5}$",
        description="a port of the host and one of the guest's, perhaps after an address of the host's",
        examples=["8080:80"],
    ),
]
NetModel = Literal["virtio", "e1000", "e1000e", "rtl8139", "pcnet", "ne2k_pci", "vmxnet3"]


class Net(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The one network card, on a tap of ours.

    `model`: all but virtio's is a card of QEMU's, whose frames come to our worker; it has one pair of queues. A virtio
    card leaves checksums and large segments to the host, merges buffers and has a control queue, unless told not to:
    a driver that acknowledges whatever is on offer has to do what it says. `publish`: TCP ports of the host whose
    connections are carried to the guest; the host itself reaches them, others where an address says so.

    `address` is where the guest's address comes from: "ours" is our bridge and DHCP server; "upstream" is somebody
    else's DHCP on `bridge`, a bridge of the host that has an uplink: we get the lease there and hand it on.
    """

    enabled: bool = True
    mac: Annotated[str, Meta(pattern=MAC_PATTERN)] | None = None
    # VIRTIO 1.3, 5.1.4.1: from 68; a tap takes 65521, and the bridge has the smallest of its ports'.
    mtu: Annotated[int, Meta(ge=68, le=65521)] = 1500
    address: Literal["ours", "upstream"] = "ours"
    bridge: Annotated[str, Meta(pattern=r"^[^/:\s]{1,15}$")] | None = None
    # Pairs of queues: the driver uses as many as it has processors.
    queues: Annotated[int, Meta(ge=1, le=QUEUES_MAXIMUM)] = 1
    model: NetModel = "virtio"
    offloads: bool = True
    mrg_rxbuf: bool = True
    ctrl_vq: bool = True
    publish: Annotated[tuple[PublishedPort, ...], Meta(max_length=32)] = ()


GpuModel = Literal["virtio", "std", "bochs", "ramfb", "virtio-vga"]


class Gpu(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The display; off means no GPU and no input devices.

    Every one of the `scanouts` monitors prefers `width` by `height`, and can do `modes` as well. `model`: `virtio` is
    ours, with VGA for kernels that know no other; the others are QEMU's, which have one monitor and no quota.
    """

    enabled: bool = True
    model: GpuModel = "virtio"
    width: Side = 1280
    height: Side = 800
    modes: Annotated[list[Mode], Meta(max_length=MODES_MAXIMUM)] = []
    scanouts: Annotated[int, Meta(ge=1, le=SCANOUTS_MAXIMUM)] = 1

    @property
    def is_ours(self) -> bool:
        """True when the display is a device of ours."""
        return self.enabled and self.model == "virtio"

    @property
    def mode_sizes(self) -> list[tuple[int, int]]:
        """`modes` as width and height in pixels, each once."""
        return [parse_mode(text) for text in dict.fromkeys(self.modes)]


class Secret(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file whose bytes the TPM gives out only while these registers are as the host left them."""

    path: str
    pcrs: Annotated[str, Meta(max_length=200, examples=["8,9"])] = "8,9"


class Tpm(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The TPM, where its defaults do not fit.

    `profile` is by default that of `policy`, else `seed` for direct kernel boot and `host-reserved` for UEFI
    (tpm/README.md has what each measures where). `policy` is a file that `rayos tpm policy` or
    `python -m tpm policy` wrote: a firmware, command line, kernel, initrd or quota that it does not name is
    never executed. `quote_interval` of "0s": no quotes but those that are asked for.
    """

    model: Literal["crb", "tis"] = "crb"
    profile: Literal["seed", "host-reserved"] | None = None
    policy: str | None = None
    secret: Secret | None = None
    quote_interval: Duration = "0s"

    @property
    def quote_interval_s(self) -> float:
        return parse_duration(self.quote_interval)


class Watchdog(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When a run ends as failed although nothing said so; "0s" is never.

    `silence`: without console output, disk or network request (hang). `run`: from its start (timed_out).
    """

    silence: Duration = "0s"
    run: Duration = "0s"

    @property
    def silence_s(self) -> float:
        return parse_duration(self.silence)

    @property
    def run_s(self) -> float:
        return parse_duration(self.run)


Pattern = Annotated[str, Meta(min_length=1, max_length=1000, description="a regular expression of RE2")]


class Verdict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Output that ends a run: any console prints a line that matches.

    `pass_on` ends it as passed, `fail_on` as failed; the first match decides. Colours, carriage returns and the borders
    of chunks do not matter; `^` and `$` match at every line. With `default_patterns`, kernels that are not ours also
    fail on the common words of a panic (`machine/verdict.py` has them). `success` is the exit status of a debug exit,
    (value << 1) | 1, that is a pass.
    """

    pass_on: Annotated[tuple[Pattern, ...], Meta(max_length=16)] = ()
    fail_on: Annotated[tuple[Pattern, ...], Meta(max_length=16)] = ()
    default_patterns: bool = True
    success: Annotated[int, Meta(ge=1, le=255)] | None = None


class Input(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The devices to type and point with, beside a display; `layout` is the one that the guest has loaded.

    `devices` are ours, over virtio; `usb` are QEMU's, on a controller of their own. A PC has a PS/2 keyboard and mouse
    as well. Keys go to ours when its driver is up, else to the one of QEMU's that the guest uses.
    """

    devices: Annotated[tuple[InputName, ...], Meta(max_length=4)] = ("keyboard", "mouse", "tablet")
    usb: Annotated[tuple[Literal["keyboard", "mouse", "tablet"], ...], Meta(max_length=3)] = ()
    layout: Layout = "us"


IoPort = Annotated[str, Meta(pattern=IO_PORT_PATTERN, description="an x86 I/O port", examples=["0xe9"])]
Reaction = Annotated[
    str,
    Meta(
        pattern=REACTION_PATTERN,
        description="auto, stop (the machine ends), reset (it goes on), count=N (it ends at the Nth)",
    ),
]
MachineKind = Literal["q35", "pc", "microvm", "isapc"]
WatchdogDevice = Literal["none", "i6300esb", "ib700"]


class Ports(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The ports of a PC by which a kernel without drivers talks; each that says something is a console of the machine.

    `serial`: COM1 to COM4. `debugcon`: a write of one byte is a character. `debug_exit`: a write of V ends QEMU with
    status (V << 1) | 1. `pvpanic`: the device by which a guest tells of its panic, at port 0x505 when `isa`.
    """

    serial: Annotated[int, Meta(ge=1, le=4)] = 1
    debugcon: Annotated[tuple[IoPort, ...], Meta(max_length=4)] = ()
    debug_exit: IoPort | None = None
    pvpanic: Literal["pci", "isa", "none"] | None = None  # None: pci, where there is PCI

    @property
    def lines(self) -> tuple[str, ...]:
        """The consoles' names, COM1's first."""
        return LINE_NAMES[: self.serial] + LINE_NAMES[4 : 4 + len(self.debugcon)]


class Console(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """More ports of the console, by name (/dev/virtio-ports/NAME in Linux), beside those for shell, agent and log."""

    ports: Annotated[tuple[PortName, ...], Meta(max_length=PORTS_MAXIMUM)] = ()


class Quota(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The share of the host that a guest may use."""

    gpu_memory: Size = "128MiB"
    net_rate: Rate = "100Mbit/s"
    disk: Size = "10GiB"  # all disks that it may write, together
    disk_rate: Throughput | None = None  # each disk; None is unbounded
    disk_operations: Annotated[int, Meta(ge=1, le=10**9)] | None = None  # a second, each disk
    input_queue: Annotated[int, Meta(ge=1, le=65536)] = 64
    rng_rate: Throughput = "1MiB/s"  # random bytes
    # Of the host's, by QEMU and all processes around it together (vm/cgroup.py):
    cpus: Annotated[float, Meta(ge=0.01, le=1024)] | None = None  # processors; None is unbounded
    cpu_weight: Annotated[int, Meta(ge=1, le=10000)] = (
        100  # against other machines, when there is not enough for all
    )
    host_memory: Size | None = None  # the guest's own included; None is unbounded; at least memory and 96MiB
    tasks: Annotated[int, Meta(ge=64, le=65536)] = 1024

    @property
    def host_memory_bytes(self) -> int | None:
        return None if self.host_memory is None else parse_size(self.host_memory)

    @property
    def gpu_memory_bytes(self) -> int:
        return parse_size(self.gpu_memory)

    @property
    def net_rate_bits_per_second(self) -> int:
        return parse_rate(self.net_rate)

    @property
    def disk_rate_bytes_per_second(self) -> int | None:
        return None if self.disk_rate is None else parse_throughput(self.disk_rate)

    @property
    def rng_rate_bytes_per_second(self) -> int:
        return max(1, parse_throughput(self.rng_rate))

    @property
    def disk_bytes(self) -> int:
        return parse_size(self.disk)


class VmSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One virtual machine. `kernel=None` means RayOS's own test guest.

    With a `cdrom` or `firmware` and no `kernel` the machine boots from those and no kernel is passed;
    `firmware="bios"` is QEMU's own BIOS, which boots from the CD or the first disk. The `initrd` of a
    multiboot kernel is its modules, `file arguments,file arguments,…`. `zone` and `parent`
    (another machine) are where it inherits policy rules from.

    `cpu` is a model of QEMU's and its features, `max` or `qemu64,+rdrand`; by default the host's under KVM, `max`
    under TCG, and `qemu64` there for our own guest, which boots faster on it. `rtc` is what the clock starts at,
    `icount` how many nanoseconds an instruction takes as a power of two (the guest's time is then that of its
    instructions, the same in every run), `seed` what QEMU's random numbers start from.

    `on_reset` and `on_triple_fault` are for what the guest does itself. `auto`: five resets without getting ready, or
    one triple fault before, end the machine. `on_shutdown` of `pause` leaves the machine there to be looked at.
    `qemu_arguments` are given to QEMU as they are, after ours: nothing is promised about them.
    """

    name: Name
    kernel: str | None = None
    initrd: str | None = None
    append: Annotated[str, Meta(max_length=2000)] = ""
    memory: Size = "256MiB"
    # Virtio devices have packed rings (VIRTIO 1.3, 2.8), where the driver has.
    packed: bool = False
    cpus: Annotated[int, Meta(ge=1, le=CPUS_MAXIMUM)] = 1
    cpu: Annotated[str, Meta(pattern=CPU_PATTERN, max_length=500, examples=["max"])] | None = None
    machine: MachineKind = "q35"
    ports: Ports = Ports()
    rtc: Annotated[str, Meta(pattern=RTC_PATTERN)] = "utc"
    icount: Annotated[int, Meta(ge=0, le=10)] | None = None
    seed: Annotated[int, Meta(ge=0, le=2**32 - 1)] | None = None
    watchdog_device: WatchdogDevice = "none"
    on_reset: Reaction = "auto"
    on_triple_fault: Reaction = "auto"
    on_shutdown: Literal["stop", "pause"] = "stop"
    qemu_arguments: Annotated[tuple[str, ...], Meta(max_length=64)] = ()
    disks: Annotated[list[Disk], Meta(max_length=DISKS_MAXIMUM)] = []
    net: Net = Net()
    gpu: Gpu = Gpu()
    input: Input = Input()
    console: Console = Console()
    # A source of random bytes (/dev/hwrng in Linux).
    rng: bool = True
    tpm: bool | Tpm = True
    firmware: str | None = None
    cdrom: str | None = None
    ephemeral: bool = False
    quota: Quota = Quota()
    watchdog: Watchdog = Watchdog()
    verdict: Verdict = Verdict()
    capabilities: tuple[CapabilityName, ...] = CAPABILITIES
    zone: Name | None = None
    parent: Name | None = None
    firewall: FirewallConfig = FirewallConfig()

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "memory", spell_size(self.memory))

    @property
    def console_ports(self) -> tuple[str, ...]:
        """The names of all ports of the virtio console, in their order."""
        return (*CONSOLE_PORT_NAMES, *self.console.ports)

    @property
    def memory_bytes(self) -> int:
        return parse_size(self.memory)

    def disk_serial(self, index: int) -> str:
        """The serial number that a guest reads of its `index`-th disk."""
        return self.disks[index].serial or f"rayos-{index}"

    def disk_queues(self, disk: Disk) -> int:
        """How many request queues a disk has."""
        if disk.bus != "virtio":
            return 1
        return disk.queues or min(self.cpus, QUEUES_DEFAULT)

    @property
    def tpm_options(self) -> Tpm:
        """How the TPM is to be, if there is one."""
        return self.tpm if isinstance(self.tpm, Tpm) else Tpm()

    @property
    def is_our_guest(self) -> bool:
        """True when RayOS's own kernel and initramfs are booted."""
        return self.kernel is None and self.initrd is None and self.cdrom is None and self.firmware is None


def parse_mode(text: str) -> tuple[int, int]:
    """Width and height of `1920x1080`.

    Raises:
        ValueError: it is no mode, or one that no monitor of ours has.
    """
    width, separator, height = text.partition("x")
    sides = [int(side) for side in (width, height) if side.isdecimal()]
    if not separator or len(sides) != 2 or not all(SIDE_MINIMUM <= side <= SIDE_MAXIMUM for side in sides):
        raise ValueError(
            f"{text!r} is not a mode: such as 1920x1080, {SIDE_MINIMUM} to {SIDE_MAXIMUM} pixels a side"
        )
    return sides[0], sides[1]


def is_port_name(text: str) -> bool:
    """True if `text` can name a console port."""
    return re.fullmatch(PORT_NAME_PATTERN, text) is not None


def is_name(text: str) -> bool:
    """True if `text` can name a virtual machine."""
    return re.fullmatch(NAME_PATTERN, text) is not None
