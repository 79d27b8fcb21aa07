"""Command lines of other people's scripts parse, and every option of theirs has a fate that is said."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from rayos_vmm.config.load import to_spec
from rayos_vmm.config.spec import VmSpec
from rayos_vmm.dropin.channel import Channel
from rayos_vmm.dropin.command_line import Unreadable, parse, properties
from rayos_vmm.dropin.plan import Fate, Plan
from rayos_vmm.dropin.translate import translate
from rayos_vmm.errors import Invalid


def plan_of(line: str, *, can_network: bool = True) -> tuple[Plan, VmSpec]:
    plan = translate(shlex.split(line), can_network=can_network)
    return plan, to_spec("x", plan.table, prefix="x")


#: What each operating system's script asks of QEMU (docs/migrating.md), in its own words: (line, what it becomes).
LINES: dict[str, tuple[str, dict[str, object]]] = {
    "RayOS headless": (
        "-machine q35,graphics=on,i8042=on -m 2048 -rtc base=utc,clock=host "
        "-drive if=pflash,format=raw,readonly=on,file=OVMF_CODE.fd -drive if=virtio,format=raw,file=fat:rw:stage "
        "-device virtio-gpu-pci -vga std -display none -serial file:serial.log "
        "-monitor unix:mon.sock,server,nowait -no-reboot -net none",
        {"machine": "q35", "memory": "2GiB", "firmware": "OVMF_CODE.fd", "on_reset": "stop"},
    ),
    "RayOS volume": (
        "-machine q35 -m 2048 -drive if=none,id=v,file=vol.img,format=raw,cache=unsafe "
        "-device virtio-blk-pci,drive=v,disable-modern=on -serial file:s.log -display none",
        {"machine": "q35"},
    ),
    "RayOS bootloader": (
        "-machine q35 -m 4096 -smp 2 -cdrom rayos.iso -hda disk.img -nographic -no-shutdown "
        "-drive if=pflash,format=raw,readonly=on,file=CODE.fd -drive if=pflash,format=raw,file=VARS.fd",
        {"cpus": 2, "cdrom": "rayos.iso", "on_shutdown": "pause", "firmware": "CODE.fd"},
    ),
    "RayOS debug": (
        "-machine q35 -kernel k.elf -debugcon file:debug.log -global isa-debugcon.iobase=0x402 "
        "-d cpu_reset,int -D qemu.log -no-reboot -no-shutdown",
        {"kernel": "k.elf", "on_triple_fault": "stop"},
    ),
    "RayOS vmm": ("-cpu qemu64,+vmx -m 2G -enable-kvm -kernel k -nographic", {"cpu": "qemu64,+vmx"}),
    "RayOS linux": (
        "-kernel vmlinuz -initrd initrd -append 'console=ttyS0 quiet' -serial stdio -vga virtio -device qemu-xhci "
        "-device usb-kbd -device usb-tablet -vnc :1 -nic user,model=virtio-net-pci",
        {"initrd": "initrd", "append": "console=ttyS0 quiet", "kernel": "vmlinuz"},
    ),
    "veidongray/rayos": (
        "-m 128M -no-reboot -d int,guest_errors,mmu -D qemu.log -cdrom rayos.iso",
        {"memory": "128MiB", "cdrom": "rayos.iso"},
    ),
    "SerenityOS": (
        "-m 1G -cpu max -smp 2 -machine q35 -kernel Kernel/Prekernel -append root=/dev/sda -drive "
        "file=_disk_image,format=raw,index=0,media=disk,if=none,id=boot-drive -device ahci,id=ahci "
        "-device ide-hd,bus=ahci.0,drive=boot-drive -device virtio-vga -device virtio-serial -device virtio-rng-pci "
        "-netdev user,id=breh,hostfwd=tcp:127.0.0.1:8888-10.0.2.15:8888 -device e1000,netdev=breh "
        "-debugcon file:debug.log -serial stdio -no-reboot -qmp unix:qmp.sock,server,nowait",
        {"cpu": "max", "machine": "q35", "cpus": 2},
    ),
    "Redox": (
        "-smp 4 -m 2048 -machine q35 -cpu core2duo -drive file=harddrive.img,format=raw,if=none,id=drv0 "
        "-device nvme,drive=drv0,serial=NVME_SERIAL -netdev user,id=net0 -device e1000,netdev=net0 "
        "-device qemu-xhci -serial mon:stdio -vga std -device isa-debug-exit",
        {"cpu": "core2duo", "cpus": 4},
    ),
    "Asterinas": (
        "-cpu Icelake-Server,+x2apic -smp 1 -m 8G -machine q35 -kernel aster.elf -initrd initramfs.cpio.gz -no-reboot "
        "-nographic -serial chardev:mux -monitor chardev:mux -chardev stdio,id=mux,mux=on,signal=off "
        "-device isa-debug-exit,iobase=0xf4,iosize=0x04 -drive if=none,format=raw,id=x0,file=ext2.img "
        "-device virtio-blk-pci,bus=pcie.0,drive=x0,serial=vext2,disable-legacy=on,disable-modern=off,queue-size=64 "
        "-netdev user,id=net01,hostfwd=tcp::10022-:22 -device virtio-net-pci,netdev=net01,mrg_rxbuf=off,csum=off",
        {"memory": "8GiB", "cpu": "Icelake-Server,+x2apic"},
    ),
    "ArceOS": (
        "-machine q35 -m 128M -smp 1 -kernel arceos.elf -device virtio-blk-pci,drive=disk0 "
        "-drive id=disk0,if=none,format=raw,file=disk.img -device virtio-net-pci,netdev=net0 "
        "-netdev user,id=net0,hostfwd=tcp::5555-:5555 -nographic -D qemu.log -d in_asm",
        {"kernel": "arceos.elf"},
    ),
    "xv6-public": (
        "-nographic -drive file=fs.img,index=1,media=disk,format=raw -drive "
        "file=xv6.img,index=0,media=disk,format=raw -smp 2 -m 512",
        {"machine": "pc", "cpus": 2, "firmware": "bios"},
    ),
    "MOROS": (
        "-m 32 -cpu max -drive file=disk.img,format=raw -netdev user,id=e0,hostfwd=tcp::8080-:80 "
        "-device rtl8139,netdev=e0 -display none -serial stdio "
        "-device isa-debug-exit,iobase=0xf4,iosize=0x04",
        {"memory": "32MiB", "cpu": "max"},
    ),
    "blog_os": (
        "-drive format=raw,file=bootimage.bin -device isa-debug-exit,iobase=0xf4,iosize=0x04 -serial stdio "
        "-display none",
        {"firmware": "bios", "memory": "128MiB"},
    ),
    "Kerla": (
        "-m 512 -cpu Icelake-Server -kernel kerla.elf -serial mon:stdio -no-reboot -nic user,model=virtio-net-pci "
        "-device isa-debug-exit,iobase=0x501,iosize=2 -d guest_errors,unimp",
        {"kernel": "kerla.elf"},
    ),
    "nanos": (
        "-machine q35 -cpu max -m 1G -drive if=none,id=hd0,format=raw,file=image -device virtio-scsi-pci,id=scsi0 "
        "-device scsi-hd,bus=scsi0.0,drive=hd0 -device virtio-net,netdev=n0 -netdev user,id=n0 -display none "
        "-serial stdio -device isa-debug-exit -no-reboot -device virtio-balloon-pci",
        {"machine": "q35"},
    ),
    "Hermit": (
        "-smp 1 -m 64M -cpu Skylake-Client -kernel loader -initrd app -display none -serial stdio "
        "-device isa-debug-exit,iobase=0xf4,iosize=0x04 -netdev user,id=u1,net=192.168.76.0/24,hostfwd=tcp::9975-:9975 "
        "-device virtio-net-pci,netdev=u1,packed=on,mq=on",
        {"memory": "64MiB"},
    ),
    "HelenOS": (
        "-cdrom image.iso -boot d -nic user,model=ne2k_pci -usb -device intel-hda -device hda-duplex -serial stdio",
        {"cdrom": "image.iso"},
    ),
    "limine-c-template": (
        "-M q35 -m 2G -drive if=pflash,unit=0,format=raw,file=OVMF.fd,readonly=on -cdrom t.iso",
        {"firmware": "OVMF.fd"},
    ),
    "MentOS": (
        "-vga std -m 1096M -nodefaults -serial stdio -cdrom mentos.iso -device isa-debug-exit -hda rootfs.img",
        {"memory": "1096MiB"},
    ),
    "Theseus": (
        "-m 512M -smp 2 -cpu Broadwell -no-reboot -no-shutdown -cdrom theseus.iso -drive id=my,file=rand.img,if=none "
        "-device ahci,id=ahci -device ide-hd,drive=my,bus=ahci.0 -net none -serial mon:stdio -d int",
        {"cpu": "Broadwell"},
    ),
    "OSv": (
        "-m 2G -smp 4 -device virtio-blk-pci,id=b,bootindex=0,drive=hd0,scsi=off -drive file=usr.img,if=none,id=hd0 "
        "-netdev user,id=un0,net=192.168.122.0/24 -device virtio-net-pci,netdev=un0 -device virtio-rng-pci "
        "-no-shutdown -nographic",
        {"on_shutdown": "pause"},
    ),
    "ToaruOS": (
        "-kernel toaru -initrd 'a.ko,b.ko,ramdisk' -m 1G -vga std -device AC97 -rtc base=localtime -serial stdio "
        "-nic user,model=rtl8139 -hda disk.img",
        {"initrd": "a.ko,b.ko,ramdisk", "rtc": "localtime"},
    ),
}


@pytest.mark.parametrize("name", LINES)
def test_the_line_of_an_operating_system_is_a_machine(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a specification that holds, every option is explained once, and one line says it in short."""
    monkeypatch.chdir(tmp_path)
    line, wanted = LINES[name]
    plan, spec = plan_of(line)
    assert {key: getattr(spec, key) for key in wanted} == wanted
    explained = [one.option for one in plan.became]
    asked = [str(option) for option in parse(shlex.split(line))]
    assert sorted(explained) == sorted(asked), set(asked) ^ set(explained)
    assert plan.explain().count("\n") == len(asked) - 1
    assert "\n" not in plan.in_one_line()


