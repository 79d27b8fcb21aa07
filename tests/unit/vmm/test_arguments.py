"""QEMU's command line: what must be on it, always, and what each part of a specification adds."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from rayos_vmm.config.spec import Disk, Gpu, Input, Net, Ports, VmSpec
from rayos_vmm.errors import Invalid
from rayos_vmm.qemu.arguments import Sockets, command_line, processor
from rayos_vmm.qemu.boot import Boot, FirmwareKind

SPEC = VmSpec(name="dev", memory="256MiB", cpus=2)


def line(
    spec: VmSpec = SPEC,
    boot: Boot | None = None,
    accelerator: str = "tcg",
    mac: str = "",
    has_dbus_display: bool = False,
    **more: object,
) -> list[str]:
    return command_line(
        spec,
        argv=("/usr/bin/qemu",),
        accelerator=accelerator,
        boot=boot or Boot(),
        sockets=Sockets(qmp_fd=10, line_fds=tuple(range(11, 11 + len(spec.ports.lines))), **more),  # type: ignore[arg-type]
        mac=mac,
        tpm=("-tpmdev", "x"),
        has_dbus_display=has_dbus_display,
    )


def sockets(*names: str) -> dict[str, Path]:
    return {name: Path(f"/r,n/{name}.sock") for name in names}


def values(arguments: list[str], option: str) -> list[str]:
    return [value for key, value in pairwise(arguments) if key == option]


def test_a_machine_has_nothing_that_we_did_not_ask_for() -> None:
    """No defaults, no user configuration, no display, no network of QEMU's own; sandboxed; stopped at first."""
    arguments = line()
    for option in ("-nodefaults", "-no-user-config", "-S"):
        assert option in arguments
    assert values(arguments, "-sandbox") == [
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
    ]
    assert values(arguments, "-display") == ["none"] and values(arguments, "-nic") == ["none"]
    assert values(arguments, "-device") == ["pvpanic-pci"]
    assert not any("user" in value for value in values(arguments, "-netdev"))
    assert arguments[0] == "/usr/bin/qemu" and arguments[-2:] == ["-tpmdev", "x"]


def test_memory_is_a_sealed_shared_memfd_of_the_size_asked_for() -> None:
    """vhost-user needs it shared, the worker needs it sealed."""
    arguments = line()
    assert values(arguments, "-object") == [
        "memory-backend-memfd,id=ram,size=268435456,share=on,seal=on,dump=off"
    ]
    assert values(arguments, "-m") == ["size=256M"]
    assert "memory-backend=ram" in values(arguments, "-machine")[0]
    with pytest.raises(Invalid, match="whole number of MiB"):
        line(VmSpec(name="a", memory="100000KiB"))


def test_every_device_is_ours_over_vhost_user() -> None:
    """Five kinds of devices, each on its own socket; a comma in a path is escaped."""
    arguments = line(
        mac="52:59:00:00:00:01",
        spec=VmSpec(name="dev", cpus=2, disks=[Disk(size="1MiB"), Disk(size="1MiB", queues=16)]),
        devices=sockets("disk0", "disk1", "net", "gpu", "keyboard", "mouse", "tablet", "console"),
    )
    assert values(arguments, "-device") == [
        "pvpanic-pci",
        "vhost-user-blk-pci,chardev=disk0,num-queues=2,bootindex=1",
        "vhost-user-blk-pci,chardev=disk1,num-queues=16,bootindex=2",
        "virtio-net-pci,netdev=nic0,mac=52:59:00:00:00:01,host_mtu=1500,romfile=",
        "vhost-user-gpu-pci,chardev=gpu,queue_reset=off,max_outputs=1,xres=1280,yres=800",
        "vhost-user-input-pci,chardev=keyboard",
        "vhost-user-input-pci,chardev=mouse",
        "vhost-user-input-pci,chardev=tablet",
        "vhost-user-test-device-pci,chardev=console,virtio-id=3,num_vqs=8,config_size=12",
    ]
    assert "socket,id=disk0,path=/r,,n/disk0.sock" in values(arguments, "-chardev")
    assert values(arguments, "-netdev") == ["vhost-user,id=nic0,chardev=net,queues=1"]


def test_a_display_is_reached_by_dbus_where_that_works() -> None:
    """Only a machine with a display, in a QEMU that has that; as many monitors as asked for."""
    spec = VmSpec(name="dev", gpu=Gpu(scanouts=3, width=640, height=480))
    arguments = line(spec, devices=sockets("gpu"), has_dbus_display=True)
    assert values(arguments, "-display") == ["dbus,p2p=yes"]
    assert (
        values(arguments, "-device")[1]
        == "vhost-user-gpu-pci,chardev=gpu,queue_reset=off,max_outputs=3,xres=640,yres=480"
    )
    assert values(line(has_dbus_display=True), "-display") == ["none"]
    assert values(line(devices=sockets("gpu")), "-display") == ["none"]


