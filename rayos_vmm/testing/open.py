"""From a few words to a ready guest, and from a failed test to what it left to look at."""

from __future__ import annotations

import secrets
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Literal

import trio

from rayos_vmm.client.client import Client
from rayos_vmm.config.disk_words import parse_disk
from rayos_vmm.config.load import Table, resolve_paths, to_spec
from rayos_vmm.errors import Conflict, NotFound, RayosError
from rayos_vmm.testing.daemon import PrivateDaemon
from rayos_vmm.testing.guest import Guest

READY_TIMEOUT_S: Final = 180.0
END_TIMEOUT_S: Final = 60.0
ARTIFACTS_TIMEOUT_S: Final = 30.0


def _disk(disk: str | Path) -> Table:
    """A disk's table; of an image the guest gets a copy, so that no test sees what another one wrote."""
    table = parse_disk(f"./{disk}" if isinstance(disk, Path) and not disk.is_absolute() else str(disk))
    return {"snapshot": True, **table} if "path" in table and not table.get("read_only") else table


async def _remove(client: Client, name: str) -> None:
    for act in (lambda: client.act(name, "kill"), lambda: client.remove(name)):
        with suppress(Conflict, NotFound):  # it had ended, or is gone
            await act()


@contextmanager
def _behind(first: BaseException | None) -> Iterator[None]:
    """A clean-up: where the block failed already, an error of this one is a note on the first."""
    try:
        yield
    except (RayosError, OSError) as error:
        if first is None:
            raise
        first.add_note(f"and its clean-up failed: {error}")


@asynccontextmanager
async def open_guest(
    daemon: PrivateDaemon,
    *,
    disk: str | Path | None = None,
    name: str | None = None,
    wait: Literal["ready", "running", "defined"] = "ready",
    timeout: float = READY_TIMEOUT_S,
    artifacts: Path | None = None,
    is_kept: bool = False,
    is_held: bool = False,
    **spec: Any,
) -> AsyncIterator[Guest]:
    """A guest, gone with its disks at the end of the block.

    Args:
        disk: `"64MiB"`, an image, `"fat:DIR"` (`config.disk_words`); the first disk, of an image a throw-away copy.
            `disks=[…]` of the specification gives more.
        wait: until it is ready (has said so), running (its kernel may not know us), or only defined.
        timeout: seconds for that.
        artifacts: where consoles, state and last frame go when the block fails.
        is_kept: a guest whose block fails runs on, and its daemon with it.
        is_held: a guest whose block fails runs on until its daemon ends, for a debugger.
        spec: keys of `VmSpec`: memory="512MiB", kernel=…, tpm=False, gpu={"enabled": False}, …

    Raises:
        RayosError: it could not be defined or started, or did not get there; artifacts are left then too.
    """
    chosen = name or f"test-{secrets.token_hex(3)}"
    table = dict(spec)
    if disk is not None:
        table["disks"] = [_disk(disk), *table.get("disks", [])]
    client = daemon.client
    wanted = resolve_paths(to_spec(chosen, table, prefix=chosen), Path.cwd())
    guest = Guest(client, await client.create(wanted), daemon.paths.vm_runtime(chosen))
    try:
        try:
            if wait != "defined":
                await client.act(chosen, "start")
                await client.wait(chosen, wait, timeout_s=timeout)
            yield guest
        except BaseException:
            if artifacts is not None:
                with trio.move_on_after(ARTIFACTS_TIMEOUT_S) as scope, suppress(RayosError, OSError):
                    scope.shield = True
                    await guest.save_artifacts(artifacts / chosen)
            if is_kept:
                daemon.kept.append(chosen)
            elif is_held:
                daemon.held.append(chosen)
            raise
    finally:
        if chosen not in (*daemon.kept, *daemon.held):
            with trio.move_on_after(END_TIMEOUT_S) as scope, _behind(sys.exc_info()[1]):
                scope.shield = True
                await _remove(client, chosen)
