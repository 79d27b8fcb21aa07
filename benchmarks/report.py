"""Medians of interleaved runs as a table, on the terminal and appended to docs/performance.md."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from rayos_devices import compiled

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "performance.md"
BEGIN = "<!-- results: newest first, written by the benchmarks -->"


@dataclass
class Series:
    """Repeated measurements of one thing: a rate, and CPU microseconds per operation."""

    rates: list[float] = field(default_factory=list)
    cpus: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    @property
    def cpu(self) -> float:
        return statistics.median(self.cpus)

    @property
    def spread(self) -> str:
        """Half the distance between the extremes, as a part of the median."""
        return f"±{(max(self.rates) - min(self.rates)) / 2 / self.rate:.0%}" if self.rate else "-"


def _git(*words: str) -> str:
    return subprocess.run(
        ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def is_dirty() -> bool:
    """Whether anything but the results themselves differs from the commit."""
    results = RESULTS.relative_to(ROOT)
    return bool(_git("status", "--porcelain", "--untracked-files=no", "--", ".", f":!{results}"))


def command() -> str:
    """The command that runs this benchmark, as anybody can."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = spec.name if spec is not None else Path(sys.argv[0]).name
    return " ".join(["python -P -m", module.removesuffix(".__main__"), *sys.argv[1:]])


def machine() -> str:
    """Date, machine, commit, form of the code and how busy the machine was."""
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    commit = _git("rev-parse", "--short", "HEAD") + ("-dirty" if is_dirty() else "")
    return (
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {os.cpu_count()} × {cpu}, Linux {platform.release()}, "
        f"Python {platform.python_version()}, commit {commit}, {compiled.describe()}, load {os.getloadavg()[0]:.1f}"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown that also reads well on a terminal."""
    cells = [list(head), *map(list, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines)


def publish(title: str, body: str, *, append: bool = True) -> None:
    """Print a result and put it under the heading of results in docs/performance.md, with the command that made it.

    A result of a tree with changes is printed only: nobody could make it again.
    """
    where = f"`{command()}`, {machine()}"
    print(f"\n{title}\n{where}\n\n{body}")
    if append and is_dirty():
        print(
            f"\nnot written to {RESULTS.name}: the tree has changes that are not committed", file=sys.stderr
        )
    elif append:
        text = RESULTS.read_text()
        entry = f"{BEGIN}\n\n### {title}\n{where}\n\n{body}\n"
        RESULTS.write_text(text.replace(BEGIN, entry, 1))
