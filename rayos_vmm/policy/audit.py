"""Records of decisions, chained: each carries the digest of itself and of the one before.

A line of the file is `<sha256, 64 hex> <JSON>\\n`, with digest = SHA-256(digest before ‖ JSON) and 32 zero bytes before
the first. So a byte that is changed, cut out or swapped breaks the chain at its record. A tail cut off between two
records does not: `verify` is told an anchor, a number and digest kept elsewhere, that has to be there. A chain that is
made anew as a whole does not either: at most CHECKPOINT_EVERY records apart, a CHECKPOINT carries an Ed25519 signature
of the number and digest before it, by a key of this installation (`audit_key`).

The chain goes on over the files (segments) that it is kept in. The first record of each but the first is a SEGMENT: it
says the digest before it, so that it can be verified without the segments before, and which record is the first kept.

Invariant: no line is made that `Verifier` would not read: `fitted` bounds whatever callers put into a record.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any, Final, Protocol

import msgspec
from cryptography.exceptions import InvalidSignature

#: Records kept in memory.
RING: Final = 1024
ZERO: Final = bytes(32)
LINE_MAXIMUM_BYTES: Final = 65536
#: So many records at most are not signed.
CHECKPOINT_EVERY: Final = 256
#: Bounds of what a record holds: characters of a text, items of a list or mapping, levels, bytes in all.
TEXT_MAXIMUM: Final = 512
ITEMS_MAXIMUM: Final = 64
DEPTH_MAXIMUM: Final = 4
RECORD_MAXIMUM_BYTES: Final = 16384
_DIGEST_HEX: Final = 64
_DOMAIN: Final = b"rayos audit checkpoint 1\0"


class Operation(StrEnum):
    """The kind of a decision or an event."""

    GRANT = "GRANT"
    REVOKE = "REVOKE"
    EXPIRE = "EXPIRE"
    DELEGATE = "DELEGATE"
    CHECK_PASS = "CHECK_PASS"
    CHECK_FAIL = "CHECK_FAIL"
    POLICY = "POLICY"
    DEFINE = "DEFINE"
    REMOVE = "REMOVE"
    STATE = "STATE"
    INPUT = "INPUT"
    CHECKPOINT = "CHECKPOINT"
    SEGMENT = "SEGMENT"
    RESTART = "RESTART"


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A record: `time` in seconds since the epoch, `steady` of this boot; so many were `lost` just before it."""

    seq: int
    time: float
    steady: float
    op: Operation
    vm: str = ""
    allowed: bool = True
    data: dict[str, Any] = {}
    lost: int = 0


class Anchor(msgspec.Struct, frozen=True):
    """A place in the chain: the last record's number and digest (hex); number 0 is the start."""

    seq: int = 0
    digest: str = ZERO.hex()

    def signed_bytes(self) -> bytes:
        """Returns the bytes that a checkpoint signs."""
        return _DOMAIN + self.seq.to_bytes(8, "big") + bytes.fromhex(self.digest)


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """The end of the record at a moment (seconds since the epoch), signed (hex), to be kept elsewhere."""

    seq: int
    digest: str
    time: float
    signature: str

    @property
    def anchor(self) -> Anchor:
        return Anchor(self.seq, self.digest)


class Verified(msgspec.Struct, frozen=True):
    """An unbroken chain: its end, the last record that a signature covers (0: none, or no key was given), its first."""

    anchor: Anchor
    signed: int = 0
    first: int = 1


class PublicKey(Protocol):
    """Of Ed25519 (`cryptography`)."""

    def verify(self, signature: bytes, data: bytes) -> None: ...


class Damage(Exception):
    """The chain is broken. `seq` is the first bad record, `offset` where it begins in the file (bytes)."""

    def __init__(self, seq: int, offset: int, why: str) -> None:
        super().__init__(f"record {seq}, at byte {offset}: {why}")
        self.seq = seq
        self.offset = offset


class Chain:
    """The end of a chain, to which lines are added."""

    def __init__(self, anchor: Anchor | None = None) -> None:
        self.anchor = anchor or Anchor()

    def add(self, entry: Entry) -> bytes:
        """The line for the next record; its number has to be the next, and its data as `fitted` leaves them."""
        if entry.seq != self.anchor.seq + 1:
            raise ValueError(f"record {entry.seq} after {self.anchor.seq}")
        body = msgspec.json.encode(entry)
        if len(body) > LINE_MAXIMUM_BYTES - _DIGEST_HEX - 2:
            raise ValueError(f"a record of {len(body)} bytes")
        digest = hashlib.sha256(bytes.fromhex(self.anchor.digest) + body).hexdigest()
        self.anchor = Anchor(entry.seq, digest)
        return digest.encode() + b" " + body + b"\n"


class Verifier:
    """Lines in, entries out; raises Damage at the first that does not belong. `offset` counts from the first line."""

    def __init__(self) -> None:
        self.anchor = Anchor()
        self.offset = 0
        self.first = 0

    def read(self, line: bytes) -> Entry:
        """The entry of a whole line (with its end)."""

        def bad(why: str) -> Damage:
            return Damage(self.anchor.seq + 1, self.offset, why)

        if not line.endswith(b"\n") or len(line) > LINE_MAXIMUM_BYTES:
            raise bad(f"a line of {len(line)} bytes without an end")
        digest, body = line[:_DIGEST_HEX], line[_DIGEST_HEX + 1 : -1]
        if not self.first:
            self.anchor = _before(body)
        wanted = hashlib.sha256(bytes.fromhex(self.anchor.digest) + body).hexdigest()
        if digest != wanted.encode() or line[_DIGEST_HEX : _DIGEST_HEX + 1] != b" ":
            raise bad("its digest does not follow from its content and the record before")
        try:
            entry = msgspec.json.decode(body, type=Entry)
        except msgspec.MsgspecError as error:
            raise bad(str(error)) from None
        if entry.seq != self.anchor.seq + 1:
            raise bad(f"it has the number {entry.seq}")
        self.anchor = Anchor(entry.seq, wanted)
        self.offset += len(line)
        self.first = self.first or entry.seq
        return entry


