"""A port of the host is a server in the guest."""

from __future__ import annotations

import socket

import pytest
import trio

from rayos_vmm.errors import RayosError
from rayos_vmm.testing.pytest_plugin import GuestFactory

pytestmark = [pytest.mark.guest, pytest.mark.root]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


async def ask(port: int, text: bytes) -> bytes:
    """The other side's answer to `text`, to its end."""
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(text)
        await stream.send_eof()
        return b"".join([bytes(data) async for data in stream])


async def test_a_published_port_is_the_guests(guest_factory: GuestFactory) -> None:
    """Several connections at once, each to its end; without a server it is closed.

    A port that is taken is an error before the guest runs.
    """
    port = free_port()
    net = {"publish": [f"{port}:8080"]}
    async with guest_factory(net=net, gpu={"enabled": False}, tpm=False) as guest:
        with trio.fail_after(30):
            assert await ask(port, b"") == b""
        await guest.succeed("mkdir /tmp/www; cp /bin/busybox /tmp/www/data; httpd -p 8080 -h /tmp/www")
        size = int(await guest.succeed("wc -c </tmp/www/data"))
        answers: list[bytes] = []

        async def once() -> None:
            answers.append(await ask(port, b"GET /data HTTP/1.0\r\n\r\n"))

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for _ in range(4):
                    nursery.start_soon(once)
        assert [len(answer.partition(b"\r\n\r\n")[2]) for answer in answers] == 4 * [size]
        with pytest.raises(RayosError, match=f"127.0.0.1:{port} cannot be listened on"):
            async with guest_factory(net=net, gpu={"enabled": False}, tpm=False):
                pass
