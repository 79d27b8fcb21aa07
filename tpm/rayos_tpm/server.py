"""A VM's TPM process: swtpm, the proxy for QEMU, and the requests of the service, until QEMU is gone.

Started by rayos_tpm.spawner with two bound sockets, so both can be connected to from the first moment. It needs no
service: one that dies leaves it running, and the next one connects to the same control socket.
"""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import trio

from rayos_tpm import errors, host, nv, protocol, state
from rayos_tpm.emulator import Emulator
from rayos_tpm.errors import TpmError, Unavailable
from rayos_tpm.guard import Guard, StatusFile, nv_auth
from rayos_tpm.measurement import Measurement
from rayos_tpm.phase import Phase
from rayos_tpm.process import Process
from rayos_tpm.program import initialize, spawn_swtpm
from rayos_tpm.protocol import Answer, Config, Failure, Identity, TpmState
from rayos_tpm.proxy import Proxy

QEMU_SOCKET: Final = "tpm.sock"
CONTROL_SOCKET: Final = "tpm-control.sock"
_TELL_LIMIT_S: Final = 5.0  # how long a start that failed waits for somebody to ask why

_decode: Final = msgspec.json.Decoder(protocol.Request).decode


class Desk:
    """Answers the service's requests about one TPM."""

    def __init__(self) -> None:
        self.guard: Guard | None = None
        self.failure: TpmError | None = None
        self.is_decided = trio.Event()  # the start succeeded or failed
        self.told = trio.Event()  # somebody has heard that
        self.stop = trio.Event()

    async def serve(self, listener: trio.SocketListener) -> None:
        """Answer whoever connects. Never returns."""
        await trio.serve_listeners(self._converse, [listener])

    async def _converse(self, stream: trio.SocketStream) -> None:
        buffer = b""
        with contextlib.suppress(trio.BrokenResourceError, OSError):
            async with stream:
                async for chunk in stream:
                    buffer += chunk
                    while (end := buffer.find(b"\n")) >= 0:
                        line, buffer = buffer[:end], buffer[end + 1 :]
                        await stream.send_all(msgspec.json.encode(await self._answer(line)) + b"\n")
                    if len(buffer) > protocol.LINE_LIMIT:
                        return

    async def _answer(self, line: bytes) -> Answer:
        try:
            request = _decode(line)
            await self.is_decided.wait()
            if self.guard is None:
                raise self.failure or Unavailable("the TPM has not started")
            result = await _HANDLERS[type(request)](self, self.guard, request)
            return Answer(ok=msgspec.Raw(msgspec.json.encode(result)))
        except (TpmError, ValueError) as error:
            kind = type(error).__name__ if hasattr(errors, type(error).__name__) else "TpmError"
            return Answer(error=Failure(kind, str(error)))
        finally:
            self.told.set()


async def _ready(_desk: Desk, guard: Guard, _request: protocol.Ready) -> Identity:
    record = guard.record
    return Identity(record.vm_uuid, record.ak_public, record.ek_public, record.ek_certificate)


async def _status(_desk: Desk, guard: Guard, _request: protocol.GetStatus) -> protocol.Status:
    return guard.status()


async def _watch(_desk: Desk, guard: Guard, request: protocol.Watch) -> protocol.Status:
    await guard.wait_change(request.state)
    return guard.status()


async def _certify(_desk: Desk, guard: Guard, request: protocol.Certify) -> None:
    if len(request.certificate) > nv.CERTIFICATE_LIMIT:
        raise ValueError(
            f"a certificate of {len(request.certificate)} bytes; NV takes {nv.CERTIFICATE_LIMIT}"
        )
    guard.record = msgspec.structs.replace(guard.record, ek_certificate=request.certificate)
    state.finish(Path(guard.config.state_dir), guard.record)


async def _quote(_desk: Desk, guard: Guard, request: protocol.GetQuote) -> protocol.QuoteBundle:
    return (await guard.attest(request.nonce, request.pcrs)).bundle


async def _attest(_desk: Desk, guard: Guard, request: protocol.Attest) -> protocol.Attestation:
    return await guard.attest(request.nonce, request.pcrs)


async def _baseline(_desk: Desk, guard: Guard, _request: protocol.GetBaseline) -> protocol.Attestation:
    if guard.baseline is None:
        raise Unavailable(f"there is no baseline quote: the TPM is {guard.state}")
    return guard.baseline


async def _pcrs(_desk: Desk, guard: Guard, request: protocol.GetPcrs) -> dict[str, bytes]:
    guard.check_usable()
    async with guard.turn:
        values = await host.read_pcrs(guard.emulator, guard.indices(request.pcrs))
    return {str(index): values[index] for index in sorted(values)}


async def _log(_desk: Desk, guard: Guard, _request: protocol.GetLog) -> Any:
    return guard.log()


async def _extend(_desk: Desk, guard: Guard, request: protocol.Extend) -> int:
    guard.check_usable()
    measurement = Measurement(Phase.LAUNCH, request.description, request.digest)
    async with guard.turn:
        return await host.extend(guard.emulator, guard.journal, measurement, guard.locality)


async def _read_policy(_desk: Desk, guard: Guard, _request: protocol.ReadPolicy) -> bytes:
    guard.check_usable()
    async with guard.turn:
        return await host.read_policy(guard.emulator, guard.nv_auth)


async def _write_policy(_desk: Desk, guard: Guard, request: protocol.WritePolicy) -> None:
    guard.check_usable()
    async with guard.turn:
        await host.write_policy(guard.emulator, request.policy, guard.nv_auth)


