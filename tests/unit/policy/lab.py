"""A policy behind the real API on a real socket, and the command line against it; no machine runs."""

from __future__ import annotations

import json
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
from rayos_vmm.policy.authority import Authority, open_authority
from rayos_vmm.policy.revisions import Revisions, load_book
from rayos_vmm.store import open_store


@dataclass(frozen=True)
class PolicyService:
    """The part of the service that the policy's endpoints ask."""

    policy: Authority
    revisions: Revisions

    @contextmanager
    def client(self) -> Iterator[None]:
        yield


@dataclass(frozen=True)
class Shell:
    """Runs `rayos` in a thread of this process."""

    service: PolicyService
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
    directory: Path, capture: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Shell]:
    """The shell of an empty policy; everything ends with it."""
    monkeypatch.setenv("RAYOS_RUNTIME_DIR", str(directory))
    shutdown = trio.Event()
    async with open_store(directory / "db") as store:
        book, kept = await load_book(store)
        async with open_authority(store, directory / "audit.log", book=book) as authority:
            service = PolicyService(authority, Revisions(store, authority, kept))
            async with trio.open_nursery() as nursery:
                path = directory / "api.sock"
                await nursery.start(partial(serve_api, cast("Any", service), path, shutdown=shutdown.wait))
                try:
                    yield Shell(service, capture)
                finally:
                    shutdown.set()
