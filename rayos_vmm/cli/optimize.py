"""Where a machine's time goes, what the checks cost, and how much its devices do to be fast."""

from __future__ import annotations

import argparse
from typing import Final

from rayos_devices.levels import Level
from rayos_vmm.cli.completion import add_name
from rayos_vmm.cli.output import Output
from rayos_vmm.client.daemon import the_daemon
from rayos_vmm.contract import asks, operations
from rayos_vmm.shared.packet import Stats

_LEVELS: Final = {
    Level.CHECKED: "every operation timed, every frame judged by the rules, every completion told at once",
    Level.REMEMBERING: "operations sampled, verdicts on flows remembered",
    Level.BATCHING: "completions told in batches",
    Level.POLLING: "work looked for before sleeping",
}
_STAGES: Final = ("capability", "quota", "firewall", "perform")


def add_optimize(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", metavar="status|level|profile|stats|bench", required=True)
    summaries = {
        "status": "a machine's level, and what each level does",
        "level": "switch a running machine's devices",
        "profile": "what each stage of sampled operations took",
        "stats": "what the level changes: completions told, kicks, verdicts remembered",
        "bench": "measure the checks here, beside their targets",
    }
    for verb, summary in summaries.items():
        sub = verbs.add_parser(verb, help=summary)
        sub.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")
        if verb != "bench":
            add_name(sub)
        if verb == "level":
            sub.add_argument("level", type=int, choices=tuple(map(int, Level)))


async def run_optimize(args: argparse.Namespace, out: Output) -> None:
    if args.verb == "bench":
        _bench(out)
        return
    client = the_daemon()
    match args.verb:
        case "level":
            body = asks.AskLevel(level=args.level)
            level = (await client.call(operations.DEVICE_SET_LEVEL, args.name, body=body)).level
            out.result(
                {"vm": args.name, "level": level}, f"{args.name}: level {level}, {_LEVELS[Level(level)]}"
            )
        case "status":
            query = asks.MetricsQuery(last=1)
            level = (await client.call(operations.DEVICE_METRICS, args.name, query=query)).level
            levels = {int(one): text for one, text in _LEVELS.items()}
            rows = [("*" if one == level else "", str(one), text) for one, text in levels.items()]
            out.table({"vm": args.name, "level": level, "levels": levels}, ("", "LEVEL", "ADDS"), rows)
        case "profile":
            await _profile(args.name, out)
        case _:
            await _stats(args.name, out)


async def _profile(name: str, out: Output) -> None:
    client = the_daemon()
    devices = (await client.call(operations.DEVICE_LIST, name)).devices
    found: dict[str, dict[str, dict[str, dict[str, int]]]] = {}
    rows = []
    for device in (one.device for one in devices):
        profile = (await client.call(operations.DEVICE_SHOW, name, device)).profile
        found[device] = {op: stages for op, stages in profile.items() if stages}
        for op, stages in found[device].items():
            took = [f"{stages[stage]['p50']}/{stages[stage]['p99']}" for stage in _STAGES]
            rows.append((device, op, str(stages["samples"]["kept"]), *took))
    header = ("DEVICE", "OPERATION", "SAMPLES", *(f"{stage.upper()} p50/p99 ns" for stage in _STAGES))
    out.table({"vm": name, "devices": found}, header, rows)


def effects(stats: Stats) -> list[dict[str, str | int]]:
    """By device, what a level changes: requests, kicks and calls of its queues, verdicts remembered and asked for."""
    found = []
    for device, one in stats.items():
        totals = {key: sum(queue[key] for queue in one["queues"]) for key in ("requests", "kicks", "calls")}
        cache = one.get("firewall", {}).get("cache", {})
        found.append(
            {"device": device, **totals, **{key: cache[key] for key in ("remembered", "asked") if cache}}
        )
    return found


async def _stats(name: str, out: Output) -> None:
    found = effects(await the_daemon().stats(name))
    keys = ("requests", "kicks", "calls", "remembered", "asked")
    rows = [(str(one["device"]), *(str(one.get(key, "-")) for key in keys)) for one in found]
    out.table(found, ("DEVICE", *(key.upper() for key in keys)), rows)


def _bench(out: Output) -> None:
    from rayos_vmm.worker.stopwatch import how, measure

    found = list(measure())
    rows = [
        (one.what, f"{one.ns:.0f}", "-" if one.target_ns is None else f"< {one.target_ns}") for one in found
    ]
    value = {"code": how(), "measured": [one.view() for one in found]}
    out.table(value, ("MEASURED (from Python, call included)", "NS", "TARGET NS"), rows)
    out.note(how())
