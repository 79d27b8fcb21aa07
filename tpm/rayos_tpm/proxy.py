"""Between QEMU and swtpm: measures before QEMU's TPM_Init is answered, and watches what follows.

QEMU speaks the control channel to us as if we were swtpm and hands over a data socket; each guest command
goes through here, one at a time. Rules, each with its reason:
* After a TPM_Init that restored nothing the launch is measured, and only then QEMU gets its answer. A failure
  is answered with result 9 and QEMU exits before the guest's first instruction.
* The first Startup(CLEAR) of the guest's firmware is answered with success: the TPM is started already, and
  SeaBIOS takes the truth (TPM_RC_INITIALIZE) for a broken TPM, measures nothing and disables it.
* After restored state nothing is injected: the registers came with it.
* One TPM_Init may follow another at once (SeaBIOS reboots with two); each starts the log over.
* Suspend to RAM is not supported: the firmware's Startup(STATE) finds a TPM that was started afresh.
"""

from __future__ import annotations

import array
import os
import socket
from typing import Final

import trio

from rayos_tpm import command, control
from rayos_tpm.command import Code
from rayos_tpm.control import Control, ControlRequest
from rayos_tpm.emulator import GUEST_LIMIT_S
from rayos_tpm.errors import MalformedMessage, TpmError, Unavailable
from rayos_tpm.guard import Guard
from rayos_tpm.protocol import TpmState

_CHUNK: Final = 65536
_DESCRIPTORS: Final = 4  # per message; QEMU sends one
_VOLATILE: Final = 2  # PTM_BLOB_TYPE_VOLATILE
_STARTUP_CLEAR: Final = command.startup()
_HOST_LOCALITY: Final = 2  # localities from here on may extend the dynamic registers
_SUCCESS: Final = command.error_response(command.RC_SUCCESS)
_REFUSED: Final = frozenset({Control.HASH_START, Control.HASH_DATA, Control.HASH_END})


