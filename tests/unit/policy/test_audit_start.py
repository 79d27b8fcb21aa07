"""A start finds what was done to the record meanwhile, raises no right then, and has its head kept elsewhere."""

from __future__ import annotations

import http.server
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from rayos_vmm.errors import Conflict, Invalid
from rayos_vmm.policy.audit import Head, Verifier, is_signed, verify
from rayos_vmm.policy.audit_key import load_private
from rayos_vmm.policy.audit_log import AuditFailed
from rayos_vmm.policy.audit_witness import AuditWitness
from rayos_vmm.policy.authority import Authority, open_authority
from rayos_vmm.service.store import open_store
from tests.framework.record import rewrite, told_anew

Tamper = Callable[[list[bytes], Path], list[bytes]]
TAMPERS: dict[str, tuple[Tamper, str]] = {
    "three records cut off": (lambda lines, _: lines[:-3], "cut off"),
    "the last checkpoint cut off": (lambda lines, _: lines[:-1], "cut off"),
    "told anew without the key": (lambda lines, _: told_anew(lines)[0], "signature|another"),
    "no checkpoint": (lambda lines, _: [line for line in lines if b"CHECKPOINT" not in line], "digest"),
    "emptied": (lambda _, __: [], "cut off"),
    "another key": (lambda lines, state: _with_new_key(lines, state), "not by this key"),
}


def _with_new_key(lines: list[bytes], state: Path) -> list[bytes]:
    (state / "audit.key").unlink()
    return lines


@asynccontextmanager
async def opened(state: Path, witness: AuditWitness | None = None) -> AsyncIterator[Authority]:
    async with (
        open_store(state / "rayos.db") as store,
        open_authority(
            store, state / "audit.log", key_path=state / "audit.key", witness=witness
        ) as authority,
    ):
        yield authority


@pytest.mark.parametrize("case", TAMPERS)
async def test_no_right_is_raised_over_a_record_that_was_touched(case: str, tmp_path: Path) -> None:
    """F13, F14: reading, and what takes rights away, goes on; what is damaged is left as it is, for evidence."""
    tamper, why = TAMPERS[case]
    async with opened(tmp_path) as authority:
        await authority.define("a", ["net", "gpu"])
        authority.audit.checkpoint()
        await authority.grant("a", ["input"], None, "before")
    path = tmp_path / "audit.log"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(tamper(lines, tmp_path)))
    before = path.read_bytes()
    async with opened(tmp_path) as authority:
        with pytest.raises(AuditFailed, match=why):
            await authority.grant("a", ["console_r"], None, "after")
        assert "damaged" in authority.status().audit.trouble
        assert not (await authority.verify()).ok
        assert [one.vm for one in authority.grants("a")] == ["a", "a"]
        with pytest.raises(AuditFailed):
            await authority.revoke_rights("a", ["gpu"])
        assert "CAP_GPU" not in str(authority.grants("a"))
    assert path.read_bytes() == before


@pytest.mark.parametrize("case", TAMPERS)
async def test_the_owner_sets_a_damaged_record_aside_and_goes_on(case: str, tmp_path: Path) -> None:
    """The old one stays as it is; no number is given out twice; the new one verifies, also for the next service."""
    async with opened(tmp_path) as authority:
        await authority.define("a", ["net"])
        with pytest.raises(Conflict, match="the audit record is whole"):
            await authority.restart_audit("for nothing")
    path = tmp_path / "audit.log"
    lines = path.read_bytes().splitlines(keepends=True)
    end = len(lines)
    path.write_bytes(b"".join(TAMPERS[case][0](lines, tmp_path)))
    before = path.read_bytes()
    async with opened(tmp_path) as authority:
        folder = await authority.restart_audit("after the burglary")
        assert (folder / "audit.log").read_bytes() == before
        await authority.grant("a", ["input"], None, "again")
        found = await authority.verify()
        assert found.ok and found.first == end + 1
        told = next(entry for entry in authority.records(10) if entry.op == "RESTART")
        assert told.data["why"] == "after the burglary" and "damaged" in told.data["trouble"]
    async with opened(tmp_path) as authority:
        await authority.grant("a", ["gpu"], None, "and on")
        assert (await authority.verify()).ok and authority.audit.trouble == ""


