"""A device of a real, sandboxed worker as a test sees it: a vhost-user session, and the worker's control socket.

`Controlled` is a `Rig`'s target; the `Seen…` classes have the names of the backends' own attributes, read from outside,
so that a hostile case reads the same for a backend in this process.
"""

from __future__ import annotations

import array
import fcntl
import os
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, Self

import pytest

from rayos_devices.console.port import PENDING_BYTES
from rayos_devices.console.wire import CONFIG
from rayos_devices.gpu.scanout import ScanoutFrame
from rayos_devices.input.model import KINDS, Event
from rayos_devices.input.wire import CONFIG_BYTES, Led
from rayos_devices.net.backend import NetBackend
from rayos_devices.net.port import open_tap
from rayos_devices.net.wire import HEADER_BYTES
from rayos_devices.vhost_user.message import FrontendRequest
from rayos_vmm.shared import packet
from rayos_vmm.shared.spec import CONTROL_SOCKET, Device, Firewall
from tests.framework.frontend import ANSWER_TIMEOUT, Frontend
from tests.framework.gpu import CONTROL_QUEUE_SIZE, GpuGuest
from tests.framework.guest_memory import GuestRam
from tests.framework.kept import Kept
from tests.framework.target import Rig, Stepped
from tests.framework.wire import Wire

#: What a worker may take beside the memory of its guest and of its devices.
RSS_LIMIT: Final = 256 << 20

_SIOCSIFFLAGS: Final = 0x8914
_SIOCSIFMTU: Final = 0x8922
_IFF_UP: Final = 1
_ALL: Final = 3
_TUNGETIFF: Final = 0x800454D2
_ETHERNET_BYTES: Final = 14


