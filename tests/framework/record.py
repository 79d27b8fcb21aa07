"""Tampering with the audit record as somebody would who has the whole host."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from rayos_vmm.policy.audit import Chain, Entry, Operation
from rayos_vmm.policy.audit_key import load_private


def told_anew(lines: Iterable[bytes], key: Ed25519PrivateKey | None = None) -> tuple[list[bytes], Chain]:
    """The same records with machine `b` for `a`, in a right chain; signed anew if there is a key."""
    chain, told = Chain(), []
    for line in lines:
        entry = msgspec.json.decode(line[65:], type=Entry)
        if entry.op is Operation.CHECKPOINT and key is not None:
            entry.data["signature"] = key.sign(chain.anchor.signed_bytes()).hex()
        told.append(chain.add(msgspec.structs.replace(entry, vm="b" if entry.vm == "a" else entry.vm)))
    return told, chain


def rewrite(state: Path) -> None:
    """Record, key and store of a state directory are told anew, and agree."""
    (state / "audit.key").unlink()
    key = load_private(state / "audit.key")
    told, chain = told_anew((state / "audit.log").read_bytes().splitlines(keepends=True), key)
    (state / "audit.log").write_bytes(b"".join(told))
    with closing(sqlite3.connect(state / "rayos.db")) as store, store:
        store.execute("UPDATE anchor SET content = ?", (msgspec.json.encode(chain.anchor),))
