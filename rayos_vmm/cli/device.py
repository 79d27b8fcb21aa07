"""`rayos device serve …`: one backend alone, for any VMM that speaks vhost-user."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def add_device(parser: argparse.ArgumentParser) -> None:
    """For `rayos --help` and completion; `main` reads the arguments."""
    parser.add_argument("verb", choices=("serve",))
    parser.add_argument("kind", choices=("blk", "net", "gpu", "input", "console"))


def main(words: Sequence[str]) -> int:
    """`words` after `rayos device`; returns the exit status."""
    if list(words[:1]) != ["serve"]:
        print("usage: rayos device serve {blk,net,gpu,input,console} --socket S …", file=sys.stderr)
        return 0 if words[:1] and words[0] in ("-h", "--help") else 2
    from devices.serve import main as serve

    return serve(list(words[1:]))
