"""The keeper: holds everything that must outlive a worker, and starts the next one.

It owns the sockets QEMU is connected to (through relays), the image and tap descriptors, and the memfds in which
devices keep their state. It parses nothing a guest wrote. A worker is a fork of it: the code is loaded, the descriptors
are there, so a successor serves within milliseconds. A worker that dies again and again within MIN_LIFE seconds is
restarted with growing pauses; more than DEGRADED_DEATHS in DEGRADED_SECONDS and the VM is reported degraded.
A death that was asked for counts as neither. A worker that lives and does not answer for SILENCE seconds is replaced.

A worker can be moved: it ends what it began, and its successor goes on where it stood, on other processors.

When QEMU has left and no service is connected for LINGER seconds, the keeper ends: nobody will come back.
"""

from __future__ import annotations

import array
import logging
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from rayos_devices.kinds import KINDS
from rayos_devices.loop import Loop
from rayos_devices.serve import listen
from rayos_devices.vhost_user.relay import Relay
from rayos_devices.virtio.packed import forget_position
from rayos_vmm.shared import packet
from rayos_vmm.shared.packet import Head
from rayos_vmm.shared.spec import CONTROL_SOCKET, KEEPER_SOCKET, Device, WorkerSpec, device_socket
from rayos_vmm.worker import sandbox
from rayos_vmm.worker.clients import Clients
from rayos_vmm.worker.main import run_worker
from rayos_vmm.worker.memory import DeviceMemory
from rayos_vmm.worker.sandbox import Report

log = logging.getLogger(__name__)

#: A worker that lived shorter died of something a restart does not cure.
MIN_LIFE: Final = 0.1
LONGEST_PAUSE: Final = 2.0
DEGRADED_DEATHS: Final = 5
DEGRADED_SECONDS: Final = 60.0
LINGER: Final = 15.0
#: Seconds that a worker has to hand over; then it is killed, which loses nothing either.
HAND_OVER_LIMIT: Final = 2.0
#: Seconds, counted by the keeper's own timer, in which a worker must answer; and from its fork until it can.
SILENCE: Final = 5
BIRTH: Final = 30
#: Connections of services at a time.
MAX_CLIENTS: Final = 8


