"""kill -9 while the display sends at full speed: the socket never holds half a message, so a successor goes on."""

from __future__ import annotations

import os
import random
import select
import signal
import time

from rayos_devices.gpu.backend import GpuBackend
from rayos_devices.gpu.wire import Format, Rect
from rayos_devices.loop import Loop
from tests.framework.gpu import Monitor

KILLS = 40
#: That are read of each worker at least.
MESSAGES = 10
WIDTH, HEIGHT = 500, 300


def _worker(fd: int, colour: int) -> None:
    """Show one colour for ever, with damage of every shape. Never returns."""
    loop = Loop()
    backend = GpuBackend("gpu", loop, width=WIDTH, height=HEIGHT)
    backend._table.create(1, Format.B8G8R8X8, WIDTH, HEIGHT)
    backend.heap.view[: WIDTH * HEIGHT * 4] = bytes([colour]) * (WIDTH * HEIGHT * 4)
    backend.screen.scanouts[0].resource = backend._table[1]
    backend.screen.scanouts[0].rect = Rect(0, 0, WIDTH, HEIGHT)
    backend.take_gpu_socket(fd)
    dice = random.Random(colour)
    while True:
        loop.step()
        x, y = dice.randrange(WIDTH), dice.randrange(HEIGHT)
        backend.screen.display.damage(0, Rect(x, y, dice.randint(1, WIDTH - x), dice.randint(1, HEIGHT - y)))


def test_no_kill_leaves_half_a_message() -> None:
    """40 workers in a row on one socket, each killed at a random moment; the reader never loses its place."""
    dice = random.Random(11)
    monitor, fd = Monitor.open()
    poll = select.poll()
    poll.register(monitor.sock.fileno(), select.POLLIN)
    with monitor:
        for number in range(KILLS):
            monitor.surfaces[0] = None
            monitor._unshown.clear()
            pid = os.fork()
            if pid == 0:
                try:
                    _worker(fd, number + 1)
                finally:
                    os._exit(1)
            end = time.monotonic() + 0.01 + 0.03 * dice.random()
            enough = monitor.messages + MESSAGES
            while monitor.surfaces[0] is None or monitor.messages < enough or time.monotonic() < end:
                assert poll.poll(30_000), "the worker sends nothing"
                monitor.read(dice.choice([1000, 40_000, 200_000]))
            os.kill(pid, signal.SIGKILL)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
            while monitor.read():
                pass
            assert not monitor.is_partial, f"kill {number} left half a message"
        os.close(fd)
