"""A daemon of one's own: private directories and bridge, gone without a trace at the end.

It lives for this process: when that dies, however it does, the daemon ends its machines, removes its files and ends.

Invariant: nothing of it is shared with the user's daemon but the cache of kernels and QEMU.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final

import trio

from rayos_vmm.client.client import Client
from rayos_vmm.client.daemon import KEEP, log_path, start_daemon
from rayos_vmm.errors import RayosError
from rayos_vmm.paths import Paths, default_paths
from rayos_vmm.testing.leftovers import session_mark, unique_name

END_TIMEOUT_S: Final = 20.0
LOG_TAIL_BYTES: Final = 4000


class UncleanEnd(AssertionError):
    """A private daemon did not end as it should; the text has its log."""


@dataclass(frozen=True, slots=True)
class PrivateDaemon:
    """A daemon that runs. With a guest in `kept` it stays at the end, for somebody to look; `held` ones go with it."""

    paths: Paths
    process: subprocess.Popen[bytes]
    bridge: str
    owner_fd: int
    kept: list[str] = field(default_factory=list)
    held: list[str] = field(default_factory=list)

    @property
    def client(self) -> Client:
        return Client(self.paths.api_socket)

    @property
    def directory(self) -> Path:
        """Everything that it has, and how it is ended by hand."""
        return self.paths.state.parent

    def how_to_end(self) -> str:
        """The command that ends a daemon that was kept, and its guests."""
        kill = f"RAYOS_RUNTIME_DIR={self.paths.runtime} rayos rm -f {' '.join(self.kept)}"
        return f"{kill}; kill {self.process.pid}; rm -r {self.directory}"

    def log(self) -> str:
        """Returns its log."""
        return log_path(self.paths).read_text(errors="replace")


async def _remove_machines(client: Client) -> None:
    for view in await client.machines():
        if view.pid is not None:
            await client.act(view.spec.name, "kill")
        if not view.spec.ephemeral:
            await client.remove(view.spec.name)


def _start(directory: Path) -> PrivateDaemon:
    paths = replace(default_paths(), state=directory / "state", runtime=directory / "run")
    bridge = directory.name
    config = directory / "rayos.toml"
    config.write_text(f'[service]\nbridge = "{bridge}"\n')
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        process = trio.run(partial(start_daemon, paths, ["--config", str(config)], owner_fd=reader))
    except BaseException:
        os.close(writer)
        raise
    finally:
        os.close(reader)
    return PrivateDaemon(paths, process, bridge, writer)


def _end(daemon: PrivateDaemon) -> None:
    try:
        trio.run(_remove_machines, daemon.client)
    except RayosError as error:
        daemon.process.kill()
        raise UncleanEnd(f"{error}\n{daemon.log()[-LOG_TAIL_BYTES:]}") from None
    finally:
        if daemon.process.poll() is None:
            daemon.process.send_signal(signal.SIGTERM)
        try:
            status = daemon.process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            daemon.process.kill()
            status = daemon.process.wait()
    if status != 0:
        raise UncleanEnd(f"the daemon ended with status {status}\n{daemon.log()[-LOG_TAIL_BYTES:]}")


@contextmanager
def open_private_daemon() -> Iterator[PrivateDaemon]:
    """A private daemon, for code that does not run under trio (a fixture of a whole session).

    Raises:
        RayosError: it could not start.
        UncleanEnd: it ended with an error; the text has its log.
    """
    # Not below $TMPDIR: the path of a socket has room for 107 bytes.
    directory = Path("/tmp") / unique_name(session_mark())
    directory.mkdir(mode=0o700)
    with ExitStack() as clean_up:
        clean_up.callback(shutil.rmtree, directory, ignore_errors=True)
        daemon = _start(directory)
        clean_up.callback(os.close, daemon.owner_fd)
        clean_up.callback(_end, daemon)
        try:
            yield daemon
        finally:
            if daemon.kept:
                daemon.process.returncode = 0  # it lives on without us
                with suppress(BrokenPipeError):  # somebody killed it meanwhile
                    os.write(daemon.owner_fd, KEEP)
                os.close(daemon.owner_fd)
                clean_up.pop_all()


@asynccontextmanager
async def open_daemon() -> AsyncIterator[PrivateDaemon]:
    """A private daemon, under trio. Raises as `open_private_daemon`."""
    daemon = open_private_daemon()
    opened = await trio.to_thread.run_sync(daemon.__enter__)
    try:
        yield opened
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(lambda: daemon.__exit__(None, None, None))