@pytest.mark.parametrize(
    ("line", "buses"),
    [
        ("-hda a.img", ["ide"]),
        ("-machine q35 -hda a.img", ["ahci"]),
        ("-drive if=virtio,file=a.img", ["virtio"]),
        ("-drive if=none,id=n,file=a.img -device nvme,drive=n", ["nvme"]),
        ("-drive if=none,id=n,file=a.img -device usb-storage,drive=n", ["usb"]),
        ("-drive if=none,id=n,file=a.img -device scsi-hd,drive=n", ["scsi"]),
        ("-device ahci,id=ahci -drive if=none,id=n,file=a.img -device ide-hd,drive=n,bus=ahci.0", ["ahci"]),
        ("-fda a.img", ["floppy"]),
        (
            "-blockdev file,node-name=f,filename=a.img -blockdev raw,node-name=d,file=f -device virtio-blk,drive=d",
            ["virtio"],
        ),
        ("a.img", ["ide"]),
    ],
)
def test_a_disk_is_on_the_bus_where_the_guest_looks_for_it(line: str, buses: list[str]) -> None:
    _, spec = plan_of(line)
    assert [disk.bus for disk in spec.disks] == buses


def test_disks_are_in_the_order_of_their_index_and_snapshot_is_for_all() -> None:
    _, spec = plan_of("-drive file=fs.img,index=1 -drive file=xv6.img,index=0 -snapshot")
    assert [disk.path for disk in spec.disks] == ["xv6.img", "fs.img"]
    assert all(disk.snapshot for disk in spec.disks)


