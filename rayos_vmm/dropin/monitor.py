"""QEMU's monitors for a script: QMP and the human monitor, spoken by this process and done over the machine's QMP.

What names a file is done here, since QEMU's sandbox has no files of ours: `screendump`. `quit` ends the machine.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import trio

from rayos_vmm.client.client import Client
from rayos_vmm.errors import Invalid, RayosError
from rayos_vmm.testing.picture import decode_png

PROMPT: Final = b"(qemu) "
LINE_MAXIMUM_BYTES: Final = 64 << 10
_SCREENDUMP: Final = re.compile(
    r"^screendump\s+(?:-f\s+(png|ppm)\s+)?(\S+)(?:\s+-f\s+(png|ppm))?(?:\s+\S+)*$"
)
_DECODER: Final = json.JSONDecoder()

Write = Callable[[bytes], Awaitable[None]]


class Machine:
    """The machine behind the monitors: what they may ask of it."""

    def __init__(self, client: Client, name: str, version: str, quit_: Callable[[], object]) -> None:
        self.client = client
        self.name = name
        self.version = version
        self.quit = quit_

    async def screendump(self, path: str, kind: str) -> None:
        """Saves the screen as PPM (P6) or PNG.

        Raises:
            RayosError: it has no screen.
            Invalid: the file cannot be written.
        """
        png = await self.client.screenshot(self.name)
        if kind == "png":
            data = png
        else:
            picture = decode_png(png)
            data = f"P6\n{picture.width} {picture.height}\n255\n".encode() + picture.rgb
        try:
            await trio.Path(path).write_bytes(data)
        except OSError as error:
            raise Invalid(f"failed to open file '{path}': {error.strerror}") from None

    async def human(self, line: str) -> str:
        """The answer of the human monitor to a line."""
        line = line.strip()
        if not line:
            return ""
        if line in ("q", "quit"):
            self.quit()
            return ""
        try:
            dump = _SCREENDUMP.match(line)
            if dump is not None:
                await self.screendump(dump[2], dump[1] or dump[3] or "ppm")
                return ""
            if line.split()[0] in ("loadvm", "savevm"):
                return "Error: a machine of ours has no saved states\n"
            said = await self.client.qmp(self.name, "human-monitor-command", {"command-line": line})
        except RayosError as error:
            return f"Error: {error.message}\n"
        return str(said).replace("\r\n", "\n")


class HumanSession:
    """One user of the human monitor; feed it what was typed."""

    def __init__(self, machine: Machine, write: Write) -> None:
        self._machine = machine
        self._write = write
        self._line = b""

    async def open(self) -> None:
        """Greets."""
        banner = f"QEMU {self._machine.version} monitor - type 'help' for more information\r\n"
        await self._write(banner.encode() + PROMPT)

    async def feed(self, data: bytes) -> None:
        """Does every line that is now complete."""
        *lines, rest = (self._line + data).replace(b"\r", b"\n").split(b"\n")
        self._line = rest[-LINE_MAXIMUM_BYTES:]
        for line in lines:
            said = await self._machine.human(line.decode(errors="replace"))
            await self._write(said.replace("\n", "\r\n").encode() + PROMPT)


class QmpSession:
    """One user of QMP (QEMU's docs/interop/qmp-spec.rst); feed it what was sent."""

    def __init__(self, machine: Machine, write: Write) -> None:
        self._machine = machine
        self._write = write
        self._text = ""
        self._is_negotiated = False

    async def open(self) -> None:
        """Greets."""
        numbers = [int(word) for word in re.findall(r"\d+", self._machine.version)[:3]]
        major, minor, micro = [*numbers, 0, 0, 0][:3]
        version = {"qemu": {"major": major, "minor": minor, "micro": micro}, "package": ""}
        await self._say({"QMP": {"version": version, "capabilities": []}})

    async def feed(self, data: bytes) -> None:
        """Does every command that is now complete."""
        self._text = (self._text + data.decode(errors="replace")).lstrip()
        while self._text:
            try:
                asked, end = _DECODER.raw_decode(self._text)
            except ValueError:
                if "\n" in self._text or len(self._text) > LINE_MAXIMUM_BYTES:
                    line, _, rest = self._text.partition("\n")
                    if line.count("{") <= line.count("}"):
                        self._text = rest
                        await self._fail(None, "Invalid JSON syntax")
                        continue
                return
            self._text = self._text[end:].lstrip()
            await self._do(asked)

    async def _do(self, asked: Any) -> None:
        if not isinstance(asked, dict) or not isinstance(asked.get("execute"), str):
            await self._fail(None, "QMP input must be a JSON object with 'execute'")
            return
        command, arguments, number = asked["execute"], asked.get("arguments") or {}, asked.get("id")
        if not self._is_negotiated and command != "qmp_capabilities":
            await self._fail(
                number, "Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound"
            )
            return
        self._is_negotiated = True
        try:
            returned: Any = {}
            if command == "screendump":
                await self._machine.screendump(
                    str(arguments.get("filename")), str(arguments.get("format", "ppm"))
                )
            elif command not in ("qmp_capabilities", "quit"):
                returned = await self._machine.client.qmp(self._machine.name, command, arguments or None)
        except RayosError as error:
            await self._fail(number, error.message)
            return
        await self._say({"return": returned, **({"id": number} if "id" in asked else {})})
        if command == "quit":
            self._machine.quit()

    async def event(self, name: str, data: dict[str, Any]) -> None:
        """Passes an event of QEMU's on."""
        if self._is_negotiated:
            seconds, fraction = divmod(time.time(), 1)
            stamp = {"seconds": int(seconds), "microseconds": int(fraction * 1e6)}
            await self._say({"timestamp": stamp, "event": name, **({"data": data} if data else {})})

    async def _fail(self, number: Any, text: str, kind: str = "GenericError") -> None:
        await self._say(
            {"error": {"class": kind, "desc": text}, **({"id": number} if number is not None else {})}
        )

    async def _say(self, value: dict[str, Any]) -> None:
        await self._write(json.dumps(value).encode() + b"\r\n")


def remove_socket(path: str) -> None:
    """Makes way for a server's socket, as QEMU does."""
    if Path(path).is_socket():
        Path(path).unlink()
