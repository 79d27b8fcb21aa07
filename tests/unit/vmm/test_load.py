"""A configuration file: nothing in it is ignored, every complaint names the key's path and the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayos_vmm.config.load import load, parse, resolve_paths
from rayos_vmm.config.spec import Disk, VmSpec
from rayos_vmm.errors import Invalid

WRONG = {
    '[vm.dev]\nmemory = "256MB"': "vm.dev.memory = '256MB': a size is a number and one of",
    "[vm.dev]\nmemry = 1": "vm.dev.memry: there is no such key",
    "[vm.dev.net]\nfoo = 1": "vm.dev.net.foo: there is no such key",
    '[[vm.dev.disks]]\nsise = "1GiB"': "vm.dev.disks[0].sise: there is no such key",
    '[vm.dev]\ncpus = "2"': "vm.dev.cpus = '2': expected `int`",
    "[vm.dev]\ncpus = 0": "vm.dev.cpus = 0: expected `int` >= 1",
    "[vm.Dev]": "vm.Dev: a name has 1 to 32",
    "[servic]": "servic: there is no such table",
    "[service]\nbridg = 1": "service.bridg: there is no such key",
    '[service]\nsubnet = "10.0.0.1/24"': "service.subnet = '10.0.0.1/24' is not an IPv4 network",
    '[service]\nidle_exit = "10"': "service.idle_exit = '10': a time is a number",
    "x =": "not TOML",
    '[vm.dev]\nmemory = "64MiB"': "vm.dev.memory = '64MiB' is too small; at least 112MiB",
    '[vm.dev]\nname = "other"': "vm.dev.name = 'other' differs",
    '[vm.dev.net]\nmac = "x"': "vm.dev.net.mac = 'x': a MAC is",
    '[vm.dev.quota]\nnet_rate = "100MBit"': "vm.dev.quota.net_rate = '100MBit': a rate is",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_file_is_refused_with_the_path_of_the_key(text: str) -> None:
    """One sentence says which key, what it was and what is allowed."""
    with pytest.raises(Invalid) as refused:
        parse(text)
    assert refused.value.message.startswith(WRONG[text])
    assert "\n" not in refused.value.message


def test_a_file_is_named_and_its_relative_paths_are_its_own(tmp_path: Path) -> None:
    """Paths in a file are meant from the file's directory, wherever the program runs."""
    file = tmp_path / "lab.toml"
    file.write_text(
        '[service]\nbridge = "lab0"\n[vm.dev]\nkernel = "bzImage"\nmemory = "1GiB"\n'
        '[[vm.dev.disks]]\nsize = "1GiB"\n[[vm.dev.disks]]\npath = "/abs/disk"\n'
    )
    config = load(file)
    dev = config.vms["dev"]
    assert dev.kernel == str(tmp_path / "bzImage")
    assert [disk.path for disk in dev.disks] == [None, "/abs/disk"]
    assert dev.memory_bytes == 1 << 30
    assert config.service.bridge == "lab0"
    file.write_text("[vm.dev]\nfoo = 1")
    with pytest.raises(Invalid) as refused:
        load(file)
    assert refused.value.message == f"{file}: vm.dev.foo: there is no such key"


def test_a_disk_with_boot_code_is_booted_and_one_without_is_data(tmp_path: Path) -> None:
    """`--disk myos.img` boots it; a partitioned data disk is a disk of our guest."""
    boots, data = tmp_path / "boots.img", tmp_path / "data.img"
    boots.write_bytes(b"\xeb\xfe" + bytes(508) + b"\x55\xaa")
    data.write_bytes(bytes(446) + b"\x80" * 64 + b"\x55\xaa")
    for name, firmware in (("boots.img", "bios"), ("data.img", None), ("none.img", None)):
        spec = resolve_paths(VmSpec(name="a", disks=[Disk(path=name)]), tmp_path)
        assert spec.firmware == firmware
        assert spec.is_our_guest is (firmware is None)
        assert spec.disks[0].path == str(tmp_path / name)


def test_multiboot_modules_are_resolved_one_by_one(tmp_path: Path) -> None:
    """Unless there is a file of that whole name."""
    spec = resolve_paths(VmSpec(name="a", kernel="k", initrd="a one,b"), tmp_path)
    assert spec.initrd == f"{tmp_path}/a one,{tmp_path}/b"
    (tmp_path / "x,y").write_bytes(b"")
    assert resolve_paths(VmSpec(name="a", kernel="k", initrd="x,y"), tmp_path).initrd == f"{tmp_path}/x,y"


def test_a_missing_file_is_an_error_of_its_own(tmp_path: Path) -> None:
    """The reason is the system's."""
    with pytest.raises(Invalid, match="No such file") as refused:
        load(tmp_path / "none.toml")
    assert refused.value.code == "file_missing"
