"""The proxy under a hostile QEMU: the test speaks the control channel itself, on a real swtpm."""

from __future__ import annotations

import array
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import trio

from rayos_tpm import command, control, key, pcr
from rayos_tpm.control import Control, ControlRequest
from rayos_tpm.emulator import Emulator
from rayos_tpm.errors import Unavailable
from rayos_tpm.protocol import TpmState
from tests.integration.tpm.machine import Bench

OpenBench = Callable[..., AbstractAsyncContextManager[Bench]]


@dataclass(slots=True)
class FakeQemu:
    """The emulator protocol's other side."""

    control: trio.SocketStream
    data: trio.SocketStream

    async def ask(self, request: ControlRequest | bytes) -> bytes:
        """Send a control request, return the reply."""
        await self.control.send_all(request if isinstance(request, bytes) else request.pack())
        with trio.fail_after(10):
            return bytes(await self.control.receive_some())

    async def send(self, frame: bytes) -> bytes:
        """Send a TPM command, return the answer."""
        await self.data.send_all(frame)
        with trio.fail_after(10):
            return bytes(await self.data.receive_some())


async def hand_over(stream: trio.SocketStream) -> tuple[bytes, trio.SocketStream]:
    """SET_DATAFD with a fresh pair: the reply and our end."""
    ours, theirs = socket.socketpair()
    with theirs:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [theirs.fileno()]))
        await stream.socket.sendmsg([ControlRequest(Control.SET_DATAFD).pack()], [rights])
        reply = bytes(await stream.receive_some())
    return reply, trio.SocketStream(trio.socket.from_stdlib_socket(ours))


@asynccontextmanager
async def attached(bench: Bench, **options: Any) -> AsyncIterator[tuple[FakeQemu, Any]]:
    """A fake QEMU on a fresh TPM."""
    tpm = await bench.start_tpm(**options)
    try:
        async with await trio.open_unix_socket(tpm.qemu_socket) as stream:
            reply, data = await hand_over(stream)
            assert reply == bytes(4)
            async with data:
                yield FakeQemu(stream, data), tpm
    finally:
        await tpm.stop()


async def test_first_startup_alone_is_rewritten(open_bench: OpenBench) -> None:
    """The firmware's Startup succeeds once for each INIT; a second one hears the truth."""
    async with open_bench() as bench, attached(bench) as (qemu, _tpm):
        for _ in range(2):
            for _ in range(2):  # SeaBIOS reboots with two INITs
                assert await qemu.ask(ControlRequest(Control.STOP)) == bytes(4)
                assert await qemu.ask(control.init()) == bytes(4)
            assert await qemu.send(command.startup()) == command.error_response(0)
            assert await qemu.send(command.startup()) == command.error_response(command.RC_INITIALIZE)


async def test_resume_of_suspended_firmware_is_not_rewritten(open_bench: OpenBench) -> None:
    """Startup(STATE) asks for registers that are gone, and is told so."""
    async with open_bench() as bench, attached(bench) as (qemu, _tpm):
        assert await qemu.ask(control.init()) == bytes(4)
        state = command.command(command.Code.Startup, parameters=b"\0\1")
        assert await qemu.send(state) == command.error_response(command.RC_INITIALIZE)


async def test_frames_that_lie_about_their_size_never_reach_the_tpm(open_bench: OpenBench) -> None:
    """Short, long and cut frames are answered with an error each, and the next command works."""
    async with open_bench() as bench, attached(bench, profile="host-reserved") as (qemu, tpm):
        reply = await qemu.ask(control.set_buffer_size(0xF80))
        assert struct.unpack(">IIII", reply)[:2] == (0, 0xF80)
        assert await qemu.ask(control.init()) == bytes(4)
        refused = command.error_response(command.RC_COMMAND_SIZE)
        assert await qemu.send(b"\x80") == refused
        assert await qemu.send(command.HEADER.pack(0x8001, 4, 0x144)) == refused
        for size in (4000, 0xFFFFFFFF):  # QEMU sends what its buffer holds
            assert await qemu.send(command.HEADER.pack(0x8001, size, 0x144) + bytes(0xF80 - 10)) == refused
        values = command.parse_pcr_read(command.checked("PCR_Read", await qemu.send(command.pcr_read([17]))))
        assert values == await tpm.client.pcrs([17])


async def test_guest_cannot_reach_the_hosts_register(open_bench: OpenBench) -> None:
    """Localities from 2 on and the D-RTM commands are refused; register 17 cannot be extended or reset."""
    async with open_bench() as bench, attached(bench, profile="host-reserved") as (qemu, tpm):
        assert await qemu.ask(control.init()) == bytes(4)
        before = await tpm.client.pcrs([17])
        for locality in (2, 3, 4, 255):
            assert (
                control.result(await qemu.ask(control.set_locality(locality))) == control.RESULT_BAD_LOCALITY
            )
        assert await qemu.ask(control.set_locality(1)) == bytes(4)
        for request in (
            ControlRequest(Control.HASH_START),
            control.hash_data(b"x"),
            ControlRequest(Control.HASH_END),
        ):
            assert control.result(await qemu.ask(request)) == control.RESULT_BAD_ORDINAL
        assert command.parse_response(await qemu.send(command.pcr_extend(17, bytes(32)))).code == 0x907
        reset = command.command(command.Code.PCR_Reset, handles=[17], auths=[command.password()])
        assert command.parse_response(await qemu.send(reset)).code == 0x907
        assert await tpm.client.pcrs([17]) == before
        assert await tpm.client.extend("late", bytes(32)) == 17
        assert (await tpm.client.pcrs([17]))[17] == pcr.extend(before[17], bytes(32))


