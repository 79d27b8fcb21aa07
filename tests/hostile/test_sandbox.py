"""A device worker that was taken over: twenty ways out, each of which works outside and none of which works inside.

Every probe runs for real, in a process that confined itself with the production code; outside it runs as root, so a
probe that is broken fails the test rather than passing it. Needs root.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from rayos_devices.uring import Uring
from rayos_vmm.host.system_calls import system_calls
from rayos_vmm.shared.spec import Device
from rayos_vmm.worker import sandbox, seccomp
from tests.framework.frontend import Dropped
from tests.framework.guest_memory import GuestRam
from tests.framework.kept import Kept, Link
from tests.framework.probe import attempt
from tests.framework.target import Rig

#: Users that no machine has: past the slots.
UID: Final = 1_900_090_000
BOUNDS: Final = sandbox.Bounds(UID, devices=1, memory_bytes=64 << 20, shared_bytes=0)
#: Seconds; measured 1 to 3 ms on an idle machine, and forks of a large pytest cost more.
SETUP_LIMIT_S: Final = 0.005

libc: Final = ctypes.CDLL(None, use_errno=True)


def call(name: str, number: int, *arguments: Any) -> int:
    result = int(libc.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return result


@contextmanager
def victim() -> Iterator[int]:
    """A process of root's that minds its own business."""
    process = subprocess.Popen(["/bin/sleep", "60"])
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def target() -> Iterator[int]:
    with victim() as pid:
        yield pid


