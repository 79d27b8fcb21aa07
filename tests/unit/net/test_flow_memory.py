"""Open flows in memory that outlives the process which judges."""

import random
import struct

from rayos_net.firewall.flow import FlowTable
from rayos_net.firewall.memory import ENTRY_BYTES, FLOWS, MEMORY_BYTES, FlowMemory
from rayos_net.firewall.table import Table


def table(page: memoryview) -> FlowTable:
    return FlowTable(Table(), memory=FlowMemory(page))


def test_memory_of_flows_is_bounded_and_may_hold_anything() -> None:
    """The longest unwritten flow gives way; bytes of any kind are read without a fault."""
    page = memoryview(bytearray(random.Random(1).randbytes(MEMORY_BYTES)))
    for at in range(0, MEMORY_BYTES, 3 * ENTRY_BYTES):
        page[at : at + 8] = struct.pack("<d", 1000.0)
    assert table(page).recall(999.0) <= FLOWS
    page = memoryview(bytearray(MEMORY_BYTES))
    flows = table(page)
    assert flows.recall(1.0) == 0
    keys = [(0x411, number, 2, 3, 4) for number in range(FLOWS + 100)]
    for key in keys:
        flows.judge(True, key, 1.0)
    successor = table(page)
    assert successor.recall(2.0) == FLOWS
    assert [
        successor.opener(False, (0x411, 2, number, 4, 3), 2.0) is not None for number in (0, 99, 100)
    ] == [
        False,
        False,
        True,
    ]
