"""Fixtures of the TPM tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from rayos_tpm.spawner import open_spawner
from tests.integration.tpm.machine import Bench


@pytest.fixture
def open_bench(tmp_path: Path):  # type: ignore[no-untyped-def]
    """An async context manager that gives a Bench; pytest's own fixtures cannot be asynchronous here."""

    @asynccontextmanager
    async def opened(firmware: str = "qboot") -> AsyncIterator[Bench]:
        async with open_spawner() as spawner:
            yield Bench(tmp_path, spawner, firmware)

    return opened
