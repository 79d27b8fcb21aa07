"""Our DHCP server on the lab's server side, for a test's duration."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import trio

from rayos_net.dhcp.binding import EventKind, LeaseEvent
from rayos_net.dhcp.config import SubnetConfig
from rayos_net.dhcp.service import DhcpService, serve_dhcp
from tests.integration.net.lab import Lab


@dataclass
class Serving:
    """The running service and what it told."""

    service: DhcpService
    events: list[LeaseEvent] = field(default_factory=list)

    def kinds(self) -> list[EventKind]:
        """The kinds of the events so far."""
        return [event.kind for event in self.events]

    async def until(self, kind: EventKind, *, timeout_s: float = 15.0) -> LeaseEvent:
        """Wait for an event of this kind."""
        with trio.fail_after(timeout_s):
            while True:
                for event in self.events:
                    if event.kind is kind:
                        return event
                await trio.sleep(0.02)


def subnet(lab: Lab, **changes: Any) -> SubnetConfig:
    """The lab's subnet with the usual options."""
    address = lab.address
    usual: dict[str, Any] = {
        "router": address.ip,
        "dns": (address.ip,),
        "domain": "guest.rayos",
        "ntp": (address.ip,),
        "mtu": 1400,
    }
    return SubnetConfig(address.network, changes.pop("server", address.ip), **{**usual, **changes})


@asynccontextmanager
async def serving(
    lab: Lab, config: SubnetConfig | None = None, *, store: Path | None = None, link: str = ""
) -> AsyncIterator[Serving]:
    """Serve the lab's link until the block ends."""
    events: list[LeaseEvent] = []
    start = partial(
        serve_dhcp,
        link or lab.server_link,
        config or subnet(lab),
        store=store or lab.directory / "leases.db",
        events=events.append,
    )
    async with trio.open_nursery() as nursery:
        yield Serving(await nursery.start(start), events)
        nursery.cancel_scope.cancel()


async def run(
    lab: Lab, argv: Sequence[str], *, mount_namespace: bool = False, timeout_s: float = 40.0
) -> str:
    """Run a client to its end in the client's namespace; return what it printed, fail on a status other than
    0.
    """
    with trio.fail_after(timeout_s):
        done = await trio.run_process(
            lab.in_client(argv, mount_namespace=mount_namespace),
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            cwd=lab.directory,
        )
    text: str = (done.stdout + done.stderr).decode(errors="replace")
    assert done.returncode == 0, f"{argv}: status {done.returncode}\n{text}"
    return text


def told(lab: Lab, reason: str) -> dict[str, str]:
    """Returns the variables that the client's hook was told for `reason`."""
    lines = (lab.directory / f"env.{reason}").read_text().splitlines()
    return dict(line.partition("=")[::2] for line in lines)
