"""The outcome of a translation: the table of a machine, the part of this process, the fate of each option."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from rayos_vmm.dropin.channel import Channel


class Fate(enum.Enum):
    """The fate of an option."""

    OURS = "ours"  # a part of the machine that this product serves
    HERE = "here"  # this process does it
    PASSED = "QEMU"  # given to QEMU as it is
    NOTED = "note"  # without effect, and why


@dataclass(frozen=True, slots=True)
class Became:
    """One option and what it became, in words."""

    option: str
    fate: Fate
    text: str


@dataclass(frozen=True, slots=True)
class Monitor:
    """A monitor: QMP or the human one, and where it is."""

    channel: Channel
    is_qmp: bool = False


@dataclass(frozen=True, slots=True)
class Forward:
    """A port of the host that leads to one of the guest."""

    host: str
    port: int
    guest_port: int


@dataclass
class Plan:
    """Everything that a run needs."""

    table: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, Channel] = field(default_factory=dict)  # console name: where it goes
    monitors: list[Monitor] = field(default_factory=list)
    forwards: list[Forward] = field(default_factory=list)
    log_path: str | None = None
    pid_file: str | None = None
    is_daemon: bool = False
    is_quiet: bool = False
    is_explained: bool = False
    starts_paused: bool = False
    gdb: str | None = None
    became: list[Became] = field(default_factory=list)

    def say(self, option: object, fate: Fate, text: str) -> None:
        """Records what became of an option."""
        self.became.append(Became(str(option), fate, text))

    def explain(self) -> str:
        """The table that `--explain` prints."""
        rows = [(one.option, one.fate.value, one.text) for one in self.became]
        width = min(48, max((len(row[0]) for row in rows), default=0))
        return "\n".join(f"{option:<{width}}  {fate:<5} {text}".rstrip() for option, fate, text in rows)

    def in_one_line(self) -> str:
        """The line on standard error of a run."""
        counts = {fate: sum(one.fate is fate for one in self.became) for fate in Fate}
        passed = ", ".join(one.option for one in self.became if one.fate is Fate.PASSED)
        noted = ", ".join(one.option for one in self.became if one.fate is Fate.NOTED)
        parts = [f"{counts[Fate.OURS] + counts[Fate.HERE]} options became ours"]
        parts += [f"QEMU itself has {passed}"] if passed else []
        parts += [f"without effect: {noted}"] if noted else []
        return "; ".join(parts) + " (--explain says which became what, -q silences this)"
