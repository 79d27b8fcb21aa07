"""From QEMU's options to a machine of ours: a pure function of the command line.

Theory of operation: options are read in their order into what belongs together (drives, cards, character devices), for
a drive and its device may stand anywhere. Then each group becomes keys of a machine's table. An option that nobody
claims goes to QEMU as it is. Every option has exactly one fate, which `Plan.became` says; none is dropped.

The defaults are QEMU's, not ours: the board `pc`, 128 MiB, no TPM, resets and triple faults that go on, a panic that is
only text, and an exit status of 0 for every end that the guest chose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, get_args

from rayos_vmm.config.spec import MachineKind
from rayos_vmm.config.units import format_size
from rayos_vmm.dropin import channel, storage
from rayos_vmm.dropin.channel import Channel
from rayos_vmm.dropin.command_line import Option, parse, properties
from rayos_vmm.dropin.plan import Fate, Forward, Monitor, Plan
from rayos_vmm.errors import Invalid

MEMORY_DEFAULT_MIB: Final = 128
DEBUG_EXIT_DEFAULT: Final = "0x501"
DEBUGCON_DEFAULT: Final = "0xe9"
_DEBUGCON_GLOBAL: Final = "isa-debugcon.iobase="
_SUFFIXES: Final = {"": 20, "k": 10, "m": 20, "g": 30, "t": 40}
#: Virtual devices that need no words: a machine of ours has them, or their like.
_SCREENS: Final = (
    "VGA",
    "bochs-display",
    "virtio-vga",
    "virtio-gpu",
    "qxl",
    "cirrus-vga",
    "vmware-svga",
    "secondary-vga",
)
_CARDS: Final = {
    "virtio-net": "virtio",
    "e1000": "e1000",
    "e1000-82540em": "e1000",
    "e1000e": "e1000e",
    "rtl8139": "rtl8139",
    "pcnet": "pcnet",
    "ne2k_pci": "ne2k_pci",
    "vmxnet3": "vmxnet3",
    "virtio": "virtio",
}
_REFUSED: Final = {
    "loadvm": "a snapshot of QEMU's holds devices that a machine of ours does not have",
    "incoming": "a migration of QEMU's holds devices that a machine of ours does not have",
}
_HERE: Final = {"nographic": "no window, as ever; the serial line is on standard output"}
_NOTED: Final = {
    "enable-kvm": "the accelerator is chosen by a probe: KVM where a kernel really boots under it",
    "accel": "the accelerator is chosen by a probe: KVM where a kernel really boots under it",
    "no-kvm": "the accelerator is chosen by a probe",
    "vnc": "there is no VNC server: `rayos screenshot` and `rayos display` show the screen",
    "full-screen": "there is no window",
    "no-fd-bootchk": "the BIOS looks at every boot disk",
    "no-hpet": "the clocks are the board's",
    "k": "there is no window whose keys would need a layout",
    "L": "firmware is QEMU's own, or the file of -bios and -pflash",
    "boot": "it boots from the CD, then from the disks in their order",
    "audio": "there is no sound",
    "audiodev": "there is no sound",
    "soundhw": "there is no sound",
    "uuid": "the service gives each machine its own",
    "msg": "messages are in qemu.log",
    "nodefaults": "a machine of ours has what it was asked for",
    "no-user-config": "no configuration file is read",
    "name": "a machine of this command has a name of its own",
    "alt-grab": "there is no window",
    "ctrl-grab": "there is no window",
    "show-cursor": "there is no window",
}


@dataclass
class _Read:
    """The options, by what belongs together."""

    chardevs: dict[str, Channel] = field(default_factory=dict)
    drives: list[tuple[Option, dict[str, str]]] = field(default_factory=list)
    devices: list[tuple[Option, dict[str, str]]] = field(default_factory=list)
    netdevs: list[tuple[Option, dict[str, str]]] = field(default_factory=list)
    serials: list[tuple[Option, Channel]] = field(default_factory=list)
    cards: list[tuple[Option, dict[str, str]]] = field(default_factory=list)
    is_nographic: bool = False
    has_monitor: bool = False
    is_snapshot: bool = False
    has_no_defaults: bool = False
    wants_no_card: bool = False
    vga: str = "std"
    debugcon_port: str = DEBUGCON_DEFAULT


class Translation:
    """One command line. Use `translate`."""

    def __init__(self, *, can_network: bool) -> None:
        self.plan = Plan(
            table={
                "machine": "pc",
                "memory": f"{MEMORY_DEFAULT_MIB}MiB",
                "tpm": False,
                "ephemeral": True,
                "on_reset": "reset",
                "on_triple_fault": "reset",
                "verdict": {"default_patterns": False},
                "ports": {"pvpanic": "none"},
            }
        )
        self._read = _Read()
        self._can_network = can_network
        self._passed: list[str] = []

    def run(self, options: Sequence[Option]) -> Plan:
        """The plan.

        Raises:
            Invalid: an option is refused, or is nonsense; the message names it.
        """
        for option in options:
            if option.name == "global" and option.value.startswith(_DEBUGCON_GLOBAL):
                self._read.debugcon_port = option.value.removeprefix(_DEBUGCON_GLOBAL)
            if option.name == "chardev":
                name, where = channel.long(option.value)
                self._read.chardevs[name] = where
                self._ours(option, Fate.HERE, str(where))
        for option in options:
            if option.name != "chardev":
                self._one(option)
        storage.place(self.plan, self._read.drives, self._read.devices, is_snapshot=self._read.is_snapshot)
        self._devices()
        self._network()
        self._consoles()
        self._screen()
        table = self.plan.table
        if not any(table.get(key) for key in ("kernel", "cdrom", "firmware")):
            table["firmware"] = "bios"
        if self._passed:
            table["qemu_arguments"] = self._passed
        return self.plan

    def _ours(self, option: object, fate: Fate, text: str) -> None:
        self.plan.say(option, fate, text)

    def _pass(self, option: Option, why: str = "as it is") -> None:
        self._passed += option.words
        self.plan.say(option, Fate.PASSED, why)

    def _one(self, option: Option) -> None:
        if option.name in _REFUSED:
            raise Invalid(
                f"{option}: refused: {_REFUSED[option.name]}", hint="rayos-qemu has no saved states"
            )
        handler: Callable[[Option], None] | None = getattr(self, f"_on_{option.name.replace('-', '_')}", None)
        if handler is not None:
            handler(option)
        elif storage.is_drive(option.name):
            self._read.drives.append((option, storage.drive(option)))
        elif option.name in _NOTED:
            self.plan.say(option, Fate.NOTED, _NOTED[option.name])
        else:
            self._pass(option)

    # -- board and boot ------------------------------------------------------------------------------------------

    def _on_kernel(self, option: Option) -> None:
        self.plan.table[option.name] = option.value
        self._ours(option, Fate.OURS, f"{option.name} = {option.value!r}")

    _on_initrd = _on_append = _on_kernel

    def _on_bios(self, option: Option) -> None:
        self.plan.table["firmware"] = option.value
        self._ours(option, Fate.OURS, f"firmware = {option.value!r}")

    def _on_machine(self, option: Option) -> None:
        given = properties(option.value, "type")
        kind = given.pop("type", "pc")
        kind = next(
            (
                one
                for one in get_args(MachineKind)
                if kind == one or kind.startswith((f"pc-{one}-", f"{one}-"))
            ),
            kind,
        )
        kind = "pc" if kind.startswith("pc-i440fx") else kind
        self.plan.table["machine"] = kind
        rest = [
            f"{key}={value}"
            for key, value in given.items()
            if key not in ("accel", "graphics", "i8042", "usb")
        ]
        self._ours(
            option,
            Fate.OURS,
            f"machine = {kind!r}" + (f"; without effect: {', '.join(rest)}" if rest else ""),
        )

    def _on_cpu(self, option: Option) -> None:
        if option.value.partition(",")[0] == "host":
            self.plan.say(option, Fate.NOTED, "the host's processor under KVM, `max` without")
            return
        self.plan.table["cpu"] = option.value
        self._ours(option, Fate.OURS, f"cpu = {option.value!r}")

    def _on_smp(self, option: Option) -> None:
        given = properties(option.value, "cpus")
        count = given.get("cpus") or str(_product(given))
        if not count.isdecimal() or int(count) < 1:
            raise Invalid(f"{option}: {count!r} is no number of processors")
        self.plan.table["cpus"] = int(count)
        self._ours(option, Fate.OURS, f"cpus = {count}")

    def _on_m(self, option: Option) -> None:
        text = properties(option.value, "size").get("size", "")
        self.plan.table["memory"] = format_size(_bytes(option, text))
        self._ours(option, Fate.OURS, f"memory = {self.plan.table['memory']!r}")

    def _on_rtc(self, option: Option) -> None:
        base = properties(option.value).get("base", "utc")
        self.plan.table["rtc"] = base
        self._ours(option, Fate.OURS, f"rtc = {base!r}")

    def _on_icount(self, option: Option) -> None:
        shift = properties(option.value, "shift").get("shift", "")
        if not shift.isdecimal():
            self._pass(option)
            return
        self.plan.table["icount"] = int(shift)
        self._ours(option, Fate.OURS, f"icount = {shift}")

    def _on_seed(self, option: Option) -> None:
        self.plan.table["seed"] = int(option.value)
        self._ours(option, Fate.OURS, f"seed = {option.value}")

    # -- ends ----------------------------------------------------------------------------------------------------

    def _on_no_reboot(self, option: Option) -> None:
        self.plan.table.update({"on_reset": "stop", "on_triple_fault": "stop"})
        self._ours(option, Fate.OURS, "on_reset = 'stop', on_triple_fault = 'stop'")

    def _on_no_shutdown(self, option: Option) -> None:
        self.plan.table["on_shutdown"] = "pause"
        self._ours(option, Fate.OURS, "on_shutdown = 'pause'")

    def _on_action(self, option: Option) -> None:
        given = properties(option.value)
        if given.get("reboot") == "shutdown":
            self.plan.table.update({"on_reset": "stop", "on_triple_fault": "stop"})
        if given.get("shutdown") == "pause":
            self.plan.table["on_shutdown"] = "pause"
        self._ours(option, Fate.OURS, "on_reset, on_triple_fault, on_shutdown")

    def _on_watchdog(self, option: Option) -> None:
        self.plan.table["watchdog_device"] = option.value
        self._ours(option, Fate.OURS, f"watchdog_device = {option.value!r}")

    # -- this process --------------------------------------------------------------------------------------------

    def _flag(self, option: Option, key: str, value: Any, text: str) -> None:
        setattr(self.plan, key, value)
        self._ours(option, Fate.HERE, text)

    def _on_q(self, option: Option) -> None:
        self._flag(option, "is_quiet", True, "no line on standard error")

    def _on_explain(self, option: Option) -> None:
        self._flag(option, "is_explained", True, "this table")

    def _on_daemonize(self, option: Option) -> None:
        self._flag(option, "is_daemon", True, "this process goes on in the background once the machine runs")

    def _on_pidfile(self, option: Option) -> None:
        self._flag(
            option, "pid_file", option.value, "the number of this process, whose life is the machine's"
        )

    def _on_D(self, option: Option) -> None:
        self._flag(option, "log_path", option.value, "QEMU's log is copied there at the end")

    def _on_d(self, option: Option) -> None:
        self._passed += ["-d", f"cpu_reset,{option.value}"]
        self.plan.say(option, Fate.PASSED, "its log is in qemu.log, and in the file of -D")

    def _on_S(self, option: Option) -> None:
        self._flag(option, "starts_paused", True, "the machine is paused as soon as it runs")

    def _on_s(self, option: Option) -> None:
        self._flag(option, "gdb", "tcp::1234", "")
        raise _no_gdb(option)

    def _on_gdb(self, option: Option) -> None:
        raise _no_gdb(option)

    def _on_snapshot(self, option: Option) -> None:
        self._read.is_snapshot = True
        self._ours(option, Fate.OURS, "snapshot = true for every disk")

    def _on_nographic(self, option: Option) -> None:
        self._read.is_nographic = True
        self._ours(option, Fate.HERE, _HERE["nographic"])

    def _on_nodefaults(self, option: Option) -> None:
        self._read.has_no_defaults = True
        self._ours(option, Fate.OURS, "no card and no serial line but those that are named")

    def _on_display(self, option: Option) -> None:
        self._ours(
            option, Fate.HERE, "there is no window: `rayos screenshot` and `rayos display` show the screen"
        )

    def _on_vga(self, option: Option) -> None:
        self._read.vga = option.value
        self._ours(
            option, Fate.OURS, "no display" if option.value == "none" else "our VGA-compatible display"
        )

    # -- character devices ---------------------------------------------------------------------------------------

    def _on_serial(self, option: Option) -> None:
        where = channel.short(option.value, self._read.chardevs)
        self._read.serials.append((option, where))
        self._ours(option, Fate.OURS, f"COM{len(self._read.serials)} → {where}")

    def _on_debugcon(self, option: Option) -> None:
        self._debugcon(option, channel.short(option.value, self._read.chardevs), self._read.debugcon_port)

    def _on_global(self, option: Option) -> None:
        if not option.value.startswith(_DEBUGCON_GLOBAL):
            self._pass(option)
            return
        self._ours(option, Fate.OURS, "the port of -debugcon")

    def _debugcon(self, option: Option, where: Channel, port: str) -> None:
        ports = self.plan.table["ports"]
        ports["debugcon"] = [*ports.get("debugcon", ()), port.lower()]
        number = len(ports["debugcon"])
        self.plan.lines["debugcon" if number == 1 else f"debugcon{number}"] = where
        self._ours(option, Fate.OURS, f"debugcon at {port} → {where}")

    def _on_monitor(self, option: Option) -> None:
        self._read.has_monitor = True
        where = channel.short(option.value, self._read.chardevs)
        self.plan.monitors.append(Monitor(where))
        self._ours(option, Fate.HERE, f"the human monitor on {where}, through our QMP connection")

    def _on_qmp(self, option: Option) -> None:
        where = channel.short(option.value, self._read.chardevs)
        self.plan.monitors.append(Monitor(where, is_qmp=True))
        self._ours(option, Fate.HERE, f"QMP on {where}, through our QMP connection")

    _on_qmp_pretty = _on_qmp

    def _on_mon(self, option: Option) -> None:
        given = properties(option.value, "chardev")
        where = channel.short(f"chardev:{given.get('chardev', '')}", self._read.chardevs)
        is_qmp = given.get("mode") == "control"
        self._read.has_monitor = self._read.has_monitor or not is_qmp
        self.plan.monitors.append(Monitor(where, is_qmp=is_qmp))
        self._ours(option, Fate.HERE, f"{'QMP' if is_qmp else 'the human monitor'} on {where}")

    def _consoles(self) -> None:
        serials = [where for _, where in self._read.serials]
        if not serials and not self._read.has_no_defaults:
            is_shared = self._read.is_nographic and not self._read.has_monitor
            serials = [Channel("stdio", is_mux=is_shared) if self._read.is_nographic else Channel("null")]
        self.plan.table["ports"]["serial"] = max(1, min(4, len(serials)))
        names = ("serial", "serial2", "serial3", "serial4")
        self.plan.lines.update(dict(zip(names, serials, strict=False)))

    def _screen(self) -> None:
        if self._read.vga == "none" and not self.plan.table.get("gpu"):
            self.plan.table["gpu"] = {"enabled": False}

    # -- devices -------------------------------------------------------------------------------------------------

    def _on_device(self, option: Option) -> None:
        self._read.devices.append((option, properties(option.value, "driver")))

    def _devices(self) -> None:
        for option, given in self._read.devices:
            driver = given.get("driver", "")
            stem = driver.removesuffix("-non-transitional").removesuffix("-transitional").removesuffix("-pci")
            if stem in _CARDS:
                self._read.cards.append((option, {**given, "model": _CARDS[stem]}))
            elif any(stem == one or stem.startswith(f"{one}-") for one in _SCREENS):
                self.plan.table["gpu"] = {"enabled": True}
                self._ours(option, Fate.OURS, "our VGA-compatible display")
            elif driver == "isa-debug-exit":
                port = given.get("iobase", DEBUG_EXIT_DEFAULT).lower()
                self.plan.table["ports"]["debug_exit"] = port
                self._ours(option, Fate.OURS, f"ports.debug_exit = {port!r}; the exit status is the guest's")
            elif driver == "isa-debugcon":
                where = channel.short(f"chardev:{given.get('chardev', '')}", self._read.chardevs)
                self._debugcon(option, where, given.get("iobase", self._read.debugcon_port))
            elif driver in ("pvpanic", "pvpanic-pci"):
                self.plan.table["ports"]["pvpanic"] = "isa" if driver == "pvpanic" else "pci"
                self._ours(option, Fate.OURS, "ports.pvpanic")
            elif driver == "isa-serial":
                where = channel.short(f"chardev:{given.get('chardev', '')}", self._read.chardevs)
                self._read.serials.append((option, where))
                self._ours(option, Fate.OURS, f"COM{len(self._read.serials)} → {where}")
            elif stem in ("virtio-keyboard", "virtio-mouse", "virtio-tablet"):
                self.plan.table.setdefault("gpu", {"enabled": True})
                self._ours(option, Fate.OURS, "input.devices")
            else:
                self._pass(option)

    # -- network -------------------------------------------------------------------------------------------------

    def _on_netdev(self, option: Option) -> None:
        self._read.netdevs.append((option, properties(option.value, "kind")))

    def _on_nic(self, option: Option) -> None:
        given = properties(option.value, "kind")
        if given.get("kind") == "none":
            self._read.wants_no_card = True
            self._ours(option, Fate.OURS, "net.enabled = false")
            return
        self._read.netdevs.append((option, given))
        self._read.cards.append((option, {"model": _model(given), **_mac(given)}))

    def _on_net(self, option: Option) -> None:
        given = properties(option.value, "kind")
        match given.get("kind"):
            case "none":
                self._read.wants_no_card = True
                self._ours(option, Fate.OURS, "net.enabled = false")
            case "nic":
                model = _model(given)
                self._read.cards.append((option, {"model": model, **_mac(given)}))
            case _:
                self._read.netdevs.append((option, given))

    def _network(self) -> None:
        table, read = self.plan.table, self._read
        if not read.cards and not read.netdevs:
            table["net"] = {"enabled": False}
            return
        if not self._can_network:
            for number, option in enumerate(dict.fromkeys(one for one, _ in (*read.netdevs, *read.cards))):
                self._passed += _own_card(option, number)
                self.plan.say(option, Fate.PASSED, "taps need root: the card is QEMU's, and reaches nobody")
            table["net"] = {"enabled": False}
            return
        card = read.cards[0][1] if read.cards else {"model": "e1000"}
        table["net"] = {"model": card["model"], **_mac(card)}
        offloads = ("csum", "gso", "guest_csum", "host_tso4", "guest_tso4")
        if any(card.get(key) == "off" for key in offloads):
            table["net"]["offloads"] = False
        if card.get("mrg_rxbuf") == "off":
            table["net"]["mrg_rxbuf"] = False
        texts: dict[Option, list[str]] = {}
        fates = dict.fromkeys((option for option, _ in (*read.cards, *read.netdevs)), Fate.OURS)
        for index, (option, _) in enumerate(read.cards):
            text = f"net.model = {card['model']!r}: our card, firewall, capture and DHCP"
            texts.setdefault(option, []).append("a machine has one card" if index else text)
            fates[option] = Fate.NOTED if index else Fate.OURS
        for option, given in read.netdevs:
            texts.setdefault(option, []).append(self._netdev(option, given))
        for option, fate in fates.items():
            self.plan.say(option, fate, "; ".join(texts[option]))

    def _netdev(self, option: Option, given: dict[str, str]) -> str:
        if given.get("kind") not in ("user", "tap", "bridge"):
            raise Invalid(
                f"{option}: refused: a card of ours is on our bridge; user, tap and bridge become that"
            )
        forwards = [_forward(option, word) for word in _hostfwd(option.value)]
        self.plan.forwards += forwards
        text = "our bridge, with an address of our DHCP server and not 10.0.2.15"
        return "; ".join([text, *(f"{one.host}:{one.port} → :{one.guest_port}" for one in forwards)])


def _own_card(option: Option, number: int) -> tuple[str, ...]:
    """A card or its network as QEMU takes it, without the boot ROM that is not installed."""
    given = properties(option.value, "kind")
    if option.name == "device":
        return ("-device", option.value if "romfile" in given else f"{option.value},romfile=")
    if option.name == "nic":
        name = f"nic{number}-of-qemu"
        return ("-netdev", f"user,id={name}", "-device", f"{_model(given)},netdev={name},romfile=")
    return option.words


def _model(given: dict[str, str]) -> str:
    return _CARDS.get(given.get("model", "e1000").removesuffix("-pci"), "e1000")


def _no_gdb(option: Option) -> Invalid:
    return Invalid(
        f"{option}: refused: QEMU runs in a sandbox without a network, where no debugger reaches it",
        hint="`rayos qmp NAME human-monitor-command` looks at registers and memory",
    )


def _mac(given: dict[str, str]) -> dict[str, str]:
    mac = given.get("mac") or given.get("macaddr")
    return {"mac": mac.lower()} if mac else {}


def _hostfwd(text: str) -> list[str]:
    return [word.removeprefix("hostfwd=") for word in text.split(",") if word.startswith("hostfwd=")]


def _forward(option: Option, text: str) -> Forward:
    """`tcp:[HOST]:PORT-[GUEST]:PORT`."""
    protocol, _, rest = text.partition(":")
    outside, dash, inside = rest.partition("-")
    host, _, port = outside.rpartition(":")
    guest_port = inside.rpartition(":")[2]
    if not dash or not port.isdecimal() or not guest_port.isdecimal():
        raise Invalid(f"{option}: Invalid host forwarding rule {text!r}")
    if protocol not in ("tcp", ""):
        raise Invalid(f"{option}: refused: {text!r} forwards {protocol}, and only tcp is forwarded")
    return Forward(host or "127.0.0.1", int(port), int(guest_port))


def _product(given: dict[str, str]) -> int:
    count = 1
    for key in ("sockets", "dies", "clusters", "cores", "threads"):
        count *= int(given[key]) if given.get(key, "").isdecimal() else 1
    return count


def _bytes(option: Option, text: str) -> int:
    number, unit = (text[:-1], text[-1:].lower()) if text[-1:].isalpha() else (text, "")
    if not number.isdecimal() or unit not in _SUFFIXES:
        raise Invalid(f"{option}: {text!r} is no size: a number of MiB, or one with K, M, G or T")
    return int(number) << _SUFFIXES[unit]


def translate(words: Sequence[str], *, can_network: bool = True) -> Plan:
    """The plan for QEMU's command line without the program's name.

    Args:
        can_network: whether this user may have taps; if not, cards are QEMU's own.

    Raises:
        Unreadable: it is no command line of QEMU's.
        Invalid: an option is refused, or is nonsense; the message names it.
    """
    return Translation(can_network=can_network).run(parse(words))
