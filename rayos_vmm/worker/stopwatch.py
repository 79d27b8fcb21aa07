"""Times the checks of one operation on this machine, as this process has them: compiled or not.

Each is called from Python, which every figure includes (`call`: what calling something that does nothing takes); inside
the compiled rings they cost less. The targets are those that the checks were designed for.
"""

from __future__ import annotations

import statistics
import struct
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from rayos_devices.compiled import describe
from rayos_devices.gate import Gate, Op
from rayos_devices.metrics import METRICS_BYTES, MetricsRing
from rayos_devices.native import fence, now_ns
from rayos_devices.net.filter import Filter
from rayos_devices.net.wire import HEADER_BYTES
from rayos_devices.stats import Stats
from rayos_vmm.worker.firewall import PortFirewall, Settings

RULES: Final = 256
_CALLS: Final = 2000
_ROUNDS: Final = 9
_MAC: Final = b"\x52\x59\0\0\0\1"


@dataclass(frozen=True, slots=True)
class Measured:
    """The median of several rounds, in ns a call; `target_ns` is None where none was set."""

    what: str
    ns: float
    target_ns: int | None = None

    def view(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"what": self.what, "ns": round(self.ns, 1), "target_ns": self.target_ns}


def _time(call: Callable[[], object], calls: int = _CALLS) -> float:
    rounds = []
    for _ in range(_ROUNDS):
        start = time.perf_counter_ns()
        for _ in range(calls):
            call()
        rounds.append((time.perf_counter_ns() - start) / calls)
    return statistics.median(rounds)


def _frame() -> bytes:
    """A UDP packet that leaves the guest."""
    ip = struct.pack("!BBHHHBBHII", 0x45, 0, 48, 0, 0, 64, 17, 0, 0x0A000002, 0x0A000001)
    udp = struct.pack("!HHHH", 1000, 9, 28, 0)
    return bytes(HEADER_BYTES) + b"\x52\x59\0\0\0\2" + _MAC + b"\x08\0" + ip + udp + bytes(20)


def _filter() -> Filter:
    rules: list[dict[str, Any]] = [
        {"name": f"host-{index}", "action": "deny", "to": [f"10.1.{index // 256}.{index % 256}"]}
        for index in range(RULES - 1)
    ]
    rules.append({"name": "rest", "action": "allow", "priority": 1000})
    judge = PortFirewall(_MAC, is_guarded=False, settings=Settings(rules=rules))
    return Filter(judge, is_outgoing=True)


def measure() -> Iterator[Measured]:
    """One after another; a second or two in all."""
    yield Measured("call", _time(fence))
    gate = Gate()
    index = Op.DISK_READ.index
    yield Measured("capability check", _time(lambda: gate.allows(index)), 100)
    frame = _frame()
    judged = _filter()
    judged.room[: len(frame)] = frame
    size = len(frame)
    now = now_ns()
    judged.decide(size, now)
    yield Measured(
        "firewall verdict, flow remembered (levels 1 to 3)", _time(lambda: judged.decide(size, now)), 1000
    )
    judged.is_remembering = False
    yield Measured(
        f"firewall verdict, {RULES} rules asked (level 0)", _time(lambda: judged.decide(size, now), 200)
    )
    ring = MetricsRing(memoryview(array("Q", bytes(METRICS_BYTES))).cast("B"))
    yield Measured("metrics sample written", _time(lambda: ring.write(now, 1, 2, 3, 4, 5)), 100)
    stats = Stats(Op.DISK_READ)
    yield Measured("operation counted", _time(lambda: stats.count(index, 4096)))
    yield Measured("operation timed and kept", _time(lambda: stats.sample(index, 1000, 4096, now)))
    yield Measured("stages profiled", _time(lambda: stats.profile(index, 1, 2, 3, 4)))


def how() -> str:
    """`compiled`, or `interpreted:` and why."""
    return describe()
