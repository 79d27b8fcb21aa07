"""Our NBD server, judged by other people's clients: libnbd's and QEMU's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MIB = 1 << 20


@contextmanager
def served(directory: Path, *options: str) -> Iterator[str]:
    """The URI of `directory`/disk.img, served alone."""
    address = directory / "s"
    command = [sys.executable, "-P", "-m", "rayos_devices.serve", "blk", "--nbd", *options]
    command += ["--socket", str(address), "--image", str(directory / "disk.img")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None and "serving" in server.stderr.readline()
            yield f"nbd+unix:///?socket={address}"
        finally:
            server.terminate()


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_libnbd_and_qemu_read_and_write_what_is_on_the_image(tmp_path: Path) -> None:
    """Copies in both directions with many requests on their way, zeros, holes, flushes; the image is what they say."""
    image, data, back = tmp_path / "disk.img", tmp_path / "data", tmp_path / "back"
    data.write_bytes(os.urandom(24 * MIB))
    image.write_bytes(b"x" * (32 * MIB - 100))  # its last sector is not full
    with served(tmp_path) as uri:
        info = run("nbdinfo", uri)
        assert "export-size: 33554432" in info and "can_trim: true" in info
        run("nbdcopy", "--requests=64", "--request-size=2097152", str(data), uri)
        run("nbdcopy", "--requests=16", uri, str(back))
        assert back.read_bytes() == image.read_bytes().ljust(32 * MIB, b"\0")
        assert back.read_bytes()[: 24 * MIB] == data.read_bytes()
        steps = [
            *("write -P 51 1M 3M", "write -z 2M 1M", "read -P 0 2M 1M", "read -P 51 3M 1M", "discard 1M 1M"),
            *("read -P 0 1M 1M", "write -f -P 7 0 512", "flush", "write -z -u 24M 8M", "read -P 0 31M 1M"),
        ]
        said = run("qemu-io", "-f", "raw", *(word for step in steps for word in ("-c", step)), uri)
        assert "failed" not in said and "differ" not in said
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, str(image))


def test_a_read_only_disk_says_so(tmp_path: Path) -> None:
    """The client does not even try."""
    (tmp_path / "disk.img").write_bytes(bytes(MIB))
    with served(tmp_path, "--read-only") as uri:
        assert "is_read_only: true" in run("nbdinfo", uri)
        assert run("nbdinfo", "--size", uri).strip() == str(MIB)
