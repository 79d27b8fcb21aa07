"""Test results on a console become cases, whatever stands around them."""

from __future__ import annotations

from rayos_vmm.shared.tap import Case, read_tap

KTAP = """\
[    1.234567] some driver says ok 1
[    1.300000] KTAP version 1
[    1.300001] 1..2
[    1.300002]     KTAP version 1
[    1.300003]     # Subtest: list
[    1.300004]     1..3
[    1.300005]     ok 1 list_init
[    1.300006]     # list_add: EXPECTATION FAILED at lib/list-test.c:42
[    1.300007]     not ok 2 list_add
[    1.300008]     ok 3 list_del # SKIP no memory
[    1.300009] not ok 1 list
[    1.300010] ok 2 alone
"""


def test_linux_prints_its_suites_with_time_stamps() -> None:
    assert list(read_tap(KTAP.splitlines())) == [
        Case("list/list_init", is_ok=True),
        Case("list/list_add", is_ok=False, message="list_add: EXPECTATION FAILED at lib/list-test.c:42"),
        Case("list/list_del", is_ok=True, is_skipped=True, message="no memory"),
        Case("alone", is_ok=True),
    ]


def test_plain_tap_with_todo_and_a_plan_that_was_not_kept() -> None:
    lines = ["boot", "TAP version 14", "1..4", "ok 1 - one", "not ok 2 - two # TODO later", "not ok 3"]
    assert list(read_tap(lines)) == [
        Case("one", is_ok=True),
        Case("two", is_ok=True, message="later"),
        Case("test 3", is_ok=False),
        Case("plan", is_ok=False, message="4 tests were planned, 3 were seen"),
    ]


def test_what_is_no_tap_has_no_cases() -> None:
    assert list(read_tap(["ok 1 said a driver", "not ok", "Bail out! no"])) == []


def test_bailing_out_is_a_failure() -> None:
    assert list(read_tap(["1..2", "ok 1 a", "Bail out! no disk"]))[1] == Case(
        "Bail out!", is_ok=False, message="no disk"
    )