@pytest.mark.parametrize(
    ("line", "lines"),
    [
        ("", {"serial": Channel("null")}),
        ("-nographic", {"serial": Channel("stdio", is_mux=True)}),
        ("-nographic -monitor none", {"serial": Channel("stdio")}),
        ("-serial mon:stdio", {"serial": Channel("stdio", is_mux=True)}),
        ("-serial file:a -serial stdio", {"serial": Channel("file", "a"), "serial2": Channel("stdio")}),
        ("-serial unix:/s,server,nowait", {"serial": Channel("unix", "/s", is_server=True)}),
        ("-serial tcp:localhost:4444", {"serial": Channel("tcp", host="localhost", port=4444)}),
        ("-chardev file,id=c,path=a -serial chardev:c", {"serial": Channel("file", "a")}),
        ("-nodefaults -debugcon file:d", {"debugcon": Channel("file", "d")}),
    ],
)
def test_each_line_goes_where_it_is_asked_to(line: str, lines: dict[str, Channel]) -> None:
    plan, _ = plan_of(line)
    assert plan.lines == lines


def test_the_defaults_are_those_of_qemu() -> None:
    """The old board, no TPM, resets that go on, and a panic that is only text."""
    _, spec = plan_of("-kernel k")
    assert (spec.machine, spec.memory, spec.tpm, spec.net.enabled) == ("pc", "128MiB", False, False)
    assert (spec.on_reset, spec.on_triple_fault, spec.verdict.default_patterns) == ("reset", "reset", False)


