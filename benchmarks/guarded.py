"""A network device with the service's firewall and spoof guard before it, as a worker has it: `bench-net`'s other side.

python -P -m benchmarks.guarded --socket S (--echo | --sink) --rate BYTES [--poll-us N]
"""

from __future__ import annotations

import argparse
import signal
from pathlib import Path
from typing import Any, Final

from rayos_devices.loop import Loop
from rayos_devices.net.backend import NetBackend
from rayos_devices.net.port import EchoPort, SinkPort
from rayos_devices.serve import Listener, listen
from rayos_vmm.worker.firewall import PortFirewall, Settings

#: The card, and the address that its guest has.
MAC: Final = b"\x02\0\0\0\0\x02"
ADDRESS: Final = 0x0A000002
RULES: Final = 64


def rules() -> list[dict[str, Any]]:
    """Ports that are closed, and behind them everything open, both ways."""
    closed = [
        {"name": f"no-{port}", "action": "deny", "protocol": "tcp", "ports": [port], "priority": 1}
        for port in range(1, RULES - 1)
    ]
    opened = [{"name": way, "action": "allow", "direction": way, "priority": 2} for way in ("in", "out")]
    return [*closed, *opened]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--echo", action="store_true")
    parser.add_argument("--sink", action="store_true")
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--poll-us", type=float, default=0.0)
    arguments = parser.parse_args()
    loop = Loop()
    loop.set_polling(arguments.poll_us * 1e-6)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: loop.stop())
    judge = PortFirewall(MAC, fixed=[ADDRESS], settings=Settings(rules=rules()))
    port = EchoPort() if arguments.echo else SinkPort()
    backend = NetBackend("net", loop, port, rate_bytes_per_second=arguments.rate, judge=judge)
    listener = Listener(backend, loop, listen(arguments.socket))
    try:
        loop.run()
    finally:
        listener.close()
        backend.close()
        arguments.socket.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
