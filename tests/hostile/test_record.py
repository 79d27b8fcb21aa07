"""Attacks on the record of decisions: by callers that are refused, with the daemon running; and by root, without it."""

from __future__ import annotations

import json
import signal
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.framework.daemon import Daemon, ask, get, open_daemon, run_as_nobody, status_of
from tests.framework.record import rewrite

pytestmark = pytest.mark.root

#: Refusals with names that are new each time, as fast as they are answered, or as the rate allows.
FLOOD = """
import socket, sys, time
path, seconds, name = sys.argv[1], float(sys.argv[2]), sys.argv[3] * int(sys.argv[4])
end, number, seen, is_open = time.monotonic() + seconds, 0, {}, False
while time.monotonic() < end:
    number += 1
    if not is_open: sock = socket.socket(socket.AF_UNIX); sock.connect(path); file = sock.makefile('rb')
    target = ('GET', 'POST', 'DELETE')[number % 3] + f' /v1/vms/a{number}{name}'
    sock.sendall(f'{target} HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: 0\\r\\n\\r\\n'.encode())
    status, length, is_open = file.readline().split()[1].decode(), 0, True
    while (line := file.readline()) not in (b'\\r\\n', b''):
        if line.lower().startswith(b'connection: close'): is_open = False
        if line.lower().startswith(b'content-length'): length = int(line.split(b':')[1])
    file.read(length)
    seen[status] = seen.get(status, 0) + 1
print(seen)
"""


def audit_log(daemon: Daemon) -> Path:
    return daemon.state / "audit.log"


def verified(daemon: Daemon) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ask(daemon.socket, get("/v1/audit/verify")).partition(b"\r\n\r\n")[2])
    return found


def create_token(daemon: Daemon) -> int:
    """The status of an operation that raises somebody's rights."""
    body = b"{}"
    head = f"POST /v1/tokens HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    return status_of(ask(daemon.socket, head.encode() + body))


def define(daemon: Daemon, name: str) -> None:
    body = msgspec.json.encode({"spec": {"name": name, "net": {"enabled": False}}})
    head = f"POST /v1/vms HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    assert status_of(ask(daemon.socket, head.encode() + body)) == 201


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with open_daemon() as running:
        yield running


def test_a_refused_caller_neither_ruins_nor_fills_the_record(daemon: Daemon) -> None:
    """F2, F6: no length of a name, and no number of names, costs more than a record a command each ten seconds."""
    for char, length in (
        ('"', 25_000),
        ("%22", 8_000),
        ("%ff", 8_000),
        ("é", 2_000),
        ("a", 33_000),
        ("a", 20),
    ):
        run_as_nobody(FLOOD, daemon.shared, 0.05, char, length)
    before = audit_log(daemon).stat().st_size
    seen = run_as_nobody(FLOOD, daemon.shared, 3, "n", 1)
    assert "403" in seen and "429" in seen
    assert verified(daemon)["ok"]
    assert audit_log(daemon).stat().st_size - before < 8 << 10
    daemon.stop()
    daemon.start()
    assert create_token(daemon) == 201
    told = json.loads(daemon.rayos("audit", "list", "--json"))["records"]
    refused = [one for one in told if one["op"] == "CHECK_FAIL"]
    assert refused and {one["data"]["command"] for one in refused} <= {
        "unknown",
        "machines.get",
        "machines.remove",
    }
    assert all(len(one["vm"]) <= 32 for one in refused)
    assert len(refused) <= 6


def test_a_tail_that_is_cut_after_a_kill_is_found_up_to_the_last_checkpoint(daemon: Daemon) -> None:
    """A daemon that was killed has stored no end; its checkpoints are in the store all the same."""
    for number in range(300):
        assert status_of(ask(daemon.socket, get(f"/v1/vms/a{number}"))) == 404
    define(daemon, "a")
    assert daemon.stop(signal.SIGKILL) == -signal.SIGKILL
    lines = audit_log(daemon).read_bytes().splitlines(keepends=True)
    audit_log(daemon).write_bytes(b"".join(lines[:250]))
    daemon.start()
    assert create_token(daemon) == 503 and "cut off" in verified(daemon)["problem"]
    assert b'rayos_audit_trouble{what="record"} 1.0' in ask(daemon.socket, get("/metrics"))
    assert "audit-damaged-" in daemon.rayos("audit", "restart", "--reason", "a tail was cut")
    assert create_token(daemon) == 201 and verified(daemon)["first"] > 250
    assert "RESTART" in daemon.rayos("audit", "list")


def test_a_machine_that_only_the_policy_knows_is_forgotten_at_the_start(daemon: Daemon) -> None:
    """F18: as a kill between the two steps of a removal leaves it."""
    define(daemon, "ghost")
    define(daemon, "kept")
    assert daemon.stop() == 0
    with closing(sqlite3.connect(daemon.state / "rayos.db")) as store, store:
        store.execute("DELETE FROM vm WHERE name = 'ghost'")
    daemon.start()
    assert status_of(ask(daemon.socket, get("/v1/vms/ghost/policy"))) == 404
    assert status_of(ask(daemon.socket, get("/v1/vms/kept/policy"))) == 200
    told = json.loads(daemon.rayos("audit", "list", "--json"))["records"]
    removed = [one for one in told if one["op"] == "REMOVE"]
    assert [(one["vm"], "no such machine" in one["data"]["why"]) for one in removed] == [("ghost", True)]


def test_a_witness_knows_what_a_rewritten_host_does_not() -> None:
    """Record, key and store are told anew, and agree: only the file on another mount does not."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as mount:
        place = f"{mount}/heads"
        with open_daemon(f'[audit]\nwitness = "{place}"\n') as daemon:
            define(daemon, "a")
            assert daemon.stop() == 0
            daemon.start()
            key = daemon.directory / "public.pem"
            key.write_text(daemon.rayos("audit", "key"))
            said = daemon.rayos("audit", "verify", "--witness", place, "--key", str(key))
            assert "heads that the witness kept" in said
            assert daemon.stop() == 0
            rewrite(daemon.state)
            daemon.start()
            assert verified(daemon)["ok"]  # nothing on this host knows
            said = daemon.rayos("audit", "verify", "--witness", place, status=1)
            assert "it is another than the one that was recorded" in said
