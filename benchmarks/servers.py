"""The servers under comparison, ours and its peers, each a process of its own on a unix socket."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import ROOT

_TICKS = os.sysconf("SC_CLK_TCK")
START_TIMEOUT = 20.0


@dataclass(frozen=True)
class Server:
    """A running server; `cpu_seconds` counts all its threads."""

    name: str
    pid: int
    path: Path
    image: Path | None = None

    @property
    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def pin(self, cpus: set[int]) -> None:
        """Let every thread run on these CPUs alone."""
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            os.sched_setaffinity(int(task.name), cpus)


@contextmanager
def alone(server: Server, servers: Sequence[Server]) -> Iterator[None]:
    """Stop all the others meanwhile: one that polls takes half of the core that they share."""
    others = [other.pid for other in servers if other is not server]
    for pid in others:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in others:
            os.kill(pid, signal.SIGCONT)


@contextmanager
def serve(
    name: str, path: Path, command: Sequence[str], image: Path | None = None, **environment: str
) -> Iterator[Server]:
    """Run `command` until the block ends; it must listen on `path`."""
    log = path.with_suffix(".log")
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=out, stderr=out, env=os.environ | environment
        )
    try:
        deadline = time.monotonic() + START_TIMEOUT
        while not path.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{name} did not start: {log.read_text()[-2000:]}")
            time.sleep(0.02)
        time.sleep(0.2)
        yield Server(name, process.pid, path, image)
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def ours(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "rayos_devices.serve", *arguments]


def qemu_storage_daemon(path: Path, image: Path, *, direct: bool = False) -> list[str]:
    cache = "on" if direct else "off"
    return [
        "qemu-storage-daemon",
        "--blockdev",
        f"driver=file,node-name=f,filename={image},aio=io_uring,locking=off,cache.direct={cache}",
        "--blockdev",
        "driver=raw,node-name=r,file=f",
        "--export",
        f"type=vhost-user-blk,id=e,node-name=r,addr.type=unix,addr.path={path},writable=on,num-queues=1",
    ]


@contextmanager
def workspace() -> Iterator[tuple[Path, ExitStack]]:
    """A directory on a real file system, and a stack for servers; both gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="rayos-bench-", dir="/var/tmp"))
    try:
        with ExitStack() as stack:
            yield folder, stack
    finally:
        shutil.rmtree(folder)


def make_image(path: Path, size_bytes: int) -> Path:
    """Random bytes on the disk, and in the page cache."""
    with path.open("wb") as file:
        for _ in range(size_bytes >> 20):
            file.write(os.urandom(1 << 20))
        file.flush()
        os.fsync(file.fileno())
    return path


def forget_cache(path: Path) -> None:
    """Write back and drop the file's pages."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def fill_cache(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 20):
            pass