def test_a_card_is_ours_where_taps_may_be_and_else_qemus() -> None:
    line = "-netdev user,id=n,hostfwd=tcp::5555-:80 -device rtl8139,netdev=n"
    plan, spec = plan_of(line)
    assert (spec.net.model, plan.forwards[0].port, plan.forwards[0].guest_port) == ("rtl8139", 5555, 80)
    plan, spec = plan_of(line, can_network=False)
    assert not spec.net.enabled
    assert "rtl8139,netdev=n,romfile=" in spec.qemu_arguments
    assert {one.fate for one in plan.became} == {Fate.PASSED}


def test_what_nobody_knows_goes_to_qemu_as_it_is() -> None:
    plan, spec = plan_of("-device edu,id=e -fw_cfg name=opt/x,string=y")
    assert spec.qemu_arguments == ("-fw_cfg", "name=opt/x,string=y", "-device", "edu,id=e")
    assert [one.fate for one in plan.became] == [Fate.PASSED, Fate.PASSED]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("-loadvm s", "-loadvm s: refused"),
        ("-m 12X", "no size"),
        ("-smp x", "no number of processors"),
        ("-serial chardev:none", "no -chardev with that id"),
        ("-drive if=none,id=a,file=x", "no -device has this drive"),
        ("-netdev user,id=n,hostfwd=udp::1-:2 -device e1000,netdev=n", "only tcp is forwarded"),
    ],
)
def test_what_cannot_be_is_refused_by_name(line: str, sentence: str) -> None:
    with pytest.raises(Invalid, match=sentence):
        plan_of(line)


def test_an_image_whose_format_is_not_said_is_not_guessed(tmp_path: Path) -> None:
    (tmp_path / "a.img").write_bytes(b"QFI\xfb" + bytes(600))
    with pytest.raises(Invalid, match="looks like qcow2"):
        plan_of(f"-hda {tmp_path}/a.img")


def test_an_option_without_its_value_is_said_as_qemu_says_it() -> None:
    with pytest.raises(Unreadable, match="-kernel: requires an argument"):
        parse(["-kernel"])


def test_a_doubled_comma_is_one() -> None:
    assert properties("file=a,,b,if=ide,server,nowait", "x") == {
        "file": "a,b",
        "if": "ide",
        "server": "on",
        "wait": "off",
    }