def test_a_qemu_without_the_console_device_gets_plain_ports() -> None:
    """The same three ports by virtio-serial on sockets of the same console code."""
    devices = values(line(console_ports=(Path("/r/0"), Path("/r/1"), Path("/r/2"))), "-device")
    assert devices[1:] == [
        "virtio-serial-pci,id=console,max_ports=3",
        "virtconsole,chardev=port0,nr=0,name=org.rayos.console",
        "virtserialport,chardev=port1,nr=1,name=org.rayos.agent",
        "virtserialport,chardev=port2,nr=2,name=org.rayos.log",
    ]


def test_a_card_with_several_queues_has_a_vector_for_each() -> None:
    """Two a pair, one for the configuration, one for the control queue; and the MTU that was asked for."""
    arguments = line(
        VmSpec(name="dev", net=Net(mtu=9000, queues=3)), mac="52:59:00:00:00:01", devices=sockets("net")
    )
    assert values(arguments, "-netdev") == ["vhost-user,id=nic0,chardev=net,queues=3"]
    assert values(arguments, "-device")[1:] == [
        "virtio-net-pci,netdev=nic0,mac=52:59:00:00:00:01,host_mtu=9000,romfile=,mq=on,vectors=8"
    ]


def test_kernels_disks_and_firmware_are_passed_as_they_are() -> None:
    """Whatever is booted, and a VGA screen for what knows no virtio-gpu."""
    linux = line(boot=Boot(kernel=Path("/k"), initrd=Path("/i"), append="console=ttyS0 a,b"))
    assert values(linux, "-kernel") == ["/k"] and values(linux, "-initrd") == ["/i"]
    assert values(linux, "-append") == ["console=ttyS0 a,b"]
    assert "sata=off" in values(linux, "-machine")[0]
    iso = line(boot=Boot(cdrom=Path("/a,b.iso"), needs_vga=True), devices=sockets("gpu"))
    assert "ide-cd,drive=cd0,bus=ide.2,bootindex=0" in values(iso, "-device")
    assert "file.filename=/a,,b.iso" in values(iso, "-blockdev")[0]
    assert "sata=on" in values(iso, "-machine")[0]
    assert "vhost-user-vga,chardev=gpu,queue_reset=off,max_outputs=1,xres=1280,yres=800" in values(
        iso, "-device"
    )
    uefi = line(
        boot=Boot(
            firmware=Path("/code.fd"),
            firmware_kind=FirmwareKind.PFLASH,
            firmware_variables=Path("/vars.fd"),
            needs_vga=True,
        )
    )
    assert values(uefi, "-machine")[0].endswith(",pflash0=flash0,pflash1=flash1,max-fw-size=16777216")
    assert ["read-only=on" in value for value in values(uefi, "-blockdev")] == [True, False]
    bios = line(boot=Boot(firmware=Path("/b"), firmware_kind=FirmwareKind.BIOS, needs_vga=True))
    assert values(bios, "-bios") == ["/b"]


def test_the_processor_follows_the_accelerator() -> None:
    """The host's own under KVM, a plain one under TCG."""
    assert values(line(accelerator="kvm"), "-cpu") == ["host"]
    assert values(line(), "-cpu") == ["qemu64"]
    assert values(line(), "-smp") == ["2"]


def test_an_initrd_beside_a_tpm_is_booted_by_qboot() -> None:
    """SeaBIOS would have its ACPI tables overwritten by the initrd; other machines keep it."""
    linux = Boot(kernel=Path("/k"), initrd=Path("/i"))
    assert values(line(boot=linux), "-bios") == ["qboot.rom"]
    assert values(line(boot=Boot(kernel=Path("/k"))), "-bios") == []
    assert values(line(boot=Boot(kernel=Path("/k"), initrd=Path("/i"), needs_vga=True)), "-bios") == []


def test_the_ports_of_a_board_are_lines_of_the_service() -> None:
    """Each that says something has a socket that we listen on; the exit port and pvpanic have none."""
    ports = Ports(serial=2, debugcon=("0xe9", "0x402"), debug_exit="0xf4", pvpanic="isa")
    arguments = line(VmSpec(name="dev", ports=ports))
    assert values(arguments, "-serial") == ["chardev:serial", "chardev:serial2"]
    assert values(arguments, "-chardev")[1:] == [
        f"socket,id={name},fd={fd},server=on,wait=off"
        for fd, name in enumerate(("serial", "serial2", "debugcon", "debugcon2"), 11)
    ]
    assert values(arguments, "-device") == [
        "isa-debugcon,iobase=0xe9,chardev=debugcon",
        "isa-debugcon,iobase=0x402,chardev=debugcon2",
        "isa-debug-exit,iobase=0xf4,iosize=4",
        "pvpanic",
    ]


def test_a_processor_is_the_most_that_there_is_unless_it_is_ours_or_asked_for() -> None:
    """A modern kernel wants SMEP, XSAVE and RDRAND, which qemu64 has not; our guest boots faster without."""
    foreign = VmSpec(name="dev", kernel="/k")
    assert processor(SPEC, "tcg") == "qemu64" and processor(SPEC, "kvm") == "host"
    assert processor(foreign, "tcg") == "max" and processor(foreign, "kvm") == "host"
    assert processor(VmSpec(name="dev", cpu="qemu64,+vmx"), "kvm") == "qemu64,+vmx"
    assert processor(VmSpec(name="dev", machine="isapc"), "tcg") == "486"


