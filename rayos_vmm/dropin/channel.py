"""Where a serial line, a debug console or a monitor goes: the character devices of a QEMU command line.

Source: "Character device options" of qemu-options.hx, and the short forms of `-serial`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rayos_vmm.dropin.command_line import properties
from rayos_vmm.errors import Invalid

Kind = Literal["null", "stdio", "file", "unix", "tcp", "pty"]


@dataclass(frozen=True, slots=True)
class Channel:
    """One end outside of the machine. `is_mux`: a monitor shares it (`mon:`), and Ctrl-A escapes."""

    kind: Kind
    path: str = ""  # of a file or socket
    host: str = ""
    port: int = 0
    is_server: bool = False
    waits: bool = False  # a server waits for its client before the machine starts
    is_mux: bool = False
    is_appended: bool = False
    is_telnet: bool = False

    def __str__(self) -> str:
        where = self.path or (f"{self.host}:{self.port}" if self.port else "")
        return f"{'mon:' if self.is_mux else ''}{self.kind}{':' + where if where else ''}"


def short(text: str, chardevs: dict[str, Channel]) -> Channel:
    """The channel of `-serial TEXT`, `-monitor TEXT`, `-debugcon TEXT`, `-parallel TEXT`.

    Args:
        chardevs: those of `-chardev`, by id.

    Raises:
        Invalid: it is of a kind that we do not have.
    """
    if text.startswith("mon:"):
        inner = short(text.removeprefix("mon:"), chardevs)
        return Channel(
            inner.kind, inner.path, inner.host, inner.port, inner.is_server, inner.waits, is_mux=True
        )
    kind, _, rest = text.partition(":")
    if kind == "chardev":
        if rest not in chardevs:
            raise Invalid(f"chardev:{rest}: there is no -chardev with that id")
        return chardevs[rest]
    if text in ("none", "null") or kind == "vc":
        return Channel("null")
    if text in ("stdio", "pty"):
        return Channel("stdio" if text == "stdio" else "pty")
    if kind == "file":
        return Channel("file", rest)
    if kind == "unix":
        given = properties(rest, "path")
        return Channel("unix", given.get("path", ""), is_server=_is_on(given, "server"), waits=_waits(given))
    if kind in ("tcp", "telnet"):
        given = properties(rest, "address")
        host, _, port = given.get("address", "").rpartition(":")
        return _tcp(host, port, given, is_telnet=kind == "telnet")
    raise Invalid(
        f"{text}: a character device of kind {kind!r} is not there", hint="stdio, file:, unix:, tcp:, pty"
    )


def long(text: str) -> tuple[str, Channel]:
    """The id and the channel of `-chardev TEXT`.

    Raises:
        Invalid: it is of a kind that we do not have.
    """
    given = properties(text, "backend")
    name, kind = given.get("id", ""), given.get("backend", "")
    is_mux = given.get("mux") == "on"
    match kind:
        case "stdio":
            return name, Channel("stdio", is_mux=is_mux)
        case "file":
            return name, Channel("file", given.get("path", ""), is_appended=given.get("append") == "on")
        case "null" | "vc":
            return name, Channel("null")
        case "pty":
            return name, Channel("pty")
        case "socket" if "path" in given:
            return name, Channel(
                "unix", given["path"], is_server=_is_on(given, "server"), waits=_waits(given), is_mux=is_mux
            )
        case "socket" if "port" in given:
            return name, _tcp(
                given.get("host", ""), given["port"], given, is_telnet=given.get("telnet") == "on"
            )
    raise Invalid(f"-chardev {text}: a character device of kind {kind!r} is not there")


def _is_on(given: dict[str, str], key: str) -> bool:
    return given.get(key, "off") in ("on", "yes", "true")


def _waits(given: dict[str, str]) -> bool:
    return _is_on(given, "server") and given.get("wait", "on") in ("on", "yes", "true")


def _tcp(host: str, port: str, given: dict[str, str], *, is_telnet: bool) -> Channel:
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise Invalid(f"port {port!r} of a character device: 1 to 65535 are allowed")
    return Channel(
        "tcp",
        host=host or "127.0.0.1",
        port=int(port),
        is_server=_is_on(given, "server"),
        waits=_waits(given),
        is_telnet=is_telnet,
    )
