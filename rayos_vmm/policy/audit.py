"""Records of decisions, chained: each carries the digest of itself and of the one before.

A line of the file is `<sha256, 64 hex> <JSON>\\n`, with digest = SHA-256(digest before ‖ JSON) and 32 zero bytes before
the first. So a byte that is changed, cut out or swapped breaks the chain at its record. A tail cut off between two
records does not: `verify` is told an anchor, a number and digest kept elsewhere, that has to be there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from enum import StrEnum
from typing import Any, Final

import msgspec

#: Records kept in memory.
RING: Final = 1024
ZERO: Final = bytes(32)
LINE_MAXIMUM_BYTES: Final = 65536
_DIGEST_HEX: Final = 64


class Operation(StrEnum):
    """What was decided, or happened."""

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
        """The line for the next record; its number has to be the next."""
        if entry.seq != self.anchor.seq + 1:
            raise ValueError(f"record {entry.seq} after {self.anchor.seq}")
        body = msgspec.json.encode(entry)
        digest = hashlib.sha256(bytes.fromhex(self.anchor.digest) + body).hexdigest()
        self.anchor = Anchor(entry.seq, digest)
        return digest.encode() + b" " + body + b"\n"


class Verifier:
    """Lines in, entries out; raises Damage at the first that does not belong."""

    def __init__(self) -> None:
        self.anchor = Anchor()
        self.offset = 0

    def read(self, line: bytes) -> Entry:
        """The entry of a whole line (with its end)."""
        seq = self.anchor.seq + 1

        def bad(why: str) -> Damage:
            return Damage(seq, self.offset, why)

        if not line.endswith(b"\n") or len(line) > LINE_MAXIMUM_BYTES:
            raise bad(f"a line of {len(line)} bytes without an end")
        digest, body = line[:_DIGEST_HEX], line[_DIGEST_HEX + 1 : -1]
        wanted = hashlib.sha256(bytes.fromhex(self.anchor.digest) + body).hexdigest()
        if digest != wanted.encode() or line[_DIGEST_HEX : _DIGEST_HEX + 1] != b" ":
            raise bad("its digest does not follow from its content and the record before")
        try:
            entry = msgspec.json.decode(body, type=Entry)
        except msgspec.MsgspecError as error:
            raise bad(str(error)) from None
        if entry.seq != seq:
            raise bad(f"it has the number {entry.seq}")
        self.anchor = Anchor(seq, wanted)
        self.offset += len(line)
        return entry


def verify(lines: Iterable[bytes], anchors: Iterable[Anchor] = ()) -> Anchor:
    """The end of an unbroken chain that holds every anchor.

    Raises:
        Damage: where it is broken first, or where an anchor is missing.
    """
    wanted = {anchor.seq: anchor.digest for anchor in anchors if anchor.seq}
    verifier = Verifier()
    for line in lines:
        offset = verifier.offset
        seq = verifier.read(line).seq
        if wanted.pop(seq, verifier.anchor.digest) != verifier.anchor.digest:
            raise Damage(seq, offset, "it is another than the one that was recorded")
    if wanted:
        raise Damage(verifier.anchor.seq + 1, verifier.offset, f"the records up to {max(wanted)} are cut off")
    return verifier.anchor
