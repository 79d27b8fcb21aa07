"""Bodies that try to hurt (hostile-inputs.md, A1): each a 4xx with our error body, and the daemon goes on."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from rayos_vmm.api.body import DEPTH_MAXIMUM, FILE_MAXIMUM_BYTES, JSON_MAXIMUM_BYTES
from tests.unit.api.serving import answer_of, open_api, post, send_raw

DEEP = 100_000
CASES = {
    "deep arrays": (b'{"spec": ' + b"[" * DEEP + b"]" * DEEP + b"}", 400),
    "deep objects": (b'{"a":' * DEEP + b"1" + b"}" * DEEP, 400),
    "deeper than allowed": (b"[" * (DEPTH_MAXIMUM + 1) + b"]" * (DEPTH_MAXIMUM + 1), 400),
    "NaN": (b'{"spec": {"name": "a", "cpus": NaN}}', 400),
    "infinity": (b'{"spec": {"name": "a", "cpus": -Infinity}}', 400),
    "a number beyond doubles": (b'{"spec": {"name": "a", "cpus": 1e999}}', 422),
    "a name twice": (b'{"spec": {"name": "a"}, "spec": {"name": "b"}}', 400),
    "a name twice, escaped": (b'{"spec": {"name": "a", "\\u006eame": "b"}}', 400),
    "bad UTF-8": (b'{"spec": {"name": "\xff\xfe"}}', 400),
    "overlong UTF-8": (b'{"spec": {"name": "\xc0\xaf"}}', 400),
    "a lone surrogate": (b'{"spec": {"name": "\\ud800"}}', 400),
    "an integer of 5000 digits": (b'{"spec": {"name": "a", "cpus": ' + b"9" * 5000 + b"}}", 400),
    "an integer beyond 64 bits": (b'{"spec": {"name": "a", "cpus": 99999999999999999999}}', 422),
    "empty": (b"", 400),
    "trailing": (b'{"spec": {"name": "a"}} {}', 400),
    "a byte order mark": (b'\xef\xbb\xbf{"spec": {"name": "a"}}', 400),
    "an unknown key": (b'{"spec": {"name": "a", "memroy": "1GiB"}}', 422),
    "a name with a slash": (b'{"spec": {"name": "../etc"}}', 422),
    "a name with a zero byte": (b'{"spec": {"name": "a\\u0000"}}', 422),
    "a bare size": (b'{"spec": {"name": "a", "memory": 256}}', 422),
    "an array": (b"[]", 422),
    "1 MiB and a byte": (b" " * (JSON_MAXIMUM_BYTES + 1), 413),
}


@pytest.mark.parametrize("case", CASES)
async def test_a_hostile_body_is_refused(case: str, tmp_path: Path) -> None:
    body, expected = CASES[case]
    async with open_api(tmp_path) as (client, service):
        status, answer = answer_of(await send_raw(tmp_path / "api.sock", post("/v1/vms", body)))
        assert (status, sorted(msgspec.json.decode(answer)["error"])) == (
            expected,
            ["code", "hint", "message"],
        )
        assert service.vms == {}
        assert await client.machines() == []


async def test_an_announced_gigabyte_is_refused_before_it_comes(tmp_path: Path) -> None:
    """Neither JSON nor a file: the answer comes while the client still waits to send."""
    head = b"Host: rayos\r\nConnection: close\r\nContent-Length: 1000000000\r\n\r\n"
    async with open_api(tmp_path):
        path = tmp_path / "api.sock"
        assert FILE_MAXIMUM_BYTES < 10**9
        for line in (b"POST /v1/vms", b"PUT /v1/vms/dev/files?path=/a"):
            status, _ = answer_of(await send_raw(path, line + b" HTTP/1.1\r\n" + head))
            assert status == 413


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("GET /v1/nothing", 404),
        ("GET /v1/vms/%ff%fe", 404),
        ("GET /v1/vms/..%2f..%2fetc", 404),
        ("PATCH /v1/vms", 405),
        ("GET /v1/events?since=-1", 422),
        ("GET /v1/events?since=1&since=2", 422),
        ("GET /v1/vms/dev/wait?for=christmas", 422),
        ("GET /v1/vms?unknown=1", 422),
    ],
)
async def test_a_wrong_path_or_query_is_refused(line: str, expected: int, tmp_path: Path) -> None:
    method, path = line.split()
    async with open_api(tmp_path):
        status, answer = answer_of(await send_raw(tmp_path / "api.sock", post(path, b"", method)))
    assert (status, "message" in msgspec.json.decode(answer)["error"]) == (expected, True)
