"""The API against the service's contract: answers, errors, streams, the console."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import trio

from rayos_vmm.api.app import OPENAPI_PATH
from rayos_vmm.client.client import Client, NoDaemon
from rayos_vmm.config.spec import VmSpec
from rayos_vmm.contract.operations import OPERATIONS
from rayos_vmm.errors import Conflict, GuestGone, Invalid, NotFound, RayosError, Timeout_
from rayos_vmm.machine.view import VmState
from tests.unit.api.serving import answer_of, open_api, post, send_raw


async def test_a_machine_lives_through_the_api(tmp_path: Path) -> None:
    """Every verb reaches the service, and the view comes back."""
    async with open_api(tmp_path) as (client, _):
        view = await client.create(VmSpec(name="dev", memory="512MiB"), start=True)
        assert (view.state, view.spec.memory) == (VmState.RUNNING, "512MiB")
        assert [machine.spec.name for machine in await client.machines()] == ["dev"]
        assert (await client.act("dev", "pause")).state is VmState.PAUSED
        assert (await client.act("dev", "resume")).state is VmState.RUNNING
        assert (await client.stop("dev", timeout_s=1.5)).state is VmState.STOPPED
        await client.remove("dev")
        assert await client.machines() == []


async def test_an_error_of_the_service_is_the_same_error_at_the_client(tmp_path: Path) -> None:
    """Class, message and hint survive the way; our own bugs say that they are."""
    async with open_api(tmp_path) as (client, _):
        with pytest.raises(NotFound, match="no machine 'x'") as missing:
            await client.get("x")
        assert missing.value.hint == "`rayos ps` lists them"
        await client.create(VmSpec(name="dev"))
        with pytest.raises(Conflict, match="taken"):
            await client.create(VmSpec(name="dev"))
        with pytest.raises(Timeout_):
            await client.wait("dev", "ready", timeout_s=0.5)
        with pytest.raises(Invalid, match="combo"):
            await client.send_key("dev", "")
        with pytest.raises(Invalid, match=r"query\.path"):
            await client.read_file("dev", "relative")
        with pytest.raises(RayosError, match="RuntimeError: a bug"):
            await client.stats("dev")


async def test_without_a_daemon_the_client_says_so(tmp_path: Path) -> None:
    client = Client(tmp_path / "api.sock")
    with pytest.raises(NoDaemon, match="no daemon answers"):
        await client.machines()
    with pytest.raises(NoDaemon, match="no daemon answers"):
        async with client.console("dev", 0):
            pass


async def test_files_and_commands_carry_bytes(tmp_path: Path) -> None:
    """No byte is lost or re-encoded, also past the limit of JSON bodies."""
    content = bytes(range(256)) * 8192
    async with open_api(tmp_path) as (client, _):
        await client.create(VmSpec(name="dev"))
        await client.write_file("dev", "/tmp/a b&c", content)
        assert await client.read_file("dev", "/tmp/a b&c") == content
        done = await client.exec("dev", ["echo", "ü"])
        assert (done.exit_status, done.stderr) == (3, b"\xff")
        assert (await client.qmp("dev", "query-status"))["command"] == "query-status"
        assert await client.screenshot("dev") == b"\x89PNG\0\0"
        assert await client.screenshot("dev", scanout=1, with_cursor=True) == b"\x89PNG\1\1"
        assert (await client.display("dev")).serial == 7
        damage = await client.wait_damage("dev", 6, 1)
        assert (damage.serial, damage.scanout, damage.x, damage.height) == (7, 1, 1, 4)
        with pytest.raises(Timeout_, match=r"within 0\.5 s"):
            await client.wait_damage("dev", 7, 1, timeout_s=0.5)


async def test_a_client_that_leaves_cancels_its_command(tmp_path: Path) -> None:
    async with open_api(tmp_path) as (client, service):
        await client.create(VmSpec(name="dev"))
        with trio.move_on_after(0.2):
            await client.exec("dev", "sleep")
        with trio.fail_after(5):
            await service.cancelled.wait()


async def test_the_console_goes_both_ways(tmp_path: Path) -> None:
    """Bytes in, bytes out, the size; a second client replays; the end of the guest ends the stream."""
    async with open_api(tmp_path) as (client, service):
        await client.create(VmSpec(name="dev"))
        async with client.console("dev", 0) as console:
            await console.write(b"hello\xff")
            assert await console.read() == b"hello\xff"
            assert console.offset == 6
            await console.resize(132, 43)
            async with client.console("dev", 0, since=0) as second:
                assert await second.read() == b"hello\xff"
            await client.stop("dev")
            assert await console.read() == b""
        assert ("dev", 0, 132, 43) in service.sizes
        assert await client.console_log("dev", 0) == b"hello\xff"
        with pytest.raises(NotFound, match="no machine"):
            async with client.console("none", 0):
                pass


async def test_one_writes_and_the_others_watch_until_they_take_over(tmp_path: Path) -> None:
    """A watcher's typing is dropped; a take-over is told to both; a log with times is the output byte for byte."""
    async with open_api(tmp_path) as (client, service):
        await client.create(VmSpec(name="dev"))
        async with client.console("dev", 0) as first, client.console("dev", 0) as second:
            assert first.is_writer and not second.is_writer and "process" in str(second.writer)
            await second.write(b"lost")
            await second.resize(1, 1)
            await first.write(b"one")
            assert await second.read() == await first.read() == b"one"
            await second.take()
            await second.write(b"two")
            assert await first.read() == await second.read() == b"two"
            assert second.is_writer and not first.is_writer
            await first.write(b"lost")
            async with client.console("dev", 0, since=0, mode="take") as third:
                assert third.is_writer and await third.read() == b"onetwo"
                ports = await client.console_ports("dev")
                assert ports[0]["watchers"] == 2 and ports[0]["writer"] == third.writer
            async with client.console("dev", 0, mode="watch") as fourth:
                assert fourth.writer is None
        assert not service.sizes
        async with client.console_pieces("dev", 0) as pieces:
            kept = [piece async for piece in pieces]
        assert b"".join(piece.data for piece in kept) == b"onetwo"
        assert kept[0].offset == 0 and all(piece.time > 1e9 for piece in kept)
        async with client.console_pieces("dev", 0, since=3, follow=True) as pieces:
            assert (await anext(pieces)).data == b"two"
            await service.guests.console_write("dev", 0, b"three")
            assert (await anext(pieces)).data == b"three"


