"""Deliveries: acknowledged, repeated with growing pauses, given up; and over sockets, by workers that misbehave."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import trio

from rayos_vmm.errors import Busy
from rayos_vmm.policy.broadcast import Broadcaster
from rayos_vmm.policy.distribution import ANSWER_TIMEOUT_S, ATTEMPTS, QUEUE_MAXIMUM, Distribution
from rayos_vmm.shared import packet
from rayos_vmm.shared.spec import CONTROL_SOCKET


def test_a_target_gets_the_newest_revision_only() -> None:
    """A waiting delivery is replaced; one at a time is under way."""
    state = Distribution(3)
    state.attach("a", 0.0)
    assert state.take(0.0) == [("a", 3)] and state.take(0.0) == []
    state.announce(4, 1.0)
    state.announce(5, 1.0)
    assert state.take(1.0) == []  # 3 is not answered yet
    state.acknowledge("a", 3, 1.1)
    assert state.take(1.1) == [("a", 5)] and state.targets["a"].lag == 2
    state.acknowledge("a", 5, 1.2)
    assert state.targets["a"].lag == 0 and state.deadline() is None
    assert [round(entry.latency_s or 0, 3) for entry in state.broadcasts] == [0.2, 0.2]
    state.acknowledge("a", 9, 1.3)  # nobody asked
    assert state.targets["a"].applied == 5


def test_a_failure_is_repeated_ever_later_and_then_given_up() -> None:
    state = Distribution(1)
    state.attach("a", 0.0)
    now, pauses = 0.0, []
    for _ in range(ATTEMPTS - 1):
        assert state.take(now) == [("a", 1)]
        state.fail("a", "no", now)
        due = state.deadline()
        assert due is not None
        pauses.append(round(due - now, 4))
        now = due
    assert pauses == [0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28]
    state.take(now)
    state.fail("a", "no", now)
    assert state.deadline() is None and state.targets["a"].is_dead
    assert state.view().dead_letters[0].problem == "no" and state.view().success_rate == 0
    assert state.view().lagging == ["a"]
    state.announce(2, now)  # the next one is tried again
    assert state.take(now) == [("a", 2)]
    state.acknowledge("a", 2, now)
    assert state.view().lagging == [] and state.view().success_rate == 0.5


def test_silence_and_an_old_revision_are_failures() -> None:
    state = Distribution(7)
    state.attach("a", 0.0)
    state.take(0.0)
    assert state.late(ANSWER_TIMEOUT_S - 0.1) == [] and state.late(ANSWER_TIMEOUT_S) == ["a"]
    state.take(ANSWER_TIMEOUT_S + 1)
    state.acknowledge("a", 6, ANSWER_TIMEOUT_S + 1.1)
    assert state.targets["a"].problem == "it has applied 6, not 7" and state.targets["a"].applied == -1


def test_the_queue_has_512_places() -> None:
    state = Distribution(1)
    for number in range(QUEUE_MAXIMUM + 1):
        state.attach(f"v{number}", 0.0)
    assert len(state.queue) == QUEUE_MAXIMUM
    assert state.view().dead_letters[0].problem == "512 deliveries wait already"
    assert len(state.take(0.0)) == QUEUE_MAXIMUM


def test_who_leaves_is_owed_nothing() -> None:
    state = Distribution(1)
    for name in "ab":
        state.attach(name, 0.0)
    state.take(0.0)
    state.acknowledge("a", 1, 0.1)
    state.announce(2, 1.0)
    state.detach("b")
    assert state.take(1.0) == [("a", 2)]
    state.acknowledge("a", 2, 1.5)
    assert state.broadcasts[-1].latency_s == 0.5


Worker = Callable[[trio.socket.SocketType, int], Awaitable[None]]


@asynccontextmanager
async def workers(
    directory: Path, prepare: Callable[[str], Awaitable[None]] | None = None, **behave: Worker
) -> AsyncIterator[Broadcaster]:
    """Sockets that behave as told when the n-th connection comes, and a broadcaster that knows them."""
    broadcaster = Broadcaster(Distribution(1), prepare)

    async def live(worker: Worker, sock: trio.socket.SocketType, count: int) -> None:
        with sock, suppress(OSError):
            await worker(sock, count)

    async def serve(listener: trio.socket.SocketType, worker: Worker) -> None:
        count = 0
        with listener:
            async with trio.open_nursery() as nursery:
                while True:
                    sock, _ = await listener.accept()
                    count += 1
                    nursery.start_soon(live, worker, sock, count)

    async with trio.open_nursery() as nursery:
        for name, worker in behave.items():
            (directory / name).mkdir()
            listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            await listener.bind(str(directory / name / CONTROL_SOCKET))
            listener.listen(4)
            nursery.start_soon(serve, listener, worker)
            broadcaster.attach(name, directory / name)
        nursery.start_soon(broadcaster.run)
        yield broadcaster
        nursery.cancel_scope.cancel()


async def until(broadcaster: Broadcaster, condition: Callable[[], bool]) -> None:
    with trio.fail_after(30):
        while not condition():
            await broadcaster.changed()


async def test_workers_that_misbehave_are_repeated_and_hurt_nobody(tmp_path: Path) -> None:
    """One is replaced, one closes twice, one says rubbish, one talks unasked; all get there, or it is told."""

    async def answer(sock: trio.socket.SocketType) -> bool:
        data = await sock.recv(packet.MAX_PACKET_BYTES)
        if data:
            head, _ = packet.decode(data)
            await sock.send(packet.encode({"id": head["id"], "revision": head["id"]}))
        return bool(data)

    async def honest(sock: trio.socket.SocketType, _count: int) -> None:
        while await answer(sock):
            pass

    async def replaced(sock: trio.socket.SocketType, count: int) -> None:
        await answer(sock)
        if count > 1:
            await sock.recv(1)

    async def closes(sock: trio.socket.SocketType, count: int) -> None:
        if count > 2:
            await honest(sock, count)

    async def rubbish(sock: trio.socket.SocketType, count: int) -> None:
        await sock.recv(packet.MAX_PACKET_BYTES)
        await sock.send(b'{"revision": "9"}\n' if count % 2 else b"\xff" * 1000)

    async def talks(sock: trio.socket.SocketType, count: int) -> None:
        await answer(sock)
        for _ in range(100 if count == 1 else 0):
            await sock.send(packet.encode({"revision": 77}))
        await honest(sock, count)

    async with workers(
        tmp_path, honest=honest, replaced=replaced, closes=closes, rubbish=rubbish, talks=talks
    ) as broadcaster:
        targets = broadcaster.distribution.targets
        await until(broadcaster, lambda: targets["rubbish"].is_dead)
        good = ("honest", "replaced", "closes", "talks")
        assert [targets[name].applied for name in good] == [1, 1, 1, 1]
        assert "refused" in targets["rubbish"].problem
        broadcaster.announce(2)
        await until(
            broadcaster, lambda: all(targets[name].applied == 2 for name in ("honest", "closes", "talks"))
        )
        broadcaster.attach("none", tmp_path / "none")
        await until(broadcaster, lambda: "cannot be reached" in targets["none"].problem)
        broadcaster.detach("none")
        assert "none" not in broadcaster.distribution.view().lagging


async def test_who_has_to_be_prepared_is_told_afterwards_and_again_when_it_fails(tmp_path: Path) -> None:
    """Firewall rules go first: the acknowledgement of a revision means that they are obeyed, too."""
    told: list[int] = []
    prepared: list[str] = []

    async def worker(sock: trio.socket.SocketType, _count: int) -> None:
        while data := await sock.recv(packet.MAX_PACKET_BYTES):
            revision = packet.decode(data)[0]["id"]
            told.append(revision)
            await sock.send(packet.encode({"revision": revision}))

    async def prepare(vm: str) -> None:
        prepared.append(vm)
        if len(prepared) < 3:
            raise Busy("not now")
        assert told == [1]

    async with workers(tmp_path, prepare, a=worker) as broadcaster:
        await until(broadcaster, lambda: broadcaster.distribution.targets["a"].applied == 1)
        broadcaster.announce(2, ["a", "stranger"])
        assert broadcaster.distribution.lagging() == ["a"]
        await broadcaster.wait_all_applied(30)
        assert prepared == ["a"] * 3 and told == [1, 2] and broadcaster.distribution.lagging() == []
        broadcaster.announce(3)
        await broadcaster.wait_all_applied(30)
        assert prepared == ["a"] * 3 and told == [1, 2, 3]
