"""The archive that the kernel unpacks, judged by the host's cpio."""

import subprocess
from pathlib import Path

from rayos_images.cpio import Archive


def archive() -> bytes:
    made = Archive()
    made.directory("etc")
    made.file("etc/odd", b"12345")
    made.file("init", b"#!/bin/sh\n", 0o755)
    made.symlink("bin", "usr/bin")
    made.fifo("pipe")
    made.character_device("console", 5, 1)
    return made.finish()


def test_cpio_lists_what_was_added() -> None:
    listing = subprocess.run(
        ["cpio", "-itv"], input=archive(), capture_output=True, check=True
    ).stdout.decode()
    rows = [line.split() for line in listing.splitlines()]
    assert [(row[0], row[-1]) for row in rows] == [
        ("drwxr-xr-x", "etc"),
        ("-rw-r--r--", "etc/odd"),
        ("-rwxr-xr-x", "init"),
        ("lrwxrwxrwx", "usr/bin"),
        ("prw-------", "pipe"),
        ("crw-------", "console"),
    ]
    assert "5,   1" in listing


def test_cpio_unpacks_the_same_bytes(tmp_path: Path) -> None:
    made = Archive()
    contents = {f"file{size}": bytes(range(size)) for size in range(9)}
    for name, data in contents.items():
        made.file(name, data)
    subprocess.run(["cpio", "-i", "--quiet"], input=made.finish(), cwd=tmp_path, check=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == contents


def test_equal_contents_give_equal_bytes() -> None:
    assert archive() == archive()
