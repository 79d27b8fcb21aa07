"""Strangers at the API's sockets: whatever one connection does, the daemon lives, and the owner is served at once."""

from __future__ import annotations

import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

from rayos_vmm.api.body import FILE_MAXIMUM_BYTES
from rayos_vmm.api.http.limits import PER_USER
from rayos_vmm.api.http.listening import SPARE
from tests.framework.daemon import Daemon, ask, get, open_daemon, run_as_nobody, status_of

pytestmark = pytest.mark.root

#: A request whose body breaks while the answer to it is being sent: forty at once, closed in every other way.
BREAK_BODIES = """
import socket, sys, time
path, rounds = sys.argv[1], int(sys.argv[2])
HEAD = b'POST /v1/vms HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: 1000000\\r\\n\\r\\n{'
CHUNKED = b'POST /v1/vms HTTP/1.1\\r\\nHost: x\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\n'
for number in range(rounds):
    held = []
    for _ in range(40):
        sock = socket.socket(socket.AF_UNIX); sock.connect(path); sock.settimeout(5); held.append(sock)
    for sock in held:
        try: sock.sendall(CHUNKED if number % 2 else HEAD)
        except OSError: pass
    for sock in held:
        try: sock.sendall(b'ZZ\\r\\nab\\r\\n') if number % 2 else sock.shutdown(socket.SHUT_WR)
        except OSError: pass
    for sock in held: sock.close()
print('done')
"""
#: Holds connections until it is killed; says how many were answered in full.
HOLD = """
import socket, sys
path, wanted = sys.argv[1], int(sys.argv[2])
held, served, turned_away = [], 0, b''
for _ in range(wanted):
    sock = socket.socket(socket.AF_UNIX); sock.settimeout(20); sock.connect(path)
    try:
        sock.sendall(b'GET /v1/vms HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n')
    except BrokenPipeError:
        pass
    answer = sock.recv(65536)
    held.append(sock)
    if b' 503 ' in answer[:16]: turned_away = answer
    elif answer: served += 1
print(served, turned_away.decode().splitlines()[-1] if turned_away else '', flush=True)
if len(sys.argv) > 3: sys.stdin.read()
"""


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with open_daemon() as running:
        yield running


def owner_is_served(daemon: Daemon) -> None:
    """Within what a person does not notice, on a busy machine."""
    began = time.monotonic()
    assert status_of(ask(daemon.socket, get("/v1/vms"))) == 200
    assert time.monotonic() - began < 10


def descriptors(daemon: Daemon) -> int:
    return len(list(Path(f"/proc/{daemon.pid}/fd").iterdir()))


def metric(daemon: Daemon, name: str) -> float:
    """The sum of a metric's values."""
    lines = ask(daemon.socket, get("/metrics")).decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def test_a_body_that_breaks_under_its_answer_ends_nothing_else(daemon: Daemon) -> None:
    """F1: by a user without a token, and by the owner, who has no share to be kept to."""
    assert run_as_nobody(BREAK_BODIES, daemon.shared, 60) == "done\n"
    command = [sys.executable, "-I", "-c", BREAK_BODIES, str(daemon.socket), "60"]
    assert subprocess.check_output(command, timeout=60) == b"done\n"
    owner_is_served(daemon)
    assert daemon.process is not None and daemon.process.poll() is None
    assert metric(daemon, "rayos_api_connections_failed_total") == 0
    assert "Traceback" not in daemon.log()


def test_a_user_has_his_share_of_connections(daemon: Daemon) -> None:
    """F8: the 17th is told why it is turned away; the owner has more, and theirs do not count."""
    before = metric(daemon, "rayos_api_connections_refused_total")
    served, _, why = run_as_nobody(HOLD, daemon.shared, 40).partition(" ")
    assert int(served) == PER_USER and f"user 65534 has {PER_USER} connections open already" in why
    assert metric(daemon, "rayos_api_connections_refused_total") == before + 40 - PER_USER
    held = [socket.socket(socket.AF_UNIX) for _ in range(3 * PER_USER)]
    for sock in held:
        sock.connect(str(daemon.shared))
        sock.sendall(b"GET /v1/vms HTTP/1.1\r\nHost: x\r\n\r\n")
        assert status_of(sock.recv(65536)) == 200
    for sock in held:
        sock.close()


def test_the_owner_is_served_without_a_descriptor_left(daemon: Daemon) -> None:
    """F8: strangers are turned away, the log says so once, and all is well when there are descriptors again."""
    limits = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
    owner_is_served(daemon)
    held = []
    try:
        highest = max(int(path.name) for path in Path(f"/proc/{daemon.pid}/fd").iterdir())
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (highest + 1, limits[1]))
        for _ in range(
            highest + 1 - descriptors(daemon) + SPARE - 1
        ):  # all that is free, and most of what is kept
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(str(daemon.socket))
            held.append(sock)
            owner_is_served(daemon)
        for _ in range(20):
            said = run_as_nobody(HOLD, daemon.shared, 1)
            assert said.startswith("0 ") and "no descriptor left" in said
            owner_is_served(daemon)
    finally:
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, limits)
        for sock in held:
            sock.close()
    assert run_as_nobody(HOLD, daemon.shared, 1).startswith("1 ")
    assert daemon.log().count("A connection cannot be accepted") == 1


