"""Every input that was ever interesting, and a repeatable series of changed ones, through each target.

A finding of a fuzzer is fixed and its input kept in corpus/; `python -P -m tests.fuzz.<target>` looks for more.
"""

from __future__ import annotations

from itertools import islice
from types import ModuleType

import pytest

from tests.framework.target import Footprint
from tests.fuzz import blk, message, packed, vring
from tests.fuzz.engine import corpus, mutations

TARGETS = [blk, message, packed, vring]
MUTATIONS = 20_000


def name(target: ModuleType) -> str:
    return target.__name__.rpartition(".")[2]


@pytest.mark.parametrize("target", TARGETS, ids=name)
def test_the_corpus_holds_every_seed(target: ModuleType) -> None:
    """A row of the threat model each: written by `seeds`, kept as files for any fuzzer."""
    assert {*target.seeds().values()} <= {*corpus(name(target))}


@pytest.mark.parametrize("target", TARGETS, ids=name)
def test_the_corpus_finds_nothing(target: ModuleType) -> None:
    """Nothing escapes, nothing is left open."""
    before = Footprint()
    for data in corpus(name(target)):
        target.run(data)
    before.check()


@pytest.mark.parametrize("target", TARGETS, ids=name)
def test_changed_inputs_find_nothing(target: ModuleType) -> None:
    """The same series in every run."""
    before = Footprint()
    for data in islice(mutations(name(target), seed=1), MUTATIONS):
        target.run(data)
    before.check()
