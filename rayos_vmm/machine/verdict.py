"""Says from what the consoles print whether a run passed or failed.

Theory of operation: every console has a finder of its own for the same patterns, so a match never joins the output
of two. The first match of any console decides, once and for all. A pass ends the run at once; after a failure the
guest may finish its last words (a back-trace follows a panic) until it is silent for `SILENCE_S`, at most
`LAST_WORDS_S`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from rayos_vmm.config.spec import VmSpec
from rayos_vmm.machine.view import ExitReason
from rayos_vmm.shared.console_text import Finder, Found

SILENCE_S: Final = 0.5
LAST_WORDS_S: Final = 5.0

#: What kernels that are not ours print when they fail (Linux, Rust, C's assert, BSD and xv6).
DEFAULT_FAILURES: Final = (
    r"\bpanicked at\b",
    r"(?i)\bkernel panic\b",
    r"^(?:\[ *\d+\.\d+\] ?)?BUG: ",
    r"^(?:\S+ \d+: )?panic: ",
    r"^PANIC\b",
    r"(?i)\bassert(?:ion)?\b[^\n]{0,200}\bfailed\b",
)

SERIAL: Final = "serial"

Decision = tuple[ExitReason, str]


class Verdict:
    """One run of one machine.

    Raises:
        Invalid: a pattern of the specification is none.
    """

    def __init__(self, spec: VmSpec) -> None:
        wanted = spec.verdict
        defaults = DEFAULT_FAILURES if wanted.default_patterns and not spec.is_our_guest else ()
        self._kinds: Mapping[str, ExitReason] = {
            **dict.fromkeys(wanted.pass_on, ExitReason.PASSED),
            **dict.fromkeys(defaults, ExitReason.PANIC),
            **dict.fromkeys(wanted.fail_on, ExitReason.FAILED),
        }
        self._finders = {SERIAL: Finder(list(self._kinds))}  # made now, so that a wrong pattern is told now
        self.decision: Decision | None = None

    @property
    def is_wanted(self) -> bool:
        """False when there is nothing to look for."""
        return bool(self._kinds)

    def feed(self, console: str, data: bytes) -> Decision | None:
        """Returns the decision of the next bytes of a console; None when there is none, or one was made before."""
        if self.decision is not None or not self._kinds:
            return None
        finder = self._finders.get(console)
        if finder is None:
            finder = self._finders[console] = Finder(list(self._kinds))
        found = finder.feed(data)
        if found is not None:
            self.decision = self._decide(console, found)
        return self.decision

    def _decide(self, console: str, found: Found) -> Decision:
        kind = self._kinds[found.pattern]
        if kind is ExitReason.PANIC:
            return kind, f"the guest's kernel panicked: {found.line}"
        word = "pass_on" if kind is ExitReason.PASSED else "fail_on"
        return kind, f"its {console} console printed {found.line!r}, which {word} {found.pattern!r} asks for"