def test_who_asks_once_and_leaves_is_forgotten_at_once(daemon: Daemon) -> None:
    """F19: an end of file on a connection that waits for its next request."""
    before = descriptors(daemon)
    for _ in range(300):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(daemon.socket))
            sock.sendall(b"GET /v1/vms HTTP/1.1\r\nHost: x\r\n\r\n")
            assert status_of(sock.recv(65536)) == 200
    owner_is_served(daemon)  # accepted after them all
    assert descriptors(daemon) <= before + 2


def test_a_file_that_is_too_large_is_refused_before_it_is_read(daemon: Daemon) -> None:
    """F21: by what it announces; and one that announces nothing is held to the limit while it comes."""
    head = b"PUT /v1/vms/dev/files?path=/a HTTP/1.1\r\nHost: x\r\n"
    announced = b"Content-Length: %d\r\nExpect: 100-continue\r\n\r\n" % (FILE_MAXIMUM_BYTES + 1)
    answer = ask(daemon.socket, head + announced)
    assert status_of(answer) == 413 and b"100 Continue" not in answer
    before = _resident(daemon)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(daemon.socket))
        sock.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        piece = b"100000\r\n" + b"x" * (1 << 20) + b"\r\n"
        sent = 0
        with suppress(BrokenPipeError, ConnectionResetError):
            while sent < 4 * FILE_MAXIMUM_BYTES:
                sock.sendall(piece)
                sent += 1 << 20
        assert status_of(sock.recv(65536)) == 413
    assert sent <= FILE_MAXIMUM_BYTES + (4 << 20)
    assert _resident(daemon) - before < 2.5 * FILE_MAXIMUM_BYTES
    owner_is_served(daemon)


def _resident(daemon: Daemon) -> int:
    pages = Path(f"/proc/{daemon.pid}/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


def test_http_2_is_not_spoken_so_its_resets_cost_nothing(daemon: Daemon) -> None:
    """Neither by its preface, with 100,000 streams begun and reset behind it, nor as an upgrade."""
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0"
    streams = b"".join(
        b"\0\0\x01\x01\x05%b\x82" % stream + b"\0\0\x04\x03\0%b\0\0\0\x08" % stream
        for stream in (number.to_bytes(4, "big") for number in range(1, 200_000, 2))
    )
    answer = ask(daemon.shared, preface + streams)
    assert status_of(answer) == 505 and b"HTTP/2.0 is not spoken here" in answer
    upgrade = (
        b"GET /v1/vms HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings, close\r\nUpgrade: h2c\r\n"
    )
    answer = ask(daemon.socket, upgrade + b"HTTP2-Settings: AAMAAABkAAQAAP__\r\nConnection: close\r\n\r\n")
    assert status_of(answer) == 200
    owner_is_served(daemon)


def test_what_a_stranger_wrote_does_not_come_back(daemon: Daemon) -> None:
    """F26: no redirect to a host that he made up, no name of thousands of characters, no empty refusal."""
    answer = ask(daemon.socket, get("/v1/info/").replace(b"Host: x", b"Host: evil.example"))
    assert status_of(answer) == 404 and b"evil.example" not in answer
    answer = ask(daemon.socket, get("/v1/vms/" + "a" * 5000))
    assert status_of(answer) == 404 and len(answer) < 700 and b"(5000 characters)" in answer
    upgrade = {
        "Upgrade": "websocket",
        "Sec_WebSocket_Key": "dGhlIHNhbXBsZSBub25jZQ==",
        "Sec_WebSocket_Version": "13",
    }
    asked = get("/v1/nothing", **upgrade).replace(b"Connection: close", b"Connection: Upgrade")
    answer = ask(daemon.socket, asked)
    assert status_of(answer) == 404 and _error(answer)["code"] == "no_such_path"
    body = b'{"spec": {"name": "\\ud800"}}'
    head = b"POST /v1/vms HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    assert "\\ud800, half of a surrogate pair" in _error(ask(daemon.socket, head + body))["message"]
    assert status_of(ask(daemon.socket, get("/v1/vms", X="a" * 70_000))) == 431
    assert (
        status_of(ask(daemon.socket, b"GET /v1/vms HTTP/1.1\r\nContent-Length: %s\r\n\r\n" % (b"9" * 9000)))
        == 400
    )
    assert status_of(ask(daemon.socket, b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\r\n\r\n")) == 400


def _error(answer: bytes) -> dict[str, str]:
    found: dict[str, dict[str, str]] = msgspec.json.decode(answer.partition(b"\r\n\r\n")[2])
    return found["error"]


def test_who_connects_without_waiting_finds_room(daemon: Daemon) -> None:
    """F26: as many at once as the host lets wait on a socket, without one that is refused for a full queue."""
    allowed = int(Path("/proc/sys/net/core/somaxconn").read_text())
    held = [socket.socket(socket.AF_UNIX) for _ in range(min(500, allowed))]
    try:
        for sock in held:
            sock.setblocking(False)
            sock.connect(str(daemon.socket))
    finally:
        for sock in held:
            sock.close()
    owner_is_served(daemon)
