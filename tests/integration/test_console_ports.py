"""The console as a Linux guest and two people have it: ports by name, size, emergency output, times, one writer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trio

from rayos_vmm.cli.cast import Asciicast
from rayos_vmm.config.spec import Console, Gpu, Net, VmSpec
from rayos_vmm.errors import Invalid
from rayos_vmm.hardware.client import KeeperClient
from rayos_vmm.hardware.keeper import WorkerHardware
from rayos_vmm.service.service import Service
from rayos_vmm.shared.timed import Span
from tests.integration.service_lab import home, lab, running
from tests.integration.test_display import built

pytestmark = [pytest.mark.guest, pytest.mark.root]

SPEC = VmSpec(
    name="svc",
    net=Net(enabled=False),
    tpm=False,
    gpu=Gpu(enabled=False),
    console=Console(ports=("com.example.data", "x")),
)
DATA = 3


async def succeed(service: Service, command: str) -> str:
    result = await service.guests.exec("svc", command, 30)
    assert result.exit_status == 0, result
    return result.stdout.decode()


async def pieces_of(service: Service, port: int, since: int = 0) -> list[Span]:
    async with service.guests.console_pieces("svc", port, since) as pieces:
        return [piece async for piece in pieces]


async def until_said(service: Service, port: int, wanted: bytes) -> None:
    said = b""
    with trio.fail_after(30):
        async with service.guests.console_stream("svc", port, 0) as chunks:
            async for _, data in chunks:
                said += data
                if wanted in said:
                    return


async def test_ports_size_emergency_and_times(tmp_path: Path) -> None:
    """Named ports both ways, also over a kill; the terminal's size; emerg_wr; and when each byte came."""
    async with home() as paths, lab(paths, hardware=WorkerHardware()) as service:
        with pytest.raises(Invalid, match=r"console\.ports: .*each name at most once"):
            await service.machines.define(VmSpec(name="bad", console=Console(ports=("org.rayos.log",))))
        await running(service, SPEC)
        names = await succeed(service, "cat /sys/class/virtio-ports/vport*p*/name")
        assert names.split()[-2:] == ["com.example.data", "x"]
        node = "/dev/virtio-ports/com.example.data"
        await succeed(service, f"test -c {node} || ln -s /dev/vport*p{DATA} {node}")
        await succeed(
            service, f"(head -c 4 {node} > /tmp/got; printf 'back\\377' > {node}) >/dev/null 2>&1 &"
        )
        keeper = KeeperClient(paths.vm_runtime("svc"))
        await keeper.kill_worker()
        await service.guests.console_write("svc", DATA, b"\x00\x01\xfe\xff")
        await until_said(service, DATA, b"back\xff")
        assert await service.guests.read_file("svc", "/tmp/got") == b"\x00\x01\xfe\xff"

        await service.guests.console_resize("svc", 0, 132, 43)
        await service.guests.console_write("svc", 0, b"stty size; sleep 0.3; echo l$((1))ter\n")
        await until_said(service, 0, b"l1ter")
        ports = {one.port: one for one in await service.guests.console_ports("svc")}
        assert (ports[0].columns, ports[0].rows, ports[DATA].name) == (132, 43, "com.example.data")
        said = await pieces_of(service, 0)
        assert b"43 132" in b"".join(piece.data for piece in said)

        await service.guests.write_file("svc", "/tmp/peripherals", built(tmp_path), 0o755)
        await succeed(service, "/tmp/peripherals emergency HELP")
        await until_said(service, 0, b"HELP")
        await keeper.kill_worker()
        keeper.close()

        before = b"".join(piece.data for piece in said)
        again = await pieces_of(service, 0)
        whole = b"".join(piece.data for piece in again)
        assert whole.startswith(before) and whole.count(b"HELP") == 1
        assert [piece.offset for piece in again] == [0, *(p.offset + len(p.data) for p in again)][
            : len(again)
        ]
        size = next(piece.time for piece in again if b"43 132" in piece.data)
        later = next(piece.time for piece in again if b"l1ter" in piece.data)
        assert later - size >= 0.2 and [p.time for p in again] == sorted(p.time for p in again)
        cast = Asciicast("svc")
        lines = (b"".join(map(cast.feed, again)) + cast.finish()).splitlines()[1:]
        assert b"".join(json.loads(line)[2].encode("utf-8", "surrogateescape") for line in lines) == whole
        async with service.guests.console_stream("svc", 0, 0) as chunks:
            assert (await anext(chunks))[1] == whole
