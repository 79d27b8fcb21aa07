"""The token bucket: exact in the long run, never in debt by more than one operation. Time is an argument."""

from __future__ import annotations

import random

import pytest

from rayos_devices.bucket import BURST_SECONDS, Limiter, TokenBucket

#: Bytes a second of 1 Mbit/s, 10 Mbit/s, … 1 Gbit/s.
RATES = [125_000.0, 1_250_000.0, 12_500_000.0, 125_000_000.0]
FRAME = 1514
SEGMENT = 65_553


def drain(bucket: TokenBucket, sizes: list[int], until: float, late: float = 0.0) -> int:
    """Bytes that pass from time 0 on with always more to send; each wake-up comes up to `late` seconds late."""
    chance = random.Random(1)
    now, total, turn = 0.0, 0, 0
    while now < until:
        wait = bucket.wait(now)
        if wait > 0.0:
            now += wait + late * chance.random()
            continue
        size = sizes[turn % len(sizes)]
        turn += 1
        bucket.take(size)
        total += size
    return total


@pytest.mark.parametrize("rate", RATES, ids=lambda rate: f"{rate * 8 / 1e6:.0f}Mbit/s")
@pytest.mark.parametrize(
    "sizes", [[FRAME], [SEGMENT], [64, FRAME, SEGMENT]], ids=["frames", "segments", "mixed"]
)
@pytest.mark.parametrize("burst", [1.0, FRAME, SEGMENT, 1_250_000.0])
def test_the_long_run_rate_is_exact(rate: float, sizes: list[int], burst: float) -> None:
    """Within 2 % at every rate and any burst, beyond what the full bucket lets pass at the start."""
    seconds = max(2.0, 200 * SEGMENT / rate)
    if rate > 1e7 and sizes == [FRAME]:
        seconds = 1.0
    passed = drain(TokenBucket(rate, burst, now=0.0), sizes, seconds)
    assert passed - burst == pytest.approx(rate * seconds, rel=0.02)


@pytest.mark.parametrize("rate", RATES, ids=lambda rate: f"{rate * 8 / 1e6:.0f}Mbit/s")
def test_late_wake_ups_lose_nothing_within_the_burst(rate: float) -> None:
    """A timer that is up to 4 ms late is made up for, if the burst holds what it missed."""
    burst = max(0.01 * rate, SEGMENT)
    seconds = max(2.0, 100 * SEGMENT / rate)
    passed = drain(TokenBucket(rate, burst, now=0.0), [SEGMENT], seconds, late=0.004)
    assert passed - burst == pytest.approx(rate * seconds, rel=0.02)


def test_no_interval_passes_more_than_rate_and_burst() -> None:
    """After any pause, however long."""
    bucket = TokenBucket(1000.0, 100.0, now=0.0)
    for pause in (0.0, 1.0, 1e6):
        start = now = bucket._stamp + pause
        passed = 0
        while now < start + 2.0:
            wait = bucket.wait(now)
            now += wait
            if wait == 0.0:
                bucket.take(10)
                passed += 10
        assert passed <= 2.0 * 1000 + 100 + 10


def test_an_operation_larger_than_the_burst_passes_and_is_paid_for() -> None:
    """It must not be blocked for ever (firecracker #259)."""
    bucket = TokenBucket(100.0, 10.0, now=5.0)
    assert bucket.wait(5.0) == 0.0
    bucket.take(1000)
    assert bucket.wait(5.0) == pytest.approx(9.9)
    assert bucket.wait(14.89) > 0.0
    assert bucket.wait(14.9) == 0.0


def test_the_announced_wait_is_long_enough() -> None:
    """A timer set for it does not find the bucket a hair short, over and over."""
    chance = random.Random(2)
    for _ in range(2000):
        now = chance.uniform(0, 1e6)
        bucket = TokenBucket(chance.uniform(1, 1e9), chance.uniform(1, 1e6), now=now)
        bucket.take(chance.uniform(0, 1e7))
        now += bucket.wait(now)
        assert bucket.wait(now) == 0.0


def test_time_that_stands_or_steps_back_gives_nothing() -> None:
    """Only progress fills the bucket, and a step back does not count twice."""
    bucket = TokenBucket(10.0, 10.0, now=100.0)
    bucket.take(20)
    assert bucket.wait(100.0) == pytest.approx(1.0)
    assert bucket.wait(50.0) == pytest.approx(1.0)
    assert bucket.wait(100.5) == pytest.approx(0.5)


def test_the_rate_may_change_while_it_runs() -> None:
    """Limits are changed live; a debt is paid at the new rate."""
    bucket = TokenBucket(10.0, 10.0, now=0.0)
    bucket.take(30)
    assert bucket.wait(0.0) == pytest.approx(2.0)
    bucket.rate = 100.0
    assert bucket.wait(0.0) == pytest.approx(0.2)


@pytest.mark.parametrize(("rate", "burst"), [(0, 1), (-1, 1), (1, 0), (1, -1)])
def test_a_bucket_needs_a_rate_and_a_burst(rate: float, burst: float) -> None:
    """Both above 0."""
    with pytest.raises(ValueError, match="above 0"):
        TokenBucket(rate, burst, now=0.0)


@pytest.mark.parametrize("operations", [0.0, 50.0, 5000.0, 200_000.0])
@pytest.mark.parametrize("rate", [0.0, 1e6, 1e8])
@pytest.mark.parametrize("size", [512, 65536])
def test_a_limiter_keeps_the_tighter_of_its_two_limits(operations: float, rate: float, size: int) -> None:
    """Within 2 % in the long run; what is 0 does not limit."""
    limiter = Limiter()
    limiter.set(operations, rate, now=0.0)
    assert limiter.is_on == bool(operations or rate)
    if not limiter.is_on:
        assert limiter.wait(0.0) == 0.0
        return
    expected = min(limit for limit in (operations, rate / size) if limit)
    seconds, now, done = max(10.0, 300 / expected), 0.0, 0
    if expected > 10_000:
        seconds = 0.5
    while now < seconds:
        wait = limiter.wait(now)
        now += wait
        if not wait:
            limiter.take(size)
            done += 1
    assert done == pytest.approx(expected * seconds, rel=0.02, abs=expected * BURST_SECONDS + 2)


def test_limits_change_while_they_hold() -> None:
    """A higher limit lets a waiting operation go earlier; none lets it go at once."""
    limiter = Limiter()
    limiter.set(1.0, 0.0, now=0.0)
    for _ in range(2):
        limiter.take(512)
    assert limiter.wait(0.0) == pytest.approx(1.0)
    limiter.set(10.0, 0.0, now=0.5)
    assert limiter.wait(0.5) == pytest.approx(0.05)
    limiter.set(0.0, 0.0, now=0.5)
    assert limiter.wait(0.5) == 0.0 and not limiter.is_on
    with pytest.raises(ValueError, match="at least 0"):
        limiter.set(-1.0, 0.0, now=1.0)
