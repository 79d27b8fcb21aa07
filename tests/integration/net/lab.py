"""Two network namespaces and a veth pair between them: a server side, which the test itself is in, and a
client side.

Everything that a test makes in there disappears with the namespaces.
"""

import ctypes
import os
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Interface
from pathlib import Path

CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Lab:
    """`server_link` with `address` is in the namespace `server`, which this thread is in; `client_link` in
    `client`.
    """

    directory: Path
    server: str
    client: str
    address: IPv4Interface
    server_link: str = "s0"
    client_link: str = "c0"

    def in_client(self, argv: Sequence[str], *, mount_namespace: bool = False) -> list[str]:
        """The command line that runs `argv` in the client's namespace (and in mounts of its own)."""
        unshare = ["unshare", "-m"] if mount_namespace else []
        return ["nsenter", f"--net=/run/netns/{self.client}", *unshare, *argv]

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The calling thread in the client's namespace, to open sockets there."""
        with _entered(self.client):
            yield

    def client_mac(self) -> str:
        """The hardware address of the client's link."""
        return self.run(["ip", "-br", "link", "show", self.client_link]).split()[2]

    def add_address(self, address: str) -> None:
        """Give the server's link one more address."""
        _ip("address", "add", address, "dev", self.server_link)

    @contextmanager
    def host_with_address(self, address: str) -> Iterator[str]:
        """A bridge br0 instead of the server's link, with a third host on it that has `address`; its
        namespace.
        """
        third = f"labh{uuid.uuid4().hex[:8]}"
        _ip("netns", "add", third)
        try:
            _ip("link", "add", "br0", "type", "bridge", "forward_delay", "0")
            _ip("address", "flush", "dev", self.server_link)
            _ip("link", "set", self.server_link, "master", "br0")
            _ip("link", "add", "h0", "master", "br0", "type", "veth", "peer", "name", "h1", "netns", third)
            _ip("-n", third, "address", "add", f"{address}/{self.address.network.prefixlen}", "dev", "h1")
            _ip("-n", third, "link", "set", "h1", "up")
            _ip("link", "set", "h0", "up")
            _ip("address", "add", str(self.address), "dev", "br0")
            _ip("link", "set", "br0", "up")
            yield third
        finally:
            _ip("netns", "delete", third)

    def in_server(self, argv: Sequence[str]) -> list[str]:
        """The command line that runs `argv` in the server's namespace, whichever thread starts it."""
        return ["nsenter", f"--net=/run/netns/{self.server}", *argv]

    def run(self, argv: Sequence[str], *, timeout_s: float = 30.0) -> str:
        """Run a command in the client's namespace; return what it printed, fail on a status other than 0."""
        done = subprocess.run(
            self.in_client(argv), capture_output=True, text=True, timeout=timeout_s, cwd=self.directory
        )
        assert done.returncode == 0, f"{argv}: status {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr


@contextmanager
def open_lab(directory: Path, address: str = "10.77.0.1/16") -> Iterator[Lab]:
    """A lab; the calling thread is in the server's namespace meanwhile."""
    tag = uuid.uuid4().hex[:8]
    server, client = f"labs{tag}", f"labc{tag}"
    made = []
    try:
        for name in (server, client):
            _ip("netns", "add", name)
            made.append(name)
        with _entered(server):
            _ip("link", "set", "lo", "up")
            _ip("link", "add", "s0", "type", "veth", "peer", "name", "c0", "netns", client)
            _ip("address", "add", address, "dev", "s0")
            _ip("link", "set", "s0", "up")
            _ip("-n", client, "link", "set", "lo", "up")
            _ip("-n", client, "link", "set", "c0", "up")
            yield Lab(directory, server, client, IPv4Interface(address))
    finally:
        for name in made:
            _ip("netns", "delete", name)


@contextmanager
def _entered(name: str) -> Iterator[None]:
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    there = os.open(f"/run/netns/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.setns(there, CLONE_NEWNET))
        yield
    finally:
        _check(_libc.setns(home, CLONE_NEWNET))
        os.close(there)
        os.close(home)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _check(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