async def test_events_are_lines_that_resume(tmp_path: Path) -> None:
    async with open_api(tmp_path) as (client, _):
        await client.create(VmSpec(name="dev"), start=True)
        async with client.events(since=0) as events:
            first = await anext(events)
            assert (first.seq, first.type, first.vm) == (1, "vm.state", "dev")
            await client.act("dev", "pause")
            assert (await anext(events)).seq == 2


async def test_a_bad_console_frame_closes_the_console_with_a_reason(tmp_path: Path) -> None:
    async with open_api(tmp_path) as (client, _):
        await client.create(VmSpec(name="dev"))
        async with client.console("dev", 0) as console:
            await console.resize(0, 0)
            with pytest.raises(GuestGone, match="columns"):
                await console.read()


async def test_while_somebody_is_there_the_service_knows(tmp_path: Path) -> None:
    async with open_api(tmp_path) as (client, service):
        async with client.events():
            assert service.clients == 1
        with trio.fail_after(5):
            await service.nobody.wait()


async def test_every_route_is_in_the_openapi_document(tmp_path: Path) -> None:
    """The document is complete, its references resolve, and no operation has another's name."""
    async with open_api(tmp_path):
        _, body = answer_of(await send_raw(tmp_path / "api.sock", post(OPENAPI_PATH, b"", "GET")))
    document = msgspec.json.decode(body)
    assert document["openapi"] == "3.1.0"
    served = {(row.path, row.method.lower()) for row in OPERATIONS}
    described = {
        (path, method)
        for path, item in document["paths"].items()
        for method in item
        if method != "parameters"
    }
    assert described == served
    references = {part.split(b'"')[0].decode() for part in body.split(b'"$ref":"#/components/schemas/')[1:]}
    assert references <= set(document["components"]["schemas"])
    names = [
        item[method]["operationId"]
        for item in document["paths"].values()
        for method in item
        if method != "parameters"
    ]
    assert len(names) == len(set(names))


async def test_typing_without_a_seat_is_refused_while_somebody_else_writes(tmp_path: Path) -> None:
    """Accepted input is written, though the caller leaves at once; the writer's place is respected."""
    async with open_api(tmp_path) as (client, service):
        await client.create(VmSpec(name="dev"))
        for word in (b"one ", b"two "):
            await client.console_write("dev", 0, word)
        assert await client.console_log("dev", 0) == b"one two "
        async with client.console("dev", 0) as console:
            assert console.is_writer
            with pytest.raises(Conflict, match="writes on console 0 of dev"):
                await client.console_write("dev", 0, b"three")
        assert service.seats.describe(0)["watchers"] == 0
