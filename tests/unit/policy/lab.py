"""A policy behind the real API on a real socket, and the command line against it; no machine runs."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import trio

from rayos_vmm.api.server import serve_api
from rayos_vmm.cli.main import main
from rayos_vmm.errors import NotFound
from rayos_vmm.events import EventLog
from rayos_vmm.machine.machine import Machine
from rayos_vmm.policy.authority import Authority, open_authority
from rayos_vmm.policy.gatekeeper import Gatekeeper, open_gatekeeper
from rayos_vmm.policy.revisions import Revisions, load_book
from rayos_vmm.service.connections import ConnectionCounts
from rayos_vmm.service.store import open_store
from rayos_vmm.service.workers import Workers


def _nobody(name: str) -> Machine:
    raise NotFound(f"there is no machine {name!r}")


@dataclass(frozen=True)
class PolicyService:
    """The part of the service that the policy's endpoints ask."""

    policy: Authority
    revisions: Revisions
    gatekeeper: Gatekeeper
    workers: Workers
    connections: ConnectionCounts

    @contextmanager
    def client(self) -> Iterator[None]:
        yield


@dataclass(frozen=True)
class Shell:
    """Runs `rayos` in a thread of this process."""

    service: PolicyService
    shared: Path
    capture: pytest.CaptureFixture[str]

    async def rayos(self, *words: str, status: int = 0) -> str:
        """Its output, and its errors when it should fail."""
        self.capture.readouterr()
        found = await trio.to_thread.run_sync(main, list(words))
        said = self.capture.readouterr()
        assert found == status, f"{words}: {found}\n{said.out}\n{said.err}"
        return said.err if status else said.out

    async def json(self, *words: str) -> Any:
        return json.loads(await self.rayos(*words, "--json"))


@asynccontextmanager
async def open_shell(
    directory: Path,
    capture: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    *,
    is_shared: bool = False,
) -> AsyncIterator[Shell]:
    """The shell of an empty policy, and a socket for everybody if asked; everything ends with it."""
    monkeypatch.setenv("RAYOS_RUNTIME_DIR", str(directory))
    shutdown = trio.Event()
    async with open_store(directory / "db") as store:
        book, kept = await load_book(store)
        async with open_authority(
            store, directory / "audit.log", book=book, key_path=directory / "audit.key"
        ) as authority:
            gatekeeper = await open_gatekeeper(
                store, directory / "token.key", authority.audit, zone_of=book.zone_of, now=authority.now
            )
            workers = Workers(list, _nobody, EventLog())
            service = PolicyService(
                authority, Revisions(store, authority, kept), gatekeeper, workers, ConnectionCounts()
            )
            async with trio.open_nursery() as nursery:
                path, shared = directory / "api.sock", Path("/tmp") / f"{directory.name}-{os.getpid()}.sock"
                serve = partial(serve_api, cast("Any", service), path, shutdown=shutdown.wait)
                await nursery.start(partial(serve, shared=shared if is_shared else None))
                try:
                    yield Shell(service, shared, capture)
                finally:
                    shutdown.set()
