"""Records of decisions, chained: each carries the digest of itself and of the one before.

A line of the file is `<sha256, 64 hex> <JSON>\\n`, with digest = SHA-256(digest before ‖ JSON) and 32 zero bytes before
the first. So a byte that is changed, cut out or swapped breaks the chain at its record. A tail cut off between two
records does not: `verify` is told an anchor, a number and digest kept elsewhere, that has to be there. A chain that is
made anew as a whole does not either: at most CHECKPOINT_EVERY records apart, a CHECKPOINT carries an Ed25519 signature
of the number and digest before it, by a key of this installation (`audit_key`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
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


class Verified(msgspec.Struct, frozen=True):
    """An unbroken chain: its end, and the last record that a signature covers (0: none, or no key was given)."""

    anchor: Anchor
    signed: int = 0


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


def verify(lines: Iterable[bytes], anchors: Iterable[Anchor] = (), key: PublicKey | None = None) -> Verified:
    """An unbroken chain that holds every anchor, and, with a `key`, is signed by it up to CHECKPOINT_EVERY records.

    Raises:
        Damage: where it is broken first, where an anchor is missing, or a signature is wrong or missing.
    """
    wanted = {anchor.seq: anchor.digest for anchor in anchors if anchor.seq}
    verifier, signed, signed_offset = Verifier(), 0, 0
    for line in lines:
        offset, before = verifier.offset, verifier.anchor
        entry = verifier.read(line)
        if wanted.pop(entry.seq, verifier.anchor.digest) != verifier.anchor.digest:
            raise Damage(entry.seq, offset, "it is another than the one that was recorded")
        if key is not None and entry.op is Operation.CHECKPOINT:
            if not _is_signed(key, before, entry):
                raise Damage(entry.seq, offset, "its signature is not by this key")
            signed, signed_offset = before.seq, offset
    if wanted:
        raise Damage(verifier.anchor.seq + 1, verifier.offset, f"the records up to {max(wanted)} are cut off")
    if key is not None and verifier.anchor.seq - signed > CHECKPOINT_EVERY + 1:
        raise Damage(signed + 1, signed_offset, "from here on nothing is signed by this key")
    return Verified(verifier.anchor, signed)


def _is_signed(key: PublicKey, before: Anchor, entry: Entry) -> bool:
    try:
        key.verify(bytes.fromhex(str(entry.data.get("signature", ""))), before.signed_bytes())
    except (InvalidSignature, ValueError):
        return False
    return True
