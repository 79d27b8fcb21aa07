"""`python -m images`: build or find everything that a guest boots from, and print where it is and how long it
took."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from rayos_images import accel, initramfs, kernel, qemu
from rayos_images.cache import Cache
from rayos_images.errors import ImageError

T = TypeVar("T")


def default_cache() -> Path:
    """Return RAYOS_CACHE_DIR, else /var/cache/rayos for root, else $XDG_CACHE_HOME/rayos."""
    if chosen := os.environ.get("RAYOS_CACHE_DIR"):
        return Path(chosen)
    if os.geteuid() == 0:
        return Path("/var/cache/rayos")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rayos"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m images", description=__doc__)
    parser.add_argument("--cache", type=Path, default=default_cache(), help="the directory (%(default)s)")
    parser.add_argument("--refresh", action="store_true", help="ask the archive for newer packages")
    options = parser.parse_args()
    cache = Cache(options.cache)

    def step(what: str, build: Callable[[], T], say: Callable[[T], str]) -> T:
        started = time.monotonic()
        print(f"{what:<12}", end="", flush=True)
        result = build()
        print(f"{say(result)}  ({time.monotonic() - started:.1f} s)", flush=True)
        return result

    try:
        machine = step(
            "qemu", lambda: qemu.find(cache, refresh=options.refresh),
            lambda found: f"{found.version} {found.source}: {found.path}"
            + (f", lacks {', '.join(found.missing)}" if found.missing else ""),
        )  # fmt: skip
        image = step(
            "kernel",
            lambda: kernel.build(cache, refresh=options.refresh),
            lambda k: f"{k.release}: {k.vmlinux}",
        )
        step("initramfs", lambda: initramfs.build(cache, image), str)
        step("accelerator", lambda: accel.probe(cache, machine), lambda a: f"{a.name}: {a.reason}")
    except ImageError as error:
        print(f"\nimages: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
