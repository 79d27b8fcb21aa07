"""The options of `rayos run` that say what a success is, and the results that it writes down."""

from __future__ import annotations

import argparse
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from rayos_vmm.cli.arguments import duration
from rayos_vmm.errors import Invalid
from rayos_vmm.machine.view import VmView
from rayos_vmm.shared.console_text import compile_pattern
from rayos_vmm.shared.tap import Case

_REACTIONS: Final = ("on_reset", "on_triple_fault", "on_shutdown")
#: XML 1.0, 2.2: characters that a document cannot hold.
_NOT_XML: Final = {code: 0xFFFD for code in range(32) if code not in (9, 10, 13)}


def add_verdict(parser: argparse.ArgumentParser) -> None:
    """The options, as a group of their own."""
    group = parser.add_argument_group(
        "the verdict (patterns are regular expressions of RE2, for any console)"
    )
    group.add_argument(
        "--timeout",
        type=duration,
        metavar="TIME",
        help="end the run after this time, status 124; for RayOS's test guest: for its boot and for COMMAND (180s)",
    )
    group.add_argument(
        "--silence",
        type=duration,
        metavar="TIME",
        help="end it after so long without output, disk or network",
    )
    group.add_argument("--pass-on", action="append", metavar="REGEX", help="a console prints this: status 0")
    group.add_argument("--fail-on", action="append", metavar="REGEX", help="a console prints this: status 22")
    group.add_argument(
        "--no-fail-patterns",
        action="store_true",
        help="a kernel that is not ours may print KERNEL PANIC, `panicked at`, BUG: and failed assertions",
    )
    group.add_argument(
        "--until-text",
        metavar="REGEX",
        help="leave the console when it prints this; with --rm end the machine",
    )
    group.add_argument(
        "--success",
        type=int,
        metavar="STATUS",
        help="the status of --debug-exit that is a success, such as 33",
    )
    group.add_argument("--on-reset", metavar="stop|reset|count=N", help="when the guest resets itself")
    group.add_argument(
        "--on-triple-fault", metavar="stop|reset|count=N", help="when the guest's processor triple-faults"
    )
    group.add_argument("--on-shutdown", choices=("stop", "pause"), help="when the guest powers itself off")
    group.add_argument(
        "--junit", type=Path, metavar="FILE", help="write the outcome, and TAP or KTAP results, as JUnit XML"
    )


def verdict_table(args: argparse.Namespace) -> dict[str, Any]:
    """The keys of `VmSpec` that the options give.

    Raises:
        Invalid: a pattern is none, or a status impossible.
    """
    if args.until_text is not None:
        compile_pattern(args.until_text)
    table: dict[str, Any] = {}
    verdict: dict[str, Any] = {}
    for key in ("pass_on", "fail_on"):
        if getattr(args, key):
            verdict[key] = getattr(args, key)
    if args.no_fail_patterns:
        verdict["default_patterns"] = False
    if args.success is not None:
        if not 1 <= args.success <= 255 or args.success % 2 == 0:
            raise Invalid(
                f"--success {args.success}: a debug exit gives (value << 1) | 1, an odd number from 1 to 255",
                hint="a kernel that writes 0x10 ends with 33",
            )
        verdict["success"] = args.success
    if verdict:
        table["verdict"] = verdict
    if args.silence is not None:
        table["watchdog"] = {"silence": f"{args.silence:.3f}s"}
    table.update({key: value for key in _REACTIONS if (value := getattr(args, key)) is not None})
    return table


def junit(view: VmView, cases: Sequence[Case], *, is_good: bool, seconds: float, output: str) -> bytes:
    """The run as a JUnit test suite: a case for its end, and one for each result that the guest printed."""
    name = view.spec.name
    failures = [case for case in cases if not case.is_ok]
    suite = ET.Element(
        "testsuite",
        name=name,
        tests=str(len(cases) + 1),
        failures=str(len(failures) + (not is_good)),
        errors="0",
        skipped=str(sum(case.is_skipped for case in cases)),
        time=f"{seconds:.3f}",
    )
    end = ET.SubElement(suite, "testcase", classname=name, name="run", time=f"{seconds:.3f}")
    if not is_good:
        reason = str(view.exit_reason or "unfinished")
        ET.SubElement(end, "failure", type=reason, message=_clean(view.reason)).text = _clean(output)
    for case in cases:
        one = ET.SubElement(suite, "testcase", classname=name, name=_clean(case.name))
        if case.is_skipped:
            ET.SubElement(one, "skipped", message=_clean(case.message))
        elif not case.is_ok:
            ET.SubElement(one, "failure", message=_clean(case.message.partition("\n")[0])).text = _clean(
                case.message
            )
    ET.SubElement(suite, "system-out").text = _clean(output)
    root = ET.Element("testsuites")
    root.append(suite)
    ET.indent(root)
    written: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return written


def _clean(text: str) -> str:
    return text.translate(_NOT_XML)