async def _unseal(_desk: Desk, guard: Guard, request: protocol.Unseal) -> bytes:
    guard.check_usable()
    async with guard.turn:
        return await host.unseal_secret(guard.emulator, guard.indices(request.pcrs))


async def _activate(_desk: Desk, guard: Guard, request: protocol.Activate) -> bytes:
    guard.check_usable()
    async with guard.turn:
        return await host.activate(guard.emulator, request.blob, request.secret)


async def _device(_desk: Desk, guard: Guard, _request: protocol.GetDevice) -> protocol.DeviceInfo:
    guard.check_usable()
    async with guard.turn:
        return await host.device_info(guard.emulator)


async def _stop(desk: Desk, _guard: Guard, _request: protocol.Stop) -> None:
    desk.stop.set()


_HANDLERS: Final[dict[type, Callable[[Desk, Guard, Any], Awaitable[Any]]]] = {
    protocol.Ready: _ready,
    protocol.GetIdentity: _ready,
    protocol.GetStatus: _status,
    protocol.Watch: _watch,
    protocol.Certify: _certify,
    protocol.GetQuote: _quote,
    protocol.Attest: _attest,
    protocol.GetBaseline: _baseline,
    protocol.GetPcrs: _pcrs,
    protocol.GetLog: _log,
    protocol.Extend: _extend,
    protocol.ReadPolicy: _read_policy,
    protocol.WritePolicy: _write_policy,
    protocol.Unseal: _unseal,
    protocol.Activate: _activate,
    protocol.GetDevice: _device,
    protocol.Stop: _stop,
}


@dataclass(frozen=True, slots=True)
class Begun:
    """A swtpm that was started on checked state, and the socket by which it is asked.

    record: None when the TPM is fresh.
    """

    process: Process
    socket: socket.socket
    record: state.Record | None


def begin(config: Config, key: bytes) -> Begun:
    """Check the state directory and start swtpm on it: all that needs more rights than serving does. Blocking.

    TpmError: why the VM must not start.
    """
    directory = Path(config.state_dir)
    record = None if state.prepare(directory) else state.read_record(directory, config.vm_uuid)
    if record is None:
        state.begin(directory)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        try:
            process = spawn_swtpm(
                directory, sock=theirs, key=key, log=Path(config.log), launcher=config.launcher
            )
        except BaseException:
            ours.close()
            raise
    return Begun(process, ours, record)


async def run_server(
    config: Config,
    key: bytes,
    begun: Begun | TpmError,
    qemu_listener: socket.socket,
    control_listener: socket.socket,
    status_fd: int,
) -> None:
    """Serve one VM's TPM until QEMU is gone, the service stops it, SIGTERM comes, or QEMU never came.

    Leaves no swtpm, and neither of the two sockets where it may remove them.
    """
    desk = Desk()
    qemu = trio.socket.from_stdlib_socket(qemu_listener)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(desk.serve, trio.SocketListener(trio.socket.from_stdlib_socket(control_listener)))
        nursery.start_soon(_stop_on_signal, desk)
        try:
            if isinstance(begun, TpmError):
                raise begun
            guard = await _open_guard(config, key, begun, StatusFile(status_fd))
        except TpmError as error:
            desk.failure = error
            desk.is_decided.set()
            with trio.move_on_after(_TELL_LIMIT_S):
                await desk.told.wait()
        else:
            guard.enter(TpmState.WAITING)
            desk.guard = guard
            desk.is_decided.set()
            try:
                await _run_until_over(desk, guard, qemu)
            finally:
                with trio.CancelScope(shield=True):
                    await guard.stop_swtpm()
        finally:
            for name in (QEMU_SOCKET, CONTROL_SOCKET):
                with contextlib.suppress(OSError):  # confined, it does not see them: the service removes them
                    (Path(config.run_dir) / name).unlink(missing_ok=True)
        nursery.cancel_scope.cancel()


async def _stop_on_signal(desk: Desk) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            desk.stop.set()


async def _run_until_over(desk: Desk, guard: Guard, listener: trio.socket.SocketType) -> None:
    async with trio.open_nursery() as nursery:

        async def serve_qemu() -> None:
            with trio.move_on_after(guard.config.connect_limit_s) as waiting:
                stream, _ = await listener.accept()
            if not waiting.cancelled_caught:
                listener.close()
                with stream:
                    await Proxy(guard, nursery).run_control(stream)
            nursery.cancel_scope.cancel()

        async def stop_on_request() -> None:
            await desk.stop.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(serve_qemu)
        nursery.start_soon(stop_on_request)
        nursery.start_soon(guard.watch_swtpm)
        if guard.config.quote_interval_s > 0:
            nursery.start_soon(guard.quote_periodically)


async def _open_guard(config: Config, key: bytes, begun: Begun, status_file: StatusFile) -> Guard:
    """swtpm stopped and waiting for QEMU's TPM_Init. A fresh TPM is set up."""
    directory, log, record = Path(config.state_dir), Path(config.log), begun.record
    emulator = Emulator(trio.socket.from_stdlib_socket(begun.socket))
    try:
        await emulator.open_data()
        await initialize(emulator, directory, log)
        if record is None:
            record = await host.provision(emulator, config.vm_uuid, nv_auth(key))
            state.finish(directory, record)
        await emulator.order(host.STOP)
        return Guard(config, emulator, begun.process, record, key, status_file)
    except BaseException:
        emulator.close()
        with trio.CancelScope(shield=True):
            await begun.process.stop(grace_s=0.5)
        raise