def _before(body: bytes) -> Anchor:
    """The place that a first line goes on from: the start, unless it begins a later segment."""
    try:
        entry = msgspec.json.decode(body, type=Entry)
        digest = str(entry.data.get("digest", ""))
        if entry.op is Operation.SEGMENT and entry.seq > 1 and len(bytes.fromhex(digest)) == len(ZERO):
            return Anchor(entry.seq - 1, digest)
    except (msgspec.MsgspecError, ValueError):
        pass
    return Anchor()


def verify(
    lines: Iterable[bytes],
    anchors: Iterable[Anchor] = (),
    key: PublicKey | None = None,
    *,
    is_whole: bool = True,
) -> Verified:
    """An unbroken chain that holds every anchor, and, with a `key`, is signed by it up to CHECKPOINT_EVERY records.

    Anchors from before its first record are left out: the segments that held them were removed, as the last SEGMENT
    says, or are not among the lines, which are then not `is_whole`.

    Raises:
        Damage: where it is broken first, where an anchor is missing, or a signature is wrong or missing.
    """
    places = sorted({(anchor.seq, anchor.digest) for anchor in anchors if anchor.seq})
    verifier, signed, signed_offset, kept_from, at = Verifier(), 0, 0, 1, 0
    for line in lines:
        offset, before = verifier.offset, verifier.anchor
        entry = verifier.read(line)
        if before.seq + 1 != entry.seq:  # the first line of a later segment
            before = Anchor(entry.seq - 1, str(entry.data["digest"]))
            signed = before.seq
        if entry.op is Operation.SEGMENT:
            kept_from = int(entry.data.get("kept_from", 1))
        while at < len(places) and places[at][0] <= entry.seq:
            if places[at][0] == entry.seq and places[at][1] != verifier.anchor.digest:
                raise Damage(entry.seq, offset, "it is another than the one that was recorded")
            at += 1
        if key is not None and entry.op is Operation.CHECKPOINT:
            if not _is_signed(key, before, entry):
                raise Damage(entry.seq, offset, "its signature is not by this key")
            signed, signed_offset = before.seq, offset
    if at < len(places):
        raise Damage(
            verifier.anchor.seq + 1, verifier.offset, f"the records up to {places[-1][0]} are cut off"
        )
    if is_whole and verifier.first > kept_from:
        raise Damage(kept_from, 0, f"the records up to {verifier.first - 1} are cut off")
    if key is not None and verifier.anchor.seq - signed > CHECKPOINT_EVERY + 1:
        raise Damage(signed + 1, signed_offset, "from here on nothing is signed by this key")
    return Verified(verifier.anchor, signed if key is not None else 0, verifier.first or 1)


def is_signed(key: PublicKey, anchor: Anchor, signature: str) -> bool:
    """Whether a signature (hex) is of this place, by this key."""
    try:
        key.verify(bytes.fromhex(signature), anchor.signed_bytes())
    except (InvalidSignature, ValueError):
        return False
    return True


def _is_signed(key: PublicKey, before: Anchor, entry: Entry) -> bool:
    return is_signed(key, before, str(entry.data.get("signature", "")))


def fitted(value: Any, depth: int = DEPTH_MAXIMUM) -> Any:
    """The value within what a record may hold: text, lists and mappings cut with the number that is missing."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if abs(value) < 1 << 63 else str(value)[:TEXT_MAXIMUM]
    if isinstance(value, float):
        return value
    if isinstance(value, Mapping) and depth:
        some = list(value.items())[:ITEMS_MAXIMUM]
        kept = {fitted(str(name)): fitted(item, depth - 1) for name, item in some}
        return kept | ({"…": f"{len(value) - len(some)} more"} if len(value) > len(some) else {})
    if isinstance(value, list | tuple) and depth:
        more = [f"… {len(value) - ITEMS_MAXIMUM} more"] if len(value) > ITEMS_MAXIMUM else []
        return [fitted(item, depth - 1) for item in value[:ITEMS_MAXIMUM]] + more
    text = (value if isinstance(value, str) else repr(value)).encode("utf-8", "replace").decode()
    return text if len(text) <= TEXT_MAXIMUM else f"{text[:TEXT_MAXIMUM]}… {len(text) - TEXT_MAXIMUM} more"


def fitted_data(data: Mapping[str, Any]) -> dict[str, Any]:
    """The data of a record within its bounds; beyond RECORD_MAXIMUM_BYTES in all, what is small of them."""
    kept: dict[str, Any] = fitted(data)
    size = len(msgspec.json.encode(kept))
    if size <= RECORD_MAXIMUM_BYTES:
        return kept
    small = {name: item for name, item in kept.items() if len(msgspec.json.encode(item)) <= TEXT_MAXIMUM}
    if len(msgspec.json.encode(small)) > RECORD_MAXIMUM_BYTES:
        small = {}
    return {**small, "left_out": f"{size} bytes exceed {RECORD_MAXIMUM_BYTES}"}