@pytest.fixture(scope="module")
def listener() -> Iterator[int]:
    """A TCP port of the host's."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock.getsockname()[1]


@pytest.fixture(scope="module")
def abstract() -> Iterator[str]:
    name = f"\0rayos-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(name)
        sock.listen(16)
        yield name


Probe = Callable[[int, int, str], Any]


def read_a_file(_pid: int, _port: int, _name: str) -> Any:
    return Path("/etc/passwd").read_bytes()


def list_the_root(_pid: int, _port: int, _name: str) -> Any:
    assert len(os.listdir("/")) > 0, "it is empty"  # noqa: PTH208


def write_a_file(_pid: int, _port: int, _name: str) -> Any:
    fd = os.open("/tmp", os.O_TMPFILE | os.O_WRONLY)
    os.write(fd, b"here")


def make_a_directory(_pid: int, _port: int, _name: str) -> Any:
    path = Path(f"/tmp/rayos-escape-{os.getpid()}")
    path.mkdir()
    path.rmdir()


def open_own_memory(_pid: int, _port: int, _name: str) -> Any:
    os.close(os.open("/proc/self/mem", os.O_RDWR))


def open_a_handle(_pid: int, _port: int, _name: str) -> Any:
    handle = struct.pack("=Ii128x", 128, 0)
    mount = ctypes.c_int()
    buffer = ctypes.create_string_buffer(handle)
    call("name_to_handle_at", 303, ctypes.c_int(-100), b"/etc", buffer, ctypes.byref(mount), ctypes.c_int(0))


def connect_by_tcp(_pid: int, port: int, _name: str) -> Any:
    socket.create_connection(("127.0.0.1", port), timeout=5).close()


def bind_by_tcp(_pid: int, _port: int, _name: str) -> Any:
    socket.create_server(("127.0.0.1", 0)).close()


def connect_abstract(_pid: int, _port: int, name: str) -> Any:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(name)


def sniff(_pid: int, _port: int, _name: str) -> Any:
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close()


def send_a_signal(pid: int, _port: int, _name: str) -> Any:
    os.kill(pid, 0)


def send_by_pidfd(pid: int, _port: int, _name: str) -> Any:
    signal.pidfd_send_signal(os.pidfd_open(pid), signal.SIGCONT)


def trace(pid: int, _port: int, _name: str) -> Any:
    attach, detach = 16, 17
    call("ptrace", 101, ctypes.c_long(attach), ctypes.c_long(pid), None, None)
    os.waitpid(pid, 0x40000000)
    call("ptrace", 101, ctypes.c_long(detach), ctypes.c_long(pid), None, None)


def take_a_descriptor(pid: int, _port: int, _name: str) -> Any:
    os.close(call("pidfd_getfd", 438, ctypes.c_int(os.pidfd_open(pid)), ctypes.c_int(0), ctypes.c_uint(0)))


def read_memory(pid: int, _port: int, _name: str) -> Any:
    maps = Path(f"/proc/{pid}/maps").read_text().split("-")[0]
    data = ctypes.create_string_buffer(8)
    local = struct.pack("=QQ", ctypes.addressof(data), 8)
    remote = struct.pack("=QQ", int(maps, 16), 8)
    one, none = ctypes.c_ulong(1), ctypes.c_ulong(0)
    call("process_vm_readv", 310, ctypes.c_int(pid), local, one, remote, one, none)


def fork(_pid: int, _port: int, _name: str) -> Any:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def execute(_pid: int, _port: int, _name: str) -> Any:
    os.posix_spawn("/bin/true", ["true"], {})


def map_executable(_pid: int, _port: int, _name: str) -> Any:
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC).close()


def make_executable(_pid: int, _port: int, _name: str) -> Any:
    with mmap.mmap(-1, 4096) as memory:
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory)) & ~4095
        call("mprotect", 10, ctypes.c_void_p(address), ctypes.c_size_t(4096), ctypes.c_int(5))


def set_up_io_uring(_pid: int, _port: int, _name: str) -> Any:
    parameters = ctypes.create_string_buffer(120)
    os.close(call("io_uring_setup", 425, ctypes.c_uint(2), parameters))


def use_keys(_pid: int, _port: int, _name: str) -> Any:
    session = -3
    call("keyctl", 250, ctypes.c_int(0), ctypes.c_int(session), ctypes.c_int(1))


def mount(_pid: int, _port: int, _name: str) -> Any:
    new = 0x20000
    assert libc.unshare(new) == 0, os.strerror(ctypes.get_errno())
    assert libc.mount(b"none", b"/", None, ctypes.c_ulong(0x44000), None) == 0
    assert libc.mount(b"none", b"/tmp", b"tmpfs", ctypes.c_ulong(0), None) == 0


def become_root(_pid: int, _port: int, _name: str) -> Any:
    os.setresuid(0, 0, 0)


def load_bpf(_pid: int, _port: int, _name: str) -> Any:
    attributes = struct.pack("=IIII", 2, 4, 4, 1).ljust(128, b"\0")  # BPF_MAP_CREATE, an array of one
    os.close(call("bpf", 321, ctypes.c_int(0), attributes, ctypes.c_uint(128)))


def allocate_a_gibibyte(_pid: int, _port: int, _name: str) -> Any:
    bytearray(1 << 30)


PROBES: Final[list[Probe]] = [
    read_a_file,
    list_the_root,
    write_a_file,
    make_a_directory,
    open_own_memory,
    open_a_handle,
    connect_by_tcp,
    bind_by_tcp,
    connect_abstract,
    sniff,
    send_a_signal,
    send_by_pidfd,
    trace,
    take_a_descriptor,
    read_memory,
    fork,
    execute,
    map_executable,
    make_executable,
    set_up_io_uring,
    use_keys,
    mount,
    become_root,
    load_bpf,
    allocate_a_gibibyte,
]


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.__name__)
def test_X_a_way_out_is_closed(probe: Probe, target: int, listener: int, abstract: str) -> None:
    """It works for root outside, and inside it fails or is the end of the worker."""

    def run() -> None:
        probe(target, listener, abstract)

    outside = attempt(run, None)
    assert outside.succeeded, f"the probe is no probe: {outside}"
    inside = attempt(run, BOUNDS)
    assert not inside.succeeded
    assert inside.signal in (0, signal.SIGSYS), inside


@pytest.mark.parametrize("probe", [fork, set_up_io_uring, use_keys, map_executable, become_root, mount])
def test_X_a_call_no_worker_makes_is_its_end(probe: Probe) -> None:
    """Not an error that an attacker may retry around: the process dies of SIGSYS."""
    assert attempt(lambda: probe(0, 0, ""), BOUNDS).signal == signal.SIGSYS


def test_X_a_ring_takes_only_a_disks_operations() -> None:
    """The filter does not see what io_uring is asked to do; the kernel holds the ring to its own list."""
    open_at, here = 18, 0xFFFFFF9C  # IORING_OP_OPENAT, AT_FDCWD
    path = ctypes.create_string_buffer(b"/etc/passwd")
    for bounds in (None, BOUNDS):
        ring = Uring(4)

        def run(ring: Uring = ring) -> int:
            ring.prepare(open_at, here, 0, ctypes.addressof(path), 0, os.O_RDONLY, 1)
            ring.wait()
            assert ring.reap()
            return ring.result

        try:
            assert attempt(run, bounds).value == -errno.EACCES
        finally:
            ring.close()


def test_X_names_lead_nowhere_and_late_imports_fail_softly() -> None:
    """A traceback in a worker looks for its source: it must find nothing and live."""

    def run() -> int | None:
        try:
            os.close(os.open("/usr", os.O_RDONLY))
        except OSError as error:
            return error.errno
        return None

    assert attempt(run, BOUNDS).value == errno.ENOENT


def test_X_the_set_up_takes_milliseconds() -> None:
    """The set-up of a worker takes milliseconds; the best of a few counts, since the machine has other work."""

    def run() -> float:
        before = sandbox.confine_keeper()
        started = time.perf_counter()
        sandbox.confine_worker(BOUNDS, before)
        return time.perf_counter() - started

    times = [attempt(run, None).value for _ in range(5)]
    print(f"sandbox set-up: {min(times) * 1000:.2f} ms")
    assert min(times) < SETUP_LIMIT_S


def test_X_the_list_of_calls_is_short() -> None:
    """At most 60 system calls can succeed, and none of them is listed twice."""
    assert seccomp.COUNT <= 60
    names = [*seccomp.ALLOWED, *seccomp.NOT_FOUND, *seccomp.NO_EXEC, seccomp.IOCTL]
    assert len(names) == len(set(names))
    numbers = system_calls().numbers
    assert len(set(numbers.values())) == len(numbers)


# -- the real keeper and worker ----------------------------------------------------------------------------------


@contextmanager
def kept(directory: Path, *, sandbox: sandbox.Mode = "on") -> Iterator[Kept]:
    """A keeper with a disk of 1 MiB."""
    image = directory / "image"
    image.write_bytes(bytes(1 << 20))
    fd = os.open(image, os.O_RDWR | os.O_CLOEXEC)
    try:
        with Kept(directory, [Device(kind="blk", name="disk", fd=fd)], sandbox=sandbox) as keeper:
            os.close(fd)
            fd = -1
            yield keeper
    finally:
        if fd >= 0:
            os.close(fd)


def status_of(pid: int) -> dict[str, list[str]]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {line.split(":")[0]: line.split(":")[1].split() for line in lines}


def test_X_worker_and_keeper_run_confined(tmp_path: Path) -> None:
    """The kernel's account of the two processes agrees with the keeper's account of the sandbox."""
    with kept(tmp_path) as keeper:
        status = keeper.status()
        layers = status["sandbox"]
        assert set(layers) >= {"namespaces", "root", "user", "capabilities", "limits", "landlock", "seccomp"}
        assert all(layer["on"] for layer in layers.values()), layers
        worker = status_of(status["worker_pid"])
        assert worker["Uid"] == [str(keeper.uid)] * 4 and worker["Gid"] == [str(keeper.uid)] * 4
        assert worker.get("Groups", []) == []
        assert {worker[name][0] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
        assert worker["NoNewPrivs"] == ["1"] and worker["Seccomp"] == ["2"]
        above = status_of(status["pid"])
        kept_capabilities = 1 << 5 | 1 << 6 | 1 << 7
        assert int(above["CapEff"][0], 16) == kept_capabilities and int(above["CapBnd"][0], 16) == 0
        assert above["NoNewPrivs"] == ["1"]
        for pid in (status["pid"], status["worker_pid"]):
            assert list(Path(f"/proc/{pid}/root").iterdir()) == []
            for name in ("net", "ipc", "uts", "mnt"):
                assert Path(f"/proc/{pid}/ns/{name}").readlink() != Path(f"/proc/self/ns/{name}").readlink()


def test_X_without_a_layer_the_status_says_so(tmp_path: Path) -> None:
    """No silence: a worker that stays root says that, and that no user was given."""
    report = attempt(
        lambda: sandbox.confine_worker(sandbox.Bounds(), sandbox.confine_keeper()).layers, None
    ).value
    assert report["user"] == {"on": False, "what": "stays user 0: no user of its own was given"}
    assert report["seccomp"]["on"]
    with kept(tmp_path, sandbox="off") as keeper:
        assert keeper.ask("status")["sandbox"] == {}


def test_X_a_refused_call_is_named_in_trap_mode() -> None:
    """How to find what the filter lacks: the call's number and where it was made."""
    read, write = os.pipe()

    def run() -> None:
        os.dup2(write, 2)
        sandbox.confine_worker(BOUNDS, sandbox.confine_keeper("trap"), "trap")
        os.fork()

    with pytest.raises(ChildProcessError, match=str(128 + signal.SIGSYS)):
        attempt(run, None)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    assert said.startswith("seccomp: system call ") and "test_sandbox.py" in said


