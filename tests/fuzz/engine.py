"""Drives a target: its corpus, a small mutator that needs nothing, and atheris where it is installed.

atheris is no dependency of this repository: `pip install atheris` into a virtual environment of your own.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

CORPUS: Final = Path(__file__).with_name("corpus")
MAX_BYTES: Final = 4096
#: Values that parsers stumble over, little-endian.
_EDGES: Final = [
    value.to_bytes(size, "little") for size in (1, 2, 4, 8) for value in (0, 1, (1 << 8 * size) - 1)
] + [value.to_bytes(8, "little") for value in (1 << 31, 1 << 32, 1 << 55, 1 << 63, 4096, 16384)]


def corpus(name: str) -> list[bytes]:
    """Every input kept for a target, in the order of its file names."""
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]


def mutations(name: str, seed: int) -> Iterator[bytes]:
    """An endless, repeatable series of changed inputs."""
    chance = random.Random(seed)
    inputs = corpus(name)
    while True:
        data = bytearray(chance.choice(inputs))
        for _ in range(chance.randint(1, 8)):
            at = chance.randrange(len(data) + 1)
            match chance.randrange(6):
                case 0:
                    data[at : at + 1] = bytes([chance.randrange(256)])
                case 1 if at < len(data):
                    data[at] ^= 1 << chance.randrange(8)
                case 2:
                    edge = chance.choice(_EDGES)
                    data[at : at + len(edge)] = edge
                case 3:
                    del data[at : at + chance.randint(1, 16)]
                case 4:
                    other = chance.choice(inputs)
                    start = chance.randrange(len(other) + 1)
                    data[at:at] = other[start : start + chance.randint(1, 64)]
                case _:
                    data[at : at + 16] = data[chance.randrange(len(data) + 1) :][:16]
        yield bytes(data[:MAX_BYTES])


def main(name: str, run: Callable[[bytes], None]) -> None:
    """Fuzz until something raises; its input, and with atheris whatever reached more, is left in the current folder."""
    try:
        import atheris  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        _mutate(name, run, seconds=60.0)
        return
    atheris.instrument_all()
    fresh = Path(f"fuzz-{name}")
    fresh.mkdir(exist_ok=True)
    atheris.Setup([*sys.argv, str(fresh), str(CORPUS / name), f"-max_len={MAX_BYTES}"], run)
    atheris.Fuzz()


def _mutate(name: str, run: Callable[[bytes], None], *, seconds: float) -> None:
    seed = time.time_ns()
    start = time.monotonic()
    for count, data in enumerate(mutations(name, seed), 1):
        try:
            run(data)
        except BaseException:
            path = Path(f"crash-{name}-{seed}-{count}")
            path.write_bytes(data)
            print(f"{path}: fix the bug and keep this input in {CORPUS / name}", file=sys.stderr)
            raise
        if time.monotonic() > start + seconds:
            print(f"{count} inputs in {seconds:.0f} s, seed {seed}")
            return