async def test_a_ghost_is_forgotten_and_recorded(tmp_path: Path) -> None:
    """F18: with what it had passed on; the others keep theirs."""
    async with opened(tmp_path) as authority:
        for vm in ("ghost", "kept"):
            await authority.define(vm, ["net"])
        await authority.delegate("ghost", "kept", ["net"], None)
        assert await authority.forget_ghosts(["kept", "new"]) == ["ghost"]
        assert [one.vm for one in authority.grants()] == ["kept"]
        last = authority.records(1)[0]
        assert (last.op, last.vm, len(last.data["grants"])) == ("REMOVE", "ghost", 2)
        assert await authority.forget_ghosts(["kept"]) == []


@contextmanager
def web_witness(status: int = 204) -> Iterator[tuple[str, list[bytes]]]:
    """A server that keeps what is posted, and gives it back."""
    kept: list[bytes] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            kept.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(status)
            self.end_headers()

        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"\n".join(kept))

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/heads", kept
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("kind", ["url", "file"])
async def test_a_witness_has_signed_heads_that_a_rewritten_host_cannot_hold(
    kind: str, tmp_path: Path
) -> None:
    with web_witness() as (url, _), tempfile.TemporaryDirectory(dir="/dev/shm") as mount:
        witness = AuditWitness(url if kind == "url" else f"{mount}/heads")
        witness.check(tmp_path / "audit.log")
        for _ in range(2):
            async with opened(tmp_path, witness) as authority:
                await authority.define("a", ["net"])
                assert authority.status().audit.witness == ""
        heads = await trio.to_thread.run_sync(witness.read)
        key = load_private(tmp_path / "audit.key").public_key()
        assert len(heads) >= 2 and all(is_signed(key, head.anchor, head.signature) for head in heads)
        lines = (tmp_path / "audit.log").read_bytes().splitlines(keepends=True)
        anchors = [head.anchor for head in heads]
        assert verify(lines, anchors, key).signed == heads[-1].seq
        rewrite(tmp_path)
        async with opened(tmp_path) as authority:
            assert (await authority.verify()).ok  # nothing on this host knows
        lines = (tmp_path / "audit.log").read_bytes().splitlines(keepends=True)
        with pytest.raises(Exception, match="another than the one that was recorded"):
            verify(lines, anchors)


@pytest.mark.parametrize("status", [0, 302, 500])
async def test_a_witness_that_does_not_take_it_stops_nothing_and_is_told_of(
    status: int, tmp_path: Path
) -> None:
    """Not there, one that sends us elsewhere, one that fails."""
    with web_witness(status or 204) as (url, kept):
        witness = AuditWitness(url if status else "http://127.0.0.1:1/")
        async with opened(tmp_path, witness) as authority:
            await authority.define("a", ["net"])
            authority.audit.checkpoint()
            await authority.audit.sync()
        assert witness.place in authority.status().audit.witness
        assert bool(kept) is bool(status)
    async with opened(tmp_path) as authority:
        assert authority.audit.trouble == ""


async def test_a_witness_on_the_same_file_system_is_none(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="file system of the record itself"):
        AuditWitness(str(tmp_path / "heads")).check(tmp_path / "audit.log")
    with pytest.raises(Invalid, match="No such file"):
        AuditWitness(str(tmp_path / "none" / "heads")).check(tmp_path / "audit.log")
    with pytest.raises(Invalid, match="No such file"):
        AuditWitness(str(tmp_path / "heads")).read()
    (tmp_path / "heads").write_bytes(b"{}\n")
    with pytest.raises(Invalid, match="line 1: no head"):
        AuditWitness(str(tmp_path / "heads")).read()
    head = Head(seq=1, digest="00" * 32, time=1.0, signature="")
    (tmp_path / "heads").write_bytes(msgspec.json.encode(head) + b"\n")
    assert AuditWitness(str(tmp_path / "heads")).read() == [head] and Verifier().anchor.seq == 0
