"""The counters of a machine's devices."""

from __future__ import annotations

import argparse

from rayos_vmm.cli.completion import add_name
from rayos_vmm.cli.output import Output, flatten
from rayos_vmm.client.daemon import the_daemon


def add_stats(parser: argparse.ArgumentParser) -> None:
    add_name(parser)


async def run_stats(args: argparse.Namespace, out: Output) -> None:
    stats = await the_daemon().stats(args.name)
    out.table(stats, ("COUNTER", "VALUE"), flatten(stats))
