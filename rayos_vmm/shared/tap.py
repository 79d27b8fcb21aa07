"""Test results that a guest prints: TAP 13/14 and Linux's KTAP, out of any other output.

Theory of operation: a line is read for itself, with whatever stands before it (a printk time stamp, indentation). A
result line is `ok` or `not ok`, a number, a description and perhaps `# SKIP` or `# TODO`; indented ones are inside the
next less indented result line, which names them (KTAP 1, "Subtests"; TAP 14, "Subtests"). Everything else is ignored,
but the lines just before a failed result (`# …`) are its message.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

CASES_MAXIMUM: Final = 100_000
MESSAGE_MAXIMUM_CHARACTERS: Final = 10_000

_STAMP: Final = re.compile(r"^\[ *\d+\.\d+\](?:\[ *[A-Z]\d+\])? ?")
_RESULT: Final = re.compile(r"^( *)(not )?ok\b(?: +(\d+))?(?: +(?:- *)?(.*))?$")
_DIRECTIVE: Final = re.compile(r"(?:^|\s)#\s*(skip|todo)\b[:\s]*(.*)$", re.IGNORECASE)
_VERSION: Final = re.compile(r"^ *K?TAP version \d+")
_PLAN: Final = re.compile(r"^ *1\.\.(\d+)")
_BAIL: Final = re.compile(r"^Bail out! *(.*)$")


@dataclass(frozen=True, slots=True)
class Case:
    """One result. `name` has the names of what it is inside of before it, separated by `/`."""

    name: str
    is_ok: bool
    is_skipped: bool = False
    message: str = ""


@dataclass
class _Level:
    indent: int
    cases: list[Case] = field(default_factory=list)


class TapReader:
    """Feed it lines; `cases()` is what they say so far."""

    def __init__(self) -> None:
        self._levels = [_Level(0)]
        self._comments: list[str] = []
        self._planned = 0
        self._count = 0
        self.is_tap = False

    def feed(self, line: str) -> None:
        """One line of a console, without its end."""
        line = _STAMP.sub("", line)
        if _VERSION.match(line):
            self.is_tap = True
            return
        plan = _PLAN.match(line)
        if plan is not None:
            self.is_tap = True
            if not line.startswith(" "):
                self._planned = int(plan[1])
            return
        bail = _BAIL.match(line)
        if bail is not None and self.is_tap:
            self._add(0, Case("Bail out!", is_ok=False, message=bail[1]))
            return
        result = _RESULT.match(line) if self.is_tap else None
        if result is not None:
            self._result(result)
        elif self.is_tap and line.lstrip().startswith("# ") and self._has_room():
            self._comments.append(line.strip()[2:])

    def _has_room(self) -> bool:
        return sum(map(len, self._comments)) < MESSAGE_MAXIMUM_CHARACTERS

    def _result(self, result: re.Match[str]) -> None:
        indent, name = len(result[1]), (result[4] or "").strip()
        directive = _DIRECTIVE.search(name)
        word = directive[1].lower() if directive else ""
        if directive:
            name = name[: directive.start()].strip()
        is_ok = result[2] is None or word == "todo"
        message = directive[2] if directive else "\n".join(self._comments) if not is_ok else ""
        self._comments.clear()
        case = Case(name or f"test {result[3] or self._count + 1}", is_ok, word == "skip", message)
        self._add(indent, case)

    def _add(self, indent: int, case: Case) -> None:
        if self._count >= CASES_MAXIMUM:
            return
        inner: list[Case] = []
        while self._levels[-1].indent > indent:
            inner = [*self._levels.pop().cases, *inner]
        if self._levels[-1].indent < indent:
            self._levels.append(_Level(indent))
        if inner:  # the line sums up what is inside of it
            cases = [Case(f"{case.name}/{one.name}", one.is_ok, one.is_skipped, one.message) for one in inner]
            if not case.is_ok and all(one.is_ok for one in cases):
                cases.append(case)
            self._levels[-1].cases += cases
        else:
            self._count += 1
            self._levels[-1].cases.append(case)

    def cases(self) -> list[Case]:
        """All results in their order; a plan that was not kept is a failed one."""
        found = [case for level in self._levels for case in level.cases]
        top = {case.name.partition("/")[0] for case in found} if self._planned else set()
        if self._planned > len(found) and self._planned > len(top):
            missing = f"{self._planned} tests were planned, {len(top)} were seen"
            found.append(Case("plan", is_ok=False, message=missing))
        return found


def read_tap(lines: Iterable[str]) -> Iterator[Case]:
    """The results in a whole output."""
    reader = TapReader()
    for line in lines:
        reader.feed(line)
    yield from reader.cases()
