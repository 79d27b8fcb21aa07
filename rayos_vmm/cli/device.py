"""Counters and limits of machines' devices, live. `rayos device serve` serves one backend alone."""

from __future__ import annotations

import argparse
from typing import Final

import msgspec

from rayos_devices.kinds import KINDS
from rayos_vmm.cli.completion import add_name
from rayos_vmm.cli.output import Output, flatten
from rayos_vmm.client.daemon import the_daemon
from rayos_vmm.config.units import parse_rate, parse_size, parse_throughput
from rayos_vmm.contract import asks, operations
from rayos_vmm.errors import Invalid
from rayos_vmm.guest.accounts import spell
from rayos_vmm.guest.view import DeviceView

_HEADER: Final = ("MACHINE", "DEVICE", "OPERATIONS", "DENIED", "BYTES", "DEPTH", "LIMITS")
_OPTIONS: Final = ("rate", "iops", "storage", "memory", "queue")


def add_device(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", metavar="list|status|stats|quota|serve", required=True)
    summaries = {
        "list": "the devices of all running machines, or of one",
        "status": "what share was allowed, why not the rest, how long it took, what bounds it",
        "stats": "every counter of a device, where its time goes, and its last operations",
        "quota": "show a device's limits, or change them: the running guest is bound at once",
        "serve": "serve one device backend for any vhost-user front end",
    }
    found = {verb: verbs.add_parser(verb, help=summary) for verb, summary in summaries.items()}
    for verb, sub in found.items():
        sub.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")
        if verb != "serve":
            add_name(sub, **({"nargs": "?"} if verb == "list" else {}))
    for verb in ("status", "stats"):
        found[verb].add_argument(
            "device", metavar="DEVICE", nargs="?", help="such as net or disk0 (default: all)"
        )
    found["stats"].add_argument(
        "--last", type=int, default=0, metavar="N", help="the last N operations that were kept, up to 256"
    )
    quota = found["quota"]
    quota.add_argument("device", metavar="DEVICE", help="such as net or disk0")
    quota.add_argument("--rate", help="net, each way: 10Mbit/s; a disk or the console: 5MiB/s; 0: unbounded")
    quota.add_argument("--iops", type=int, help="a disk's requests a second; 0: unbounded")
    quota.add_argument("--storage", help="a disk's room on the host, such as 2GiB; 0: unbounded")
    quota.add_argument("--memory", help="the GPU's, such as 64MiB, up to what the machine was given")
    quota.add_argument("--queue", type=int, help="input events that may wait, 8 to 1024")
    # `main` has seen `serve` before; here it is for the help and the completion.
    found["serve"].add_argument("kind", choices=tuple(KINDS))


def wanted_limits(args: argparse.Namespace) -> dict[str, int]:
    """The limits that the options ask for, in bytes, bytes a second, requests a second or events.

    Raises:
        Invalid: a quantity without its unit, or in one that the device does not have.
    """
    given = {option: getattr(args, option) for option in _OPTIONS if getattr(args, option) is not None}
    limits: dict[str, int] = {}
    try:
        for option, text in given.items():
            if str(text) == "0":
                limits[option] = 0
            elif option == "rate":
                limits[option] = parse_rate(text) // 8 if text.endswith("bit/s") else parse_throughput(text)
                if not limits[option]:
                    raise ValueError(f"{text!r} is less than one byte a second")
            else:
                limits[option] = parse_size(text) if option in ("storage", "memory") else text
    except ValueError as error:
        raise Invalid(str(error)) from None
    return limits


def _spelled(limits: dict[str, int], device: str) -> str:
    return " ".join(f"{name}={spell(name, value, device)}" for name, value in limits.items())


def totals(device: DeviceView) -> tuple[int, int, int]:
    """Returns the operations allowed and denied and the bytes moved, over all operations of a device."""
    figures = device.operations.values()
    return (
        sum(one.allowed for one in figures),
        sum(one.denied for one in figures),
        sum(one.bytes for one in figures),
    )


def _row(device: DeviceView) -> tuple[str, ...]:
    allowed, denied, size = totals(device)
    limits = _spelled(device.limits, device.device)
    return (
        device.vm,
        device.device,
        str(allowed),
        str(denied),
        str(size),
        str(device.depth),
        limits,
    )


def _status(device: DeviceView) -> list[tuple[str, ...]]:
    rows = []
    for name, one in device.operations.items():
        asked = one.allowed + one.denied
        if asked:
            latency = one.latency_ns
            took = [f"{latency[at] / 1000:.1f}" if latency["max"] else "-" for at in ("p50", "p99")]
            share = f"{one.allowed / asked:.2%}"
            rows.append((device.device, name, str(asked), share, str(one.denied), str(one.bytes), *took))
    return rows


def _sentences(device: DeviceView) -> list[str]:
    name = device.device
    said = [f"{name}: {_spelled(device.limits, name)}"] if device.limits else []
    if device.denials:
        said.append(f"{name}: denied " + " ".join(f"{why}={n}" for why, n in device.denials.items()))
    return said


async def run_device(args: argparse.Namespace, out: Output) -> None:
    if args.verb == "quota":
        await _quota(args, out)
        return
    client = the_daemon()
    devices: list[DeviceView]
    if args.verb == "list" and args.name is None:
        machines = (await client.call(operations.DEVICE_OVERVIEW)).machines
        devices = [device for machine in machines for device in machine.devices]
    elif args.verb != "list" and args.device is not None:
        query = asks.DeviceQuery(last=args.last if args.verb == "stats" else 0)
        devices = [await client.call(operations.DEVICE_SHOW, args.name, args.device, query=query)]
    else:
        devices = (await client.call(operations.DEVICE_LIST, args.name)).devices
    match args.verb:
        case "list":
            out.table(devices, _HEADER, [_row(device) for device in devices])
        case "status":
            header = ("DEVICE", "OPERATION", "ASKED", "ALLOWED", "DENIED", "BYTES", "P50 us <", "P99 us <")
            out.table(devices, header, [row for device in devices for row in _status(device)])
            for line in (line for device in devices for line in _sentences(device)):
                out.note(line)
        case _:
            rows = [
                row for device in devices for row in flatten({device.device: msgspec.to_builtins(device)})
            ]
            out.table(devices, ("COUNTER", "VALUE"), rows)


async def _quota(args: argparse.Namespace, out: Output) -> None:
    client, where = the_daemon(), (args.name, args.device)
    wanted = wanted_limits(args)
    if wanted:
        answer = await client.call(operations.DEVICE_SET_LIMITS, *where, body=wanted)
    else:
        answer = await client.call(operations.DEVICE_LIMITS, *where)
    limits: dict[str, int] = msgspec.to_builtins(answer)
    rows = [(name, spell(name, value, args.device)) for name, value in limits.items()]
    out.table(limits, ("LIMIT", "VALUE"), rows)