def test_X_two_workers_cannot_touch_each_other(tmp_path: Path) -> None:
    """Different users in different sandboxes; even without the filter one could not signal or trace the other."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with kept(tmp_path / "one") as one, kept(tmp_path / "two") as two:
        first, second = one.status()["worker_pid"], two.status()["worker_pid"]
        assert one.uid != two.uid

        def as_the_first(probe: Probe) -> Callable[[], None]:
            def run() -> None:
                os.setgroups([])
                os.setresgid(one.uid, one.uid, one.uid)
                os.setresuid(one.uid, one.uid, one.uid)
                probe(second, 0, "")

            return run

        for probe in (send_a_signal, send_by_pidfd, trace, take_a_descriptor, read_memory):
            error = attempt(as_the_first(probe), None).error
            assert isinstance(error, PermissionError), (probe, error)
        assert Path(f"/proc/{first}").exists() and Path(f"/proc/{second}").exists()


def test_U6_guest_memory_that_shrinks_is_refused(tmp_path: Path) -> None:
    """Unsealed memory is not taken; sealed memory cannot be truncated under the worker, which goes on."""
    with kept(tmp_path) as keeper:
        pid = keeper.status()["worker_pid"]
        with keeper.connect("disk") as frontend, GuestRam(1 << 20, seal=False) as ram:
            frontend.negotiate()
            with pytest.raises((Dropped, AssertionError)):
                frontend.set_memory(ram)
        with Rig(Link(keeper, "disk")) as rig:
            with pytest.raises(PermissionError):
                os.ftruncate(rig.ram.fd, 4096)
            answer = rig.request(struct.pack("<IIQ", 0, 0, 3), 513)
            assert answer == bytes(513)
        assert keeper.status()["worker_pid"] == pid


def test_X_a_killed_workers_successor_is_confined_too(tmp_path: Path) -> None:
    """Ten in a row, each with every layer."""
    with kept(tmp_path) as keeper:
        seen = set()
        for _ in range(10):
            status = keeper.status()
            pid = status["worker_pid"]
            seen.add(pid)
            keeper.ask("kill_worker")
            while keeper.ask("status")["worker_pid"] == pid:
                time.sleep(0.002)
        last = status_of(keeper.status()["worker_pid"])
        assert last["Seccomp"] == ["2"] and last["Uid"][0] == str(keeper.uid)
        assert len(seen) == 10
