"""Replies come no faster than a client's receive buffer takes them."""

from rayos_net.dhcp.pace import BURST, BURST_SECONDS, Pace


def test_a_burst_is_followed_by_what_is_left_of_its_time() -> None:
    pace = Pace()
    assert pace.pause(BURST - 1, 100.0) == 0.0
    assert pace.pause(1, 100.0) == 0.0  # the first after a rest
    assert abs(pace.pause(BURST, 100.0) - BURST_SECONDS) < 1e-9
    late = 100.0 + BURST_SECONDS * 1.5  # the pause was half a burst longer than asked
    assert abs(pace.pause(BURST, late) - BURST_SECONDS / 2) < 1e-9
    assert pace.pause(BURST, late + 2 * BURST_SECONDS) == 0.0


def test_no_second_has_more_than_its_share() -> None:
    pace, now, sent = Pace(), 0.0, 0
    while now < 1.0:
        sent += 8
        now += pace.pause(8, now)
    assert sent <= BURST / BURST_SECONDS + 2 * BURST
