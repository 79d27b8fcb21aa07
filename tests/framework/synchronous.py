"""`python -P -m tests.framework.synchronous`: workers without io_uring, so that strace sees each call."""

from __future__ import annotations

import sys
from typing import Never

import rayos_devices.uring
from rayos_vmm.worker.spawner import main


def _refuse(*_: object) -> Never:
    raise OSError("calls are to be seen")


def no_uring() -> None:
    """From here on this process makes no io_uring."""
    rayos_devices.uring._setup = _refuse  # type: ignore[assignment]


if __name__ == "__main__":
    no_uring()
    sys.exit(main())
