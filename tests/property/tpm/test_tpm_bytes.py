"""Bytes from guests, peers and files: parsers give values or MalformedMessage, and codecs are inverse."""

from __future__ import annotations

import contextlib

from hypothesis import given, settings
from hypothesis import strategies as st

from rayos_tpm import command, control, event_log, key, pcr, quote, seal
from rayos_tpm.control import Control
from rayos_tpm.errors import MalformedMessage
from rayos_tpm.event_log import Entry, Log, Source
from rayos_tpm.journal import Journal
from rayos_tpm.measurement import Measurement
from rayos_tpm.phase import ORDER, PROFILES, Phase

digests = st.binary(min_size=32, max_size=32)
entries = st.lists(
    st.builds(
        Entry,
        pcr=st.integers(0, 23),
        digest=digests,
        source=st.sampled_from(Source),
        phase=st.just(""),
        description=st.text(max_size=40),
    ),
    max_size=20,
)


@given(entries)
def test_binary_log_keeps_registers_and_digests(listed: list[Entry]) -> None:
    """Decoding what was encoded gives the same extends in the same order."""
    events = event_log.decode(event_log.encode(listed))
    assert [(event.pcr, event.digest) for event in events] == [(entry.pcr, entry.digest) for entry in listed]
    assert pcr.replay((entry.pcr, entry.digest) for entry in listed) == event_log.replay(listed)


@given(entries, st.sampled_from(list(PROFILES)))
def test_json_log_round_trip(listed: list[Entry], profile: str) -> None:
    """A log in a file is the log."""
    log = Log("vm", profile, listed)
    assert Log.from_json(log.to_json()) == log


@given(entries, st.data())
def test_damaged_binary_log_is_refused_or_read(listed: list[Entry], data: st.DataObject) -> None:
    """A log that lost its end or had a byte changed never raises anything but MalformedMessage."""
    raw = bytearray(event_log.encode(listed))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(MalformedMessage):
        event_log.decode(bytes(raw[: data.draw(st.integers(0, len(raw)))]))


@given(st.binary(max_size=300))
def test_parsers_survive_anything(data: bytes) -> None:
    """Random bytes give values or MalformedMessage, nothing else."""
    for parse in (
        event_log.decode, Log.from_json, quote.parse_attest, quote.parse_signature, key.point_of,
        command.parse_response, control.parse_request, control.request_length,
    ):  # fmt: skip
        with contextlib.suppress(MalformedMessage):
            parse(data)
    for command_ in Control:
        with contextlib.suppress(MalformedMessage):
            control.reply_length(command_, data)


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_journal_survives_any_command_and_answer(frame: bytes, answer: bytes) -> None:
    """Whatever a guest sends, and whatever came back, the journal follows or ignores it."""
    Journal(PROFILES["seed"]).observe(frame, answer)


@given(
    st.sampled_from([0x182, 0x13C, 0x13D, 0x185]),
    st.integers(0, 30),
    st.binary(max_size=60),
    st.binary(max_size=60),
)
def test_journal_survives_watched_commands(code: int, handle: int, rest: bytes, reply: bytes) -> None:
    """The commands that it follows, with any parameters and any successful answer."""
    frame = command.HEADER.pack(0x8002, 14 + len(rest), code) + handle.to_bytes(4, "big") + rest
    answer = command.HEADER.pack(0x8002, 10 + len(reply), 0) + reply
    journal = Journal(PROFILES["seed"])
    journal.observe(frame, answer)
    assert len(journal.entries) <= 1


@given(st.lists(st.sampled_from(ORDER), max_size=30), digests)
def test_journal_replays_to_its_bank(phases: list[Phase], digest: bytes) -> None:
    """The invariant: replaying the entries gives the registers of the bank (the static ones)."""
    journal = Journal(PROFILES["seed"])
    for phase in sorted(phases, key=ORDER.index):
        journal.measure(Measurement(phase, "x", digest))
    replayed = event_log.replay(journal.entries)
    assert all(journal.bank.values[index] == replayed[index] for index in range(17))


@given(st.sets(st.integers(0, 23)))
def test_selection_bitmap_is_inverse(chosen: set[int]) -> None:
    """A selection names the registers that it was made from."""
    assert set(pcr.selected(pcr.select_bitmap(chosen))) == chosen
    assert pcr.parse_list(",".join(map(str, chosen)) or "0") == (tuple(sorted(chosen)) or (0,))


@settings(max_examples=50)
@given(st.dictionaries(st.integers(0, 23), digests, min_size=1), st.integers(0, 23), digests)
def test_seal_policy_tells_values_apart(values: dict[int, bytes], index: int, digest: bytes) -> None:
    """Another value of a chosen register is another policy."""
    changed = {**values, index: digest}
    assert (seal.policy_digest(changed) == seal.policy_digest(values)) == (changed == values)
