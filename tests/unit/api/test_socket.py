"""The socket's path leads to a live daemon or to nothing."""

from __future__ import annotations

import socket
import stat
from pathlib import Path

import pytest
import trio

from rayos_vmm.api.server import open_socket
from rayos_vmm.client.client import Client, NoDaemon
from rayos_vmm.errors import Busy, Invalid


def test_the_socket_is_private_and_goes_with_its_daemon(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    with open_socket(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == []


def test_a_socket_that_a_crash_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    with socket.socket(socket.AF_UNIX) as crashed:
        crashed.bind(str(path))
    with open_socket(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_a_daemon_that_answers_is_not_robbed(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    with open_socket(path):
        with pytest.raises(Busy, match="another daemon answers"), open_socket(path):
            pass
        assert path.exists()


def test_a_file_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    path.write_text("precious")
    with pytest.raises(Invalid, match="not a socket"), open_socket(path):
        pass
    assert path.read_text() == "precious"


def test_a_successor_keeps_its_socket_when_its_predecessor_ends(tmp_path: Path) -> None:
    """Ending late must not remove what a newer daemon put there."""
    path = tmp_path / "api.sock"
    with open_socket(path) as first:
        first.close()
        with open_socket(path):
            pass
        path.write_text("newer")
    assert path.exists()


@pytest.mark.parametrize(
    "said", [b"", b"HTTP/1.1 200 OK\r\nContent-Len", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"]
)
async def test_a_daemon_that_dies_in_the_middle_is_told_in_words(said: bytes, tmp_path: Path) -> None:
    async def answer(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some(1000)
            await stream.send_all(said)

    with open_socket(tmp_path / "api.sock") as listener:
        async with trio.open_nursery() as nursery:
            server = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
            nursery.start_soon(trio.serve_listeners, answer, [server])
            with pytest.raises(NoDaemon, match="went away during GET /v1/info: the connection was closed"):
                await Client(tmp_path / "api.sock").info()
            nursery.cancel_scope.cancel()