class Controlled:
    """One device of a `Kept`."""

    def __init__(self, kept: Kept, device: str) -> None:
        self.kept = kept
        self.device = device
        self._session: Frontend | None = None
        self._control: socket.socket | None = None

    def connect(self) -> Frontend:
        self._session = self.kept.connect(self.device)
        return self._session

    @property
    def session(self) -> Frontend:
        """The newest."""
        assert self._session is not None
        return self._session

    def settle(self) -> None:
        """The worker's loop went round, twice: it saw every kick, whatever it looked at first."""
        self.ask("polling")
        self.ask("polling")

    def ask(self, op: str, data: bytes = b"", **fields: Any) -> tuple[dict[str, Any], bytes, list[int]]:
        """An operation of the worker's control socket; again from its successor, where it dies."""
        request = packet.encode({"id": 1, "op": op, "device": self.device, **fields}, data)
        deadline = time.monotonic() + ANSWER_TIMEOUT
        while True:
            try:
                return self._ask(request)
            except (ConnectionError, EOFError):
                self._hang_up()
                assert time.monotonic() < deadline, "no worker answers"

    def _ask(self, request: bytes) -> tuple[dict[str, Any], bytes, list[int]]:
        if self._control is None:
            self._control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._control.settimeout(ANSWER_TIMEOUT)
            self._control.connect(str(self.kept.run_dir / CONTROL_SOCKET))
        self._control.send(request)
        answer, ancillary, _, _ = self._control.recvmsg(packet.MAX_PACKET_BYTES, socket.CMSG_SPACE(4))
        if not answer:
            raise EOFError
        fds = array.array("i")
        for _, _, content in ancillary:
            fds.frombytes(content)
        return *packet.decode(answer), list(fds)

    def _hang_up(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None

    def snapshot(self) -> dict[str, Any]:
        """The device's counters."""
        found: dict[str, Any] = self.ask("stats")[0]["stats"][self.device]
        return found

    def close(self) -> None:
        self._hang_up()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Seen:
    """The counters of every backend, told from their values when this was made."""

    def __init__(self, target: Controlled) -> None:
        self.target = target
        before = target.snapshot()
        self._queues_before = before["queues"]
        self._before = {"denials": before["denials"], **before.get("firewall", {})}

    def _since(self, counts: dict[str, int], which: str) -> dict[str, int]:
        grown = {why: count - self._before[which].get(why, 0) for why, count in counts.items()}
        return {why: count for why, count in grown.items() if count}

    def snapshot(self) -> dict[str, Any]:
        now = self.target.snapshot()
        return {**now, "denials": self._since(now["denials"], "denials")}

    @property
    def queues(self) -> list[SimpleNamespace]:
        return [
            SimpleNamespace(
                broken=now["broken"],
                requests=now["requests"] - before["requests"],
                chain_errors=now["chain_errors"] - before["chain_errors"],
            )
            for now, before in zip(self.snapshot()["queues"], self._queues_before, strict=True)
        ]


class SeenInput(Seen):
    def __init__(self, target: Controlled) -> None:
        super().__init__(target)
        self.kind = KINDS[target.device]

    @property
    def leds(self) -> int:
        return sum(1 << Led[name.upper()] for name in self.snapshot()["leds"])

    def inject(self, events: Sequence[Event]) -> None:
        """As many as there is room for, which must be all."""
        head, _, _ = self.target.ask("inject", events=events)
        assert head["accepted"] == len(events), head

    def write_config(self, offset: int, data: bytes) -> None:
        self.target.session.set_config(offset, data)

    def config_space(self) -> bytes:
        return self.target.session.get_config(0, CONFIG_BYTES)


class SeenConsole(Seen):
    """Bytes of output are counted from when this was made."""

    def __init__(self, target: Controlled) -> None:
        super().__init__(target)
        self._totals_before = [port["output_bytes"] for port in self.snapshot()["ports"]]

    def config_space(self) -> bytes:
        return self.target.session.get_config(0, CONFIG.size)

    def pack_state(self) -> bytes:
        """Packs all that a message could have changed."""
        return repr(self.snapshot()["ports"]).encode()

    def ports(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.target.ask("console.ports")[0]["ports"]
        return found

    def total(self, port: int) -> int:
        return int(self.snapshot()["ports"][port]["output_bytes"] - self._totals_before[port])

    def read(self, port: int, offset: int, limit: int) -> tuple[int, bytes]:
        """All answers in a row, as far as `limit` goes."""
        before, found, start = self._totals_before[port], b"", -1
        while len(found) < limit:
            head, data, _ = self.target.ask(
                "console.read", port=port, offset=before + offset + len(found), wait=False
            )
            start = head["offset"] - before if start < 0 else start
            offset = start
            if not data:
                break
            found += data
        return start, found

    def write(self, port: int, data: bytes) -> int:
        """0 when there is no room, where the worker would have its answer wait."""
        if self.snapshot()["ports"][port]["waiting_bytes"] == PENDING_BYTES:
            return 0
        return int(self.target.ask("console.write", data, port=port)[0]["accepted"])

    def resize(self, port: int, columns: int, rows: int) -> None:
        self.target.ask("console.resize", port=port, columns=columns, rows=rows)


class RealInput(Controlled):
    """The input device of a `Kept` whose name is its kind."""

    def __init__(self, kept: Kept, device: str) -> None:
        super().__init__(kept, device)
        self.backend = SeenInput(self)


class RealConsole(Controlled):
    def __init__(self, kept: Kept, device: str = "console") -> None:
        super().__init__(kept, device)
        self.backend = SeenConsole(self)


class TapWire:
    """A `Wire` that is a tap's other side: a packet socket on its link, which is for nobody else."""

    #: Bytes of a frame that the kernel lets through.
    longest: Final = 65535

    def __init__(self, link: str) -> None:
        Path(f"/proc/sys/net/ipv6/conf/{link}/disable_ipv6").write_text("1")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            for request, value in (
                (_SIOCSIFMTU, self.longest - _ETHERNET_BYTES),
                (_SIOCSIFFLAGS, _IFF_UP),
            ):
                fcntl.ioctl(sock, request, struct.pack("16si12x", link.encode(), value))
        self._sock = socket.socket(
            socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.htons(_ALL)
        )
        self._sock.bind((link, 0))
        self._sent: list[bytes] = []

    @property
    def sent(self) -> list[bytes]:
        """Frames with a header of zeros: what was in theirs is done."""
        with suppress(BlockingIOError):
            while True:
                data, address = self._sock.recvfrom(1 << 17)
                if address[2] != socket.PACKET_OUTGOING:
                    self._sent.append(bytes(HEADER_BYTES) + data)
        return self._sent

    def forget(self) -> None:
        self.sent.clear()

    def arrive(self, *frames: bytes) -> None:
        for frame in frames:
            self._sock.send(frame[HEADER_BYTES:])

    def close(self) -> None:
        self._sock.close()


class SeenNet(Seen):
    def snapshot(self) -> dict[str, Any]:
        found = super().snapshot()
        if "firewall" in found:
            found["firewall"]["reasons"] = self._since(found["firewall"]["reasons"], "reasons")
        return found


class RealNet(Controlled):
    def __init__(self, kept: Kept, device: str = "net") -> None:
        super().__init__(kept, device)
        self.backend = SeenNet(self)


def other_side(target: Stepped[NetBackend] | RealNet, request: pytest.FixtureRequest) -> Wire | TapWire:
    """Of the card of a test whose real one's tap is the fixture `tap`."""
    if isinstance(target, Stepped):
        port = target.backend.ports[0]
        assert isinstance(port, Wire)
        return port
    tap: TapWire = request.getfixturevalue("tap")[1]
    tap.forget()
    return tap


@contextmanager
def tapped_card(directory: Path, firewall: Firewall | None = None) -> Iterator[tuple[Kept, TapWire]]:
    """A sandboxed worker with the network card `net`, and the other side of its tap; `Bounds.check`s at the end."""
    fds = open_tap("hostile%d")
    link = struct.unpack_from("16s", fcntl.ioctl(fds[0], _TUNGETIFF, bytes(40)))[0].rstrip(b"\0").decode()
    device = Device(kind="net", name="net", queue_fds=tuple(fds), firewall=firewall)
    with Kept(directory, [device]) as kept, closing(TapWire(link)) as wire:
        for fd in fds:
            os.close(fd)
        bounds = Bounds(kept, ["net"])
        yield kept, wire
        bounds.check()


class SeenGpu(Seen):
    def __init__(self, target: Controlled) -> None:
        super().__init__(target)
        self._sent_before = self.snapshot()["display"]["bytes"]

    @property
    def heap(self) -> SimpleNamespace:
        memory = self.snapshot()["memory"]
        return SimpleNamespace(used_bytes=memory["used_bytes"], size_bytes=memory["quota_bytes"])

    @property
    def damage_serial(self) -> int:
        return int(self.snapshot()["damage_serial"])

    @property
    def screen(self) -> SimpleNamespace:
        shown = self.snapshot()["display"]
        sent = shown["bytes"] - self._sent_before
        return SimpleNamespace(
            display=SimpleNamespace(sent_bytes=sent, error=shown["error"], is_connected=shown["connected"])
        )

    def cursor(self) -> Any:
        return self.snapshot()["scanouts"][0]["cursor"]

    def frame(self) -> ScanoutFrame:
        head, _, (fd,) = self.target.ask("gpu.frame", scanout=0, cursor=False)
        with os.fdopen(fd, "rb") as file:
            file.seek(0)
            return ScanoutFrame(head["width"], head["height"], head["stride"], file.read(), head["serial"])

    def take_gpu_socket(self, fd: int) -> bool:
        self.target.session.tell(FrontendRequest.GPU_SET_SOCKET, fds=[fd])
        os.close(fd)
        return True


class RealGpuGuest(GpuGuest):
    """A guest of the GPU `gpu<scanouts>` of a `Kept`, in the mode and with the quota that it asks for."""

    def __init__(
        self,
        kept: Kept,
        *,
        ram_bytes: int = 8 << 20,
        width: int = 64,
        height: int = 48,
        scanouts: int = 1,
        quota_bytes: int = 1 << 20,
    ) -> None:
        self.link = Controlled(kept, f"gpu{scanouts}")
        self.link.ask("limit", limits={"memory": quota_bytes})
        self.rig = Rig(self.link, 2, size=CONTROL_QUEUE_SIZE, ram=GuestRam(ram_bytes))
        self.link.ask("gpu.resize", scanout=0, width=width, height=height)
        self._seen = SeenGpu(self.link)
        self.fence = 0

    @property
    def backend(self) -> SeenGpu:  # type: ignore[override]
        return self._seen

    def heap_blocks(self) -> int:
        keeper = self.link.kept.status()["pid"]
        name = f"memfd:rayos-{self.link.device}-pixels"
        (blocks,) = {
            status.st_ino: status.st_blocks
            for fd in Path(f"/proc/{keeper}/fd").iterdir()
            if name in str(fd.readlink()) and (status := fd.stat())
        }.values()
        return blocks

    def check_session(self) -> None:
        assert self.rig.frontend.ask_u64(FrontendRequest.GET_QUEUE_NUM) == 2

    def crash(self, queues: Sequence[int] = ()) -> None:
        """Kill the worker with -9."""
        self.link.kept.ask("kill_worker")

    def close(self) -> None:
        self.rig.close()
        self.link.close()


class Bounds:
    """Descriptors and mappings of keeper and worker now, without a session; `check` says whether there are no more
    later.
    """

    def __init__(self, kept: Kept, devices: Sequence[str]) -> None:
        self._kept = kept
        for device in devices:
            self._visit(device)
        self._fds = self._open()

    def _visit(self, device: str) -> None:
        self._kept.connect(device).close()
        with self._kept.connect(device) as frontend:
            frontend.ask_u64(FrontendRequest.GET_QUEUE_NUM)

    def _pids(self) -> list[int]:
        status = self._kept.status()
        assert all(layer["on"] for layer in status["sandbox"].values()), status["sandbox"]
        return [status["pid"], status["worker_pid"]]

    def _open(self) -> int:
        return sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in self._pids())

    def check(self) -> None:
        """Errors: AssertionError when a worker died that no test killed, or something was left."""
        assert self._kept.status()["restarts"] == self._kept.killed, "a worker died"
        deadline = time.monotonic() + ANSWER_TIMEOUT
        while self._open() > self._fds:
            assert time.monotonic() < deadline, "descriptors were left open"
            time.sleep(0.001)
        for pid in self._pids():
            assert "guest-ram" not in Path(f"/proc/{pid}/maps").read_text(), "memory is still mapped"
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            assert pages * os.sysconf("SC_PAGESIZE") < RSS_LIMIT
