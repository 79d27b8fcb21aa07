"""Run a function in a forked process that first confined itself as a worker does, and learn what came of it."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rayos_vmm.worker import sandbox


@dataclass(frozen=True, slots=True)
class Outcome:
    """`value` that was returned, or the `error` that was raised, or the `signal` that ended it."""

    value: Any = None
    error: BaseException | None = None
    signal: int = 0

    @property
    def succeeded(self) -> bool:
        return self.error is None and self.signal == 0


def attempt(probe: Callable[[], Any], bounds: sandbox.Bounds | None) -> Outcome:
    """`probe()` in a fork: confined within `bounds`, or as we are (None). What it returns is pickled."""
    read, write = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(read)
            os.setsid()
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            if bounds is not None:
                report = sandbox.confine_worker(bounds, sandbox.confine_keeper())
                missing = [name for name, layer in report.layers.items() if not layer["on"]]
                if missing:
                    raise RuntimeError(f"without {missing}: {report.layers}")
            try:
                outcome = Outcome(value=probe())
            except Exception as error:
                outcome = Outcome(error=error)
            os.write(write, pickle.dumps(outcome))
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(pid, 0)
    ended = os.waitstatus_to_exitcode(status)
    if ended < 0:
        return Outcome(signal=-ended)
    if ended:
        raise ChildProcessError(f"the probe itself failed with {ended}; it said {data!r}")
    outcome = pickle.loads(data)  # from ourselves
    assert isinstance(outcome, Outcome)
    return outcome
