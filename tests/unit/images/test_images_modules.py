"""Reading, ordering and trimming of kernel modules."""

import struct

import pytest

from rayos_images import ImageError
from rayos_images.modules import aliases_of, depends_of, insertion_order, name_of, trim


def test_dependencies_come_from_modinfo() -> None:
    assert depends_of(b"\x7fELF..\0license=GPL\0depends=virtio,virtio-ring\0name=x\0") == (
        "virtio",
        "virtio_ring",
    )
    assert depends_of(b"\x7fELF..\0license=GPL\0depends=\0name=x\0") == ()
    assert depends_of(b"\x7fELF") == ()


def test_names_are_those_of_the_kernel() -> None:
    assert name_of("virtio-gpu.ko") == "virtio_gpu"


def test_each_module_comes_after_all_that_it_needs() -> None:
    depends = {
        "gpu": ("kms", "virtio"),
        "kms": ("drm",),
        "drm": (),
        "virtio": ("ring",),
        "ring": (),
        "blk": ("virtio",),
    }
    assert insertion_order(["blk", "gpu"], depends) == ["ring", "virtio", "blk", "drm", "kms", "gpu"]


def test_a_needed_module_that_is_not_a_file_is_built_in() -> None:
    assert insertion_order(["ext4"], {"ext4": ("crc16", "jbd2"), "jbd2": ()}) == ["jbd2", "ext4"]


def test_a_wanted_module_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ImageError, match="module nosuch is not in this kernel package"):
        insertion_order(["nosuch"], {})


def test_a_circle_is_an_error() -> None:
    with pytest.raises(ImageError, match="a -> b -> a"):
        insertion_order(["a"], {"a": ("b",), "b": ("a",)})


def test_trimming_removes_the_signature_and_hides_the_types() -> None:
    code = b"\x7fELF code\0.text\0.BTF\0.BTF_ids\0.rela\0"
    signature = b"s" * 300
    trailer = struct.pack(">8xI", len(signature)) + b"~Module signature appended~\n"
    assert trim(code + signature + trailer) == code.replace(b"\0.BTF\0", b"\0.XTF\0")
    assert trim(b"unsigned") == b"unsigned"


def test_aliases_that_the_kernel_asks_by() -> None:
    """File systems and ciphers are found by them; the device aliases are left to our init."""
    module = b"\0alias=fs-ext4\0alias=pci:v00001AF4d*\0depends=crc16\0alias=crypto-crc32c\0"
    assert aliases_of(module) == ("fs-ext4", "crypto-crc32c")
    assert aliases_of(b"no information") == ()