def test_a_machine_has_the_clock_and_the_ends_that_it_asks_for() -> None:
    """QEMU ends by itself at a reset only where nothing else has to be told from it."""
    spec = VmSpec(
        name="dev", rtc="2038-01-19T03:14:00", icount=3, seed=7, on_shutdown="pause", on_reset="stop"
    )
    arguments = line(spec)
    assert values(arguments, "-rtc") == ["base=2038-01-19T03:14:00,clock=vm"]
    assert values(arguments, "-icount") == ["shift=3"] and values(arguments, "-seed") == ["7"]
    assert values(arguments, "-action") == ["reboot=shutdown,shutdown=pause,panic=pause,watchdog=reset"]
    goes_on = VmSpec(name="dev", on_reset="stop", on_triple_fault="reset")
    assert "reboot=reset" in values(line(goes_on), "-action")[0]


def test_arguments_for_qemu_itself_come_last_and_as_they_are() -> None:
    """So they win, and so one sees them."""
    assert line(VmSpec(name="dev", qemu_arguments=("-device", "edu")))[-2:] == ["-device", "edu"]


def test_a_disk_hangs_on_the_bus_that_was_asked_for() -> None:
    """QEMU's controller reads it over NBD, waits for the next worker, and tells the guest of errors as they come."""
    disks = [
        Disk(size="1MiB", bus=bus) for bus in ("ahci", "ahci", "ahci", "ide", "nvme", "usb", "scsi", "floppy")
    ]
    arguments = line(
        VmSpec(name="dev", disks=disks), devices=sockets(*(f"disk{index}" for index in range(8)))
    )
    assert values(arguments, "-blockdev")[0] == (
        "driver=nbd,node-name=disk0,read-only=off,discard=unmap,"
        "server.type=unix,server.path=/r,,n/disk0.sock,reconnect-delay=60,open-timeout=30"
    )
    ends = "rerror=report,werror=report"
    assert values(arguments, "-device")[1:] == [
        "qemu-xhci,id=usb",
        "piix3-ide,id=pata",
        "virtio-scsi-pci,id=scsi",
        "isa-fdc",
        f"ide-hd,bus=ide.0,drive=disk0,bootindex=1,serial=rayos-0,{ends}",
        f"ide-hd,bus=ide.1,drive=disk1,bootindex=2,serial=rayos-1,{ends}",
        f"ide-hd,bus=ide.3,drive=disk2,bootindex=3,serial=rayos-2,{ends}",
        f"ide-hd,bus=pata.0,unit=0,drive=disk3,bootindex=4,serial=rayos-3,{ends}",
        "nvme,drive=disk4,bootindex=5,serial=rayos-4",
        f"usb-storage,bus=usb.0,drive=disk5,bootindex=6,serial=rayos-5,{ends}",
        f"scsi-hd,bus=scsi.0,scsi-id=0,drive=disk6,bootindex=7,serial=rayos-6,{ends}",
        "floppy,unit=0,drive=disk7",
    ]
    assert values(arguments, "-global") == ["isa-fdc.bootindexA=8"]
    assert "sata=on" in values(arguments, "-machine")[0]
    large = line(
        VmSpec(name="dev", disks=[Disk(size="1MiB", bus="nvme", logical_block_size=4096)]),
        devices=sockets("disk0"),
    )
    assert "logical_block_size=4096,physical_block_size=4096" in values(large, "-device")[-1]


def test_a_card_of_another_model_sends_its_frames_to_our_worker() -> None:
    """By a stream that comes back when the worker was replaced; a virtio card may be without what is asked away."""
    emulated = line(
        VmSpec(name="dev", net=Net(model="e1000")),
        mac="52:59:00:00:00:01",
        devices={"net": Path("/r/a,b.sock")},
    )
    assert values(emulated, "-netdev") == [
        "stream,id=nic0,server=off,addr.type=unix,addr.path=/r/a,,b.sock,reconnect-ms=100"
    ]
    assert values(emulated, "-device")[-1] == "e1000,netdev=nic0,mac=52:59:00:00:00:01,romfile="
    plain = Net(offloads=False, mrg_rxbuf=False, ctrl_vq=False)
    device = values(line(VmSpec(name="dev", net=plain), devices=sockets("net")), "-device")[-1]
    for feature in ("csum", "guest_tso4", "host_tso6", "mrg_rxbuf", "ctrl_vq", "guest_announce"):
        assert f",{feature}=off" in device


def test_keyboards_and_mice_of_qemu_hang_on_usb() -> None:
    """For a kernel with an xHCI driver and no other."""
    spec = VmSpec(name="dev", input=Input(usb=("keyboard", "tablet")))
    assert values(line(spec), "-device")[1:] == [
        "qemu-xhci,id=usb",
        "usb-kbd,bus=usb.0",
        "usb-tablet,bus=usb.0",
    ]