async def test_second_data_descriptor_is_refused(open_bench: OpenBench) -> None:
    """One data channel; a request without a descriptor fails too."""
    async with open_bench() as bench, attached(bench) as (qemu, _tpm):
        reply, data = await hand_over(qemu.control)
        assert control.result(reply) == control.RESULT_FAIL
        await data.aclose()
        assert control.result(await qemu.ask(ControlRequest(Control.SET_DATAFD))) == control.RESULT_FAIL


@pytest.mark.parametrize("nonsense", [struct.pack(">I", 99), struct.pack(">IIII", 13, 0, 2, 0xFFFFFFFF)])
async def test_unknown_control_command_ends_the_conversation(open_bench: OpenBench, nonsense: bytes) -> None:
    """A command that cannot be framed is answered and hung up on; swtpm stores its state and the TPM ends."""
    async with open_bench() as bench, attached(bench) as (qemu, tpm):
        assert control.result(await qemu.ask(nonsense)) == control.RESULT_BAD_ORDINAL
        assert await qemu.control.receive_some() == b""
        with trio.fail_after(10):
            await tpm.process.wait()
        assert (await tpm.client.status()).state is TpmState.ENDED


async def test_requests_in_pieces_and_in_one_go(open_bench: OpenBench) -> None:
    """Framing does not depend on how the bytes arrive."""
    async with open_bench() as bench, attached(bench) as (qemu, _tpm):
        for byte in control.init().pack():
            await qemu.control.send_all(bytes([byte]))
        assert await qemu.control.receive_some() == bytes(4)
        await qemu.control.send_all(ControlRequest(Control.STOP).pack() + control.init().pack())
        answers = b""
        with trio.fail_after(10):
            while len(answers) < 8:
                answers += await qemu.control.receive_some()
        assert answers == bytes(8)


async def test_garbage_as_restored_state_fails_closed(open_bench: OpenBench) -> None:
    """A volatile blob that swtpm cannot take is never followed by an unmeasured guest."""
    async with open_bench() as bench, attached(bench) as (qemu, tpm):
        blob = ControlRequest(Control.SET_STATEBLOB, struct.pack(">III", 1, 2, 64) + bytes(64))
        set_result = control.result(await qemu.ask(blob))
        init_result = control.result(await qemu.ask(control.init(flags=control.INIT_DELETE_VOLATILE)))
        status = await tpm.client.status()
        assert (set_result, init_result) != (0, 0)
        assert init_result == 0 or status.state is TpmState.FAILED


async def test_guest_that_holds_all_object_slots_gets_no_crash(open_bench: OpenBench) -> None:
    """With the TPM's slots full a quote may be unavailable; it works again once the guest lets go."""
    async with open_bench() as bench, attached(bench) as (qemu, tpm):
        assert await qemu.ask(control.init()) == bytes(4)
        handles = []
        while True:
            answer = command.parse_response(
                await qemu.send(key.create_primary(command.RH_OWNER, key.AK_TEMPLATE))
            )
            if answer.code:
                break
            handles.append(answer.handle)
        try:
            await tpm.client.quote(b"n")
        except Exception as error:
            assert "attestation unavailable" in str(error)
        for handle in handles:
            assert await qemu.send(key.flush_context(handle)) == command.error_response(0)
        assert (await tpm.client.quote(b"n")).nonce == b"n"
        assert (await tpm.client.status()).state is TpmState.MEASURED


async def test_cancel_in_the_middle_of_a_long_command(open_bench: OpenBench) -> None:
    """An RSA key, cancelled while it is made: both are answered, and so are the quotes that waited."""
    async with open_bench() as bench, attached(bench) as (qemu, tpm):
        assert await qemu.ask(control.init()) == bytes(4)
        attributes = (
            key.FIXED_TPM | key.FIXED_PARENT | key.SENSITIVE_DATA_ORIGIN | key.USER_WITH_AUTH | key.SIGN
        )
        template = struct.pack(">HHI", command.ALG_RSA, command.ALG_SHA256, attributes) + command.sized(b"")
        template += struct.pack(">HHHI", command.ALG_NULL, command.ALG_NULL, 2048, 0) + command.sized(b"")
        await qemu.data.send_all(key.create_primary(command.RH_OWNER, template))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tpm.client.quote, b"n")
            assert await qemu.ask(ControlRequest(Control.CANCEL_TPM_CMD)) == bytes(4)
            with trio.fail_after(60):
                answer = command.parse_response(bytes(await qemu.data.receive_some()))
        assert answer.code in (0, command.RC_CANCELED)


async def test_stalled_swtpm_is_given_up() -> None:
    """An answer that never comes fails the TPM; its late answer is not taken for another's."""
    ours, theirs = socket.socketpair()
    with theirs:
        emulator = Emulator(trio.socket.from_stdlib_socket(ours))
        with pytest.raises(Unavailable, match=r"within 0\.05 s"):
            await emulator.ask(ControlRequest(Control.STOP), limit_s=0.05)
        theirs.send(bytes(4))
        with pytest.raises(Unavailable, match="is lost"):
            await emulator.ask(control.init())
        emulator.close()