class Keeper:
    """`run` until told to quit. Single-threaded, since it forks."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._run_dir = Path(spec.run_dir)
        self._run_dir_fd = os.open(spec.run_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._inherited = Report()
        self._layers: Head = {}
        self._loop = Loop()
        self._memory = [DeviceMemory.create(device) for device in spec.devices]
        self._paths: list[Path] = []
        self._sessions: dict[int, int] = {}
        self._control = self._listen_packets(CONTROL_SOCKET, 16)
        self._relays = {index: self._relay(index, device) for index, device in _relayed(spec)}
        self._accepting = self._listen_for_worker()
        self._own = self._listen_packets(KEEPER_SOCKET, 4)
        self._clients = Clients(self._loop, self._own, MAX_CLIENTS, self._answer)
        self._link: socket.socket | None = None
        self._worker_pid = 0
        self._pidfd = -1
        self._started_at = 0.0
        self._short_lives = 0
        self._deaths: deque[float] = deque(maxlen=DEGRADED_DEATHS + 1)
        self._is_asked_for = False
        self._unanswered = 0
        self.restarts = -1
        self.moves = 0
        self._cores: set[int] = set()  # none: any
        self._movers: list[tuple[int, Any]] = []  # who waits for a move: connection, request
        self._move_began = 0.0
        self._linger = 0
        self._was_connected = False

    # -- sockets -------------------------------------------------------------------------------------------------

    def _path(self, name: str) -> Path:
        path = self._run_dir / name
        self._paths.append(path)
        return path

    def _listen_packets(self, name: str, backlog: int) -> socket.socket:
        path = self._path(name)
        path.unlink(missing_ok=True)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.bind(str(path))
        path.chmod(0o600)
        sock.listen(backlog)
        sock.setblocking(False)
        return sock

    def _relay(self, index: int, device: Device) -> Relay:
        def connect(has_history: bool, config_writes: int) -> socket.socket | None:
            return self._connect_device(index, has_history, config_writes)

        listening = listen(self._path(device_socket(device.name)))
        journals = self._memory[index].journals

        def forget(queue: int) -> None:
            if journals:
                forget_position(journals[queue])

        return Relay(
            device.name, KINDS[device.kind].queue_count(device), listening, self._loop, connect, forget
        )

    def _listen_for_worker(self) -> list[list[socket.socket]]:
        return [[listen(self._path(name)) for name in device.own_sockets] for device in self._spec.devices]

    # -- the worker ----------------------------------------------------------------------------------------------

    def _spawn(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            self._become_worker(theirs)
        theirs.close()
        ours.setblocking(False)
        self._link = ours
        self._loop.register(ours.fileno(), self._link_ready)
        self._worker_pid = pid
        self._pidfd = os.pidfd_open(pid)
        self._loop.register(self._pidfd, self._worker_died)
        self._started_at = self._loop.now()
        self._unanswered = SILENCE - BIRTH
        if self._movers:
            self.moves += 1
        else:
            self.restarts += 1
        for relay in self._relays.values():
            relay.attach()
        self._tell({"event": "worker_started", "pid": pid, "restarts": self.restarts})
        self._answer_movers()

    def _become_worker(self, link: socket.socket) -> None:
        """In the child: keep only what a worker needs, serve, never return."""
        code = 1
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            kept = {0, 1, 2, link.fileno(), self._control.fileno()}
            kept.update(fd for device in self._spec.devices for fd in device.fds)
            kept.update(fd for memory in self._memory for fd in memory.fds)
            kept.update({self._spec.gate_fd, self._spec.accounts_fd} - {-1})
            kept.update(sock.fileno() for socks in self._accepting for sock in socks)
            _close_all_but(kept)
            if self._cores:
                os.sched_setaffinity(0, self._cores)
            run_worker(self._spec, link, self._control, self._memory, self._accepting, self._inherited)
            code = 0
        except BaseException:
            log.exception("worker died of an error of ours")
        finally:
            os._exit(code)

    def _connect_device(self, index: int, has_history: bool, config_writes: int) -> socket.socket | None:
        if self._link is None:
            return None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        # A worker may tell late of a session's end, when the next frontend is here already: it names the session.
        session = self._sessions[index] = self._sessions.get(index, 0) + 1
        head = packet.encode(
            {
                "op": "connect",
                "device": index,
                "session": session,
                "resume": has_history,
                "config_writes": config_writes,
            }
        )
        fds = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [theirs.fileno()]))]
        try:
            self._link.sendmsg([head], fds, socket.MSG_NOSIGNAL)
        except OSError:
            ours.close()
            return None
        finally:
            theirs.close()
        self._was_connected = True
        return ours

    def _link_ready(self, _events: int) -> None:
        assert self._link is not None
        try:
            data = self._link.recv(packet.MAX_PACKET_BYTES)
        except (BlockingIOError, ConnectionError):
            return
        if not data:
            self._loop.unregister(self._link.fileno())  # its death follows by the pidfd
            return
        head, _ = packet.decode(data)
        if head["op"] == "dropped":
            if self._sessions.get(head["device"]) == head["session"]:
                self._relays[head["device"]].drop(head["reason"])
        elif head["op"] == "event":
            self._tell(head["event"])
        elif head["op"] == "pong":
            self._unanswered = 0
        elif head["op"] == "confined":
            self._unanswered = 0
            self._confined(head["layers"])

    def _confined(self, layers: Head) -> None:
        """A worker told what holds it; what does not is in the log once, and in the status always."""
        absent = {name: layer["what"] for name, layer in layers.items() if not layer["on"]}
        if absent and self.restarts == 0:
            log.warning("the sandbox lacks: %s", "; ".join(f"{name} ({why})" for name, why in absent.items()))
        self._layers = layers

    def _worker_died(self, _events: int) -> None:
        _, status = os.waitpid(self._worker_pid, 0)
        code = os.waitstatus_to_exitcode(status)
        self._loop.unregister(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        self._layers = {}
        if self._link is not None:
            self._loop.unregister(self._link.fileno())
            self._link.close()
            self._link = None
        for relay in self._relays.values():
            relay.drain()
        pause = self._pause()
        if code == -signal.SIGSYS:
            log.error(
                "worker %d made a system call that no worker makes (class X, audit event 1326 of the kernel); "
                "RAYOS_SANDBOX=trap names it",
                self._worker_pid,
            )
        if self._movers:
            log.info("worker %d handed over", self._worker_pid)
        else:
            log.warning("worker %d ended with %d; the next starts in %.3f s", self._worker_pid, code, pause)
        self._tell(
            {"event": "worker_exited", "pid": self._worker_pid, "code": code, "degraded": self.is_degraded}
        )
        self._loop.call_at(self._loop.now() + pause, self._spawn)

    def _pause(self) -> float:
        """Seconds until the next start: none after a long life, doubling from 10 ms after short ones."""
        now = self._loop.now()
        asked_for, self._is_asked_for = self._is_asked_for, False
        if asked_for:
            return 0.0
        self._deaths.append(now)
        if now - self._started_at >= MIN_LIFE:
            self._short_lives = 0
            return 0.0
        self._short_lives += 1
        return min(LONGEST_PAUSE, 0.005 * 2.0**self._short_lives) if self._short_lives > 1 else 0.0

    @property
    def is_degraded(self) -> bool:
        recent = self._loop.now() - DEGRADED_SECONDS
        return sum(death > recent for death in self._deaths) > DEGRADED_DEATHS

    # -- services ------------------------------------------------------------------------------------------------

    def _answer(self, fd: int, head: Head, _data: bytes) -> bool:
        answers: dict[str, Callable[[], Head]] = {
            "status": self._status,
            "kill_worker": self._kill_worker,
            "quit": self._quit,
        }
        if head.get("op") == "move":
            self._move(fd, head)
            return True
        answer = answers.get(head.get("op", ""))
        reply = answer() if answer else {"error": f"unknown operation; known: {', '.join(answers)}"}
        self._send(self._clients.sockets[fd], {"id": head.get("id"), **reply})
        return True

    def _status(self) -> Head:
        return {
            "pid": os.getpid(),
            "worker_pid": self._worker_pid,
            "restarts": self.restarts,
            "moves": self.moves,
            "cores": sorted(self._cores),
            "degraded": self.is_degraded,
            "sandbox": self._layers,
            "connected": [relay.name for relay in self._relays.values() if relay.is_connected],
        }

    def _kill_worker(self) -> Head:
        if self._pidfd >= 0:
            self._is_asked_for = True
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        return {"worker_pid": self._worker_pid}

    def _move(self, fd: int, head: Head) -> None:
        """Have the worker end what it began, and the next one go on upon `cores`; the answer comes when it does."""
        cores, here = head.get("cores"), os.sched_getaffinity(0)
        if not isinstance(cores, list) or not cores or not all(core in here for core in cores):
            error = {"error": "bad_request", "message": f"cores {cores!r}; there are {sorted(here)}"}
            self._send(self._clients.sockets[fd], {"id": head.get("id"), **error})
            return
        self._cores = set(cores)
        self._movers.append((fd, head.get("id")))
        if len(self._movers) > 1 or self._link is None:
            return  # the successor is on its way
        self._move_began = self._loop.now()
        self._is_asked_for = True
        pidfd = self._pidfd
        with suppress(OSError):
            self._link.send(packet.encode({"op": "hand_over"}), socket.MSG_NOSIGNAL)

        def insist() -> None:
            if self._movers and self._pidfd == pidfd:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)

        self._loop.call_at(self._move_began + HAND_OVER_LIMIT, insist)

    def _answer_movers(self) -> None:
        movers, self._movers = self._movers, []
        pause_ms = round((self._loop.now() - self._move_began) * 1000, 3)
        for fd, request in movers:
            sock = self._clients.sockets.get(fd)
            if sock is not None:
                self._send(sock, {"id": request, "worker_pid": self._worker_pid, "pause_ms": pause_ms})

    def _quit(self) -> Head:
        self._loop.call_soon(self._loop.stop)
        return {}

    def _tell(self, event: Head) -> None:
        for sock in list(self._clients.sockets.values()):
            self._send(sock, event)

    @staticmethod
    def _send(sock: socket.socket, head: Head) -> None:
        # A service that does not read loses events; it finds the state by asking.
        try:
            sock.send(packet.encode(head), socket.MSG_NOSIGNAL)
        except OSError as error:
            log.debug("a service takes no packets: %s", error)

    def _check_worker(self) -> None:
        """Replace a worker that is stopped or hangs: it lives, serves nobody, and has not answered for SILENCE seconds.

        Counted in rounds of this timer, so that a machine that slept as a whole has missed one.
        """
        self._loop.call_at(self._loop.now() + 1.0, self._check_worker)
        if self._link is None or self._pidfd < 0:
            return
        if self._unanswered >= SILENCE:
            log.error("worker %d has not answered for %d s; it is replaced", self._worker_pid, SILENCE)
            self._tell({"event": "worker_silent", "pid": self._worker_pid, "seconds": SILENCE})
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            self._unanswered = SILENCE - BIRTH  # its end is told by its pidfd
            return
        self._unanswered += 1
        with suppress(OSError):  # full: it has not read those before either
            self._link.send(packet.encode({"op": "ping"}), socket.MSG_NOSIGNAL)

    def _check_linger(self) -> None:
        """End when everybody has been gone for LINGER seconds."""
        abandoned = self._was_connected and not self._clients.sockets
        if abandoned and not any(relay.is_connected for relay in self._relays.values()):
            self._linger += 1
            if self._linger >= LINGER:
                log.info("nobody is left")
                self._loop.stop()
        else:
            self._linger = 0
        self._loop.call_at(self._loop.now() + 1.0, self._check_linger)

    # -- life ----------------------------------------------------------------------------------------------------

    def run(self, ready: Callable[[], None]) -> None:
        """Serve; `ready` is called when the sockets exist and the first worker was started."""
        signal.signal(signal.SIGTERM, lambda *_: self._loop.call_soon(self._loop.stop))
        signal.set_wakeup_fd(_wakeup(self._loop))
        self._inherited = sandbox.confine_keeper(self._spec.sandbox)
        self._spawn()
        self._check_linger()
        self._check_worker()
        try:
            ready()
            self._loop.run()
        finally:
            self.close()

    def close(self) -> None:
        """Leave nothing behind: the worker, the sockets."""
        for relay in self._relays.values():
            relay.close()
        if self._pidfd >= 0:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            os.waitpid(self._worker_pid, 0)
        for path in self._paths:
            with suppress(FileNotFoundError):
                os.unlink(path.name, dir_fd=self._run_dir_fd)


def _relayed(spec: WorkerSpec) -> list[tuple[int, Device]]:
    return [(index, device) for index, device in enumerate(spec.devices) if not device.own_sockets]


def _wakeup(loop: Loop) -> int:
    """A descriptor that ends epoll when a signal comes, so that its handler runs."""
    read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def wake(_events: int) -> None:
        os.read(read, 64)

    loop.register(read, wake)
    return write


def _close_all_but(kept: set[int]) -> None:
    before = 0
    for fd in [*sorted(kept), os.sysconf("SC_OPEN_MAX")]:
        if fd > before:
            os.closerange(before, fd)
        before = fd + 1