class Proxy:
    """The conversation with one QEMU."""

    def __init__(self, guard: Guard, nursery: trio.Nursery) -> None:
        self._guard = guard
        self._nursery = nursery
        self._descriptors: list[int] = []
        self._is_restoring = False
        self._expects_startup = False
        self._has_data = False
        self._buffer_size = command.BUFFER_SIZE

    async def run_control(self, stream: trio.socket.SocketType) -> None:
        """Answer QEMU's control requests until it goes. Closes nothing but stray descriptors."""
        buffer = b""
        try:
            while True:
                try:
                    while (length := control.request_length(buffer)) is None or len(buffer) < length:
                        chunk = await self._receive(stream)
                        if not chunk:
                            return
                        buffer += chunk
                except MalformedMessage:
                    await _send(stream, control.pack_result(control.RESULT_BAD_ORDINAL))
                    return
                request, buffer = control.parse_request(buffer[:length]), buffer[length:]
                await _send(stream, await self._answer(request))
                if request.command is Control.SHUTDOWN:
                    return
        except OSError:  # QEMU died in the middle of a message
            return
        finally:
            for descriptor in self._descriptors:
                os.close(descriptor)
            self._descriptors.clear()

    async def _receive(self, stream: trio.socket.SocketType) -> bytes:
        space = socket.CMSG_SPACE(_DESCRIPTORS * array.array("i").itemsize)
        chunk, ancillary, _, _ = await stream.recvmsg(_CHUNK, space, socket.MSG_CMSG_CLOEXEC)
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                whole = array.array("i")
                whole.frombytes(data[: len(data) - len(data) % whole.itemsize])
                self._descriptors.extend(whole)
        return chunk

    async def _answer(self, request: ControlRequest) -> bytes:
        guard = self._guard
        try:
            match request.command:
                case Control.SET_DATAFD:
                    return self._accept_data()
                case Control.INIT:
                    return await self._initialize(request)
                case Control.SET_LOCALITY:
                    return await self._set_locality(request)
                case command_ if command_ in _REFUSED:
                    return control.pack_result(control.RESULT_BAD_ORDINAL)
                case Control.CANCEL_TPM_CMD:
                    # The command to cancel holds the turn, and swtpm answers after it.
                    return await guard.emulator.ask(request, limit_s=GUEST_LIMIT_S)
                case Control.SHUTDOWN:
                    guard.enter(TpmState.ENDED)  # first, so that swtpm's end is not taken for its death
                case Control.STOP:
                    self._is_restoring = self._expects_startup = False
                case Control.SET_STATEBLOB if int.from_bytes(request.body[4:8], "big") == _VOLATILE:
                    self._is_restoring = True
                case Control.GET_STATEBLOB if int.from_bytes(request.body[4:8], "big") == _VOLATILE:
                    guard.save_journal()
            if guard.state is TpmState.FAILED and request.command is not Control.SHUTDOWN:
                return control.pack_result(control.RESULT_FAIL)
            async with guard.turn:
                reply = await guard.emulator.ask(request)
            if request.command is Control.SET_BUFFERSIZE and control.result(reply) == control.RESULT_OK:
                self._buffer_size = min(int.from_bytes(reply[4:8], "big"), command.BUFFER_SIZE)
            return reply
        except TpmError as error:
            guard.enter(TpmState.FAILED, str(error))
            return control.pack_result(control.RESULT_FAIL)

    def _accept_data(self) -> bytes:
        if not self._descriptors or self._has_data:
            return control.pack_result(control.RESULT_FAIL)
        data = trio.socket.from_stdlib_socket(socket.socket(fileno=self._descriptors.pop(0)))
        self._has_data = True
        self._nursery.start_soon(self._run_data, data)
        return control.pack_result(control.RESULT_OK)

    async def _set_locality(self, request: ControlRequest) -> bytes:
        """The guest may not reach the localities that extend the host's own registers."""
        locality = request.body[0]
        if self._guard.profile.is_dynamic and locality >= _HOST_LOCALITY:
            return control.pack_result(control.RESULT_BAD_LOCALITY)
        async with self._guard.turn:
            reply = await self._guard.emulator.ask(request)
        if control.result(reply) == control.RESULT_OK:
            self._guard.locality = locality
        return reply

    async def _initialize(self, request: ControlRequest) -> bytes:
        guard = self._guard
        if guard.state is TpmState.FAILED:
            return control.pack_result(control.RESULT_FAIL)
        async with guard.turn:
            reply = await guard.emulator.ask(request)
            if (code := control.result(reply)) != control.RESULT_OK:
                guard.enter(TpmState.FAILED, f"swtpm refused TPM_Init with result {code:#x}")
                return reply
            if self._is_restoring:
                self._is_restoring = False
                await guard.resume()
            else:
                await guard.launch()
                self._expects_startup = True
        return reply

    async def _run_data(self, data: trio.socket.SocketType) -> None:
        """Pass the guest's commands on, one at a time, until QEMU closes its end."""
        try:
            with data:
                while frame := await _receive_frame(data, self._buffer_size):
                    await _send(data, await self._pass(frame))
        except OSError:
            return

    async def _pass(self, frame: bytes) -> bytes:
        """The answer to one guest command. A frame that lies about its size never reaches swtpm."""
        if len(frame) < command.HEADER.size or command.HEADER.unpack_from(frame)[1] != len(frame):
            return command.error_response(command.RC_COMMAND_SIZE)
        guard = self._guard
        async with guard.turn:
            if guard.state in (TpmState.FAILED, TpmState.ENDED):
                return command.error_response(command.RC_FAILURE)
            try:
                answer = await guard.emulator.transmit(frame, limit_s=GUEST_LIMIT_S)
            except (Unavailable, MalformedMessage) as error:
                guard.enter(TpmState.FAILED, str(error))
                return command.error_response(command.RC_FAILURE)
            guard.journal.observe(frame, answer)
        if int.from_bytes(frame[6:10], "big") == Code.Startup and self._expects_startup:
            self._expects_startup = False
            if frame == _STARTUP_CLEAR and answer == command.error_response(command.RC_INITIALIZE):
                return _SUCCESS
        return answer


async def _send(sock: trio.socket.SocketType, data: bytes) -> None:
    while data:
        data = data[await sock.send(data) :]


async def _receive_frame(data: trio.socket.SocketType, limit: int) -> bytes:
    """One command of at most limit bytes, or b"" at the end.

    QEMU sends what the guest wrote, at most a buffer full, and then waits for the answer; the size field may
    lie. So what is there is taken until the size field is satisfied or the buffer is full; a frame shorter
    than a header is taken as it is.
    """
    frame = await data.recv(limit)
    while command.HEADER.size <= len(frame) < limit:
        missing = min(command.HEADER.unpack_from(frame)[1], limit) - len(frame)
        if missing <= 0:
            break
        chunk = await data.recv(missing)
        if not chunk:
            return b""
        frame += chunk
    return frame
