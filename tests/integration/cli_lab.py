"""The `rayos` command as a user has it: processes, a daemon that starts and ends by itself, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayos_vmm.paths import default_paths
from rayos_vmm.testing.leftovers import Leftovers, session_mark, unique_name

COMMAND_LIMIT_S = 240
KEPT = {"vm", "daemon.lock"}  # of an empty runtime directory


@dataclass(frozen=True)
class Lab:
    """Directories of one's own, and a daemon that ends a second after it is not needed any more."""

    directory: Path

    @property
    def config(self) -> str:
        return str(self.directory / "rayos.toml")

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "RAYOS_STATE_DIR": str(self.directory / "state"),
            "RAYOS_RUNTIME_DIR": str(self.directory / "run"),
            "RAYOS_CACHE_DIR": str(default_paths().cache),
        }

    def start(self, *words: str, **options: Any) -> subprocess.Popen[bytes]:
        """The command, going on."""
        command = [sys.executable, "-P", "-m", "rayos_vmm.cli", *words]
        return subprocess.Popen(command, env=self.environment, **options)

    def rayos(self, *words: str, text: str = "", status: int | None = 0) -> str:
        """The command's standard output; it must end with `status` (None: any), and what it says is shown if not."""
        done = self.finish(*words, text=text)
        assert status in (None, done.returncode), f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def finish(self, *words: str, text: str = "") -> subprocess.CompletedProcess[str]:
        """The command, ended."""
        command = [sys.executable, "-P", "-m", "rayos_vmm.cli", *words]
        return subprocess.run(
            command,
            input=text,
            capture_output=True,
            text=True,
            env=self.environment,
            timeout=COMMAND_LIMIT_S,
            check=False,
        )

    def json(self, *words: str) -> Any:
        """The command's result with --json."""
        return json.loads(self.rayos(*words, "--json"))


@contextmanager
def open_lab() -> Iterator[Lab]:
    """A lab; at its end the daemon has ended by itself and nothing of it is left on the host."""
    lab = Lab(Path("/tmp") / unique_name(session_mark()))
    lab.directory.mkdir()
    Path(lab.config).write_text(f'[service]\nbridge = "{lab.directory.name}"\nidle_exit = "2s"\n')
    before = Leftovers.now()
    try:
        yield lab
    finally:
        machines = lab.finish("ps", "--quiet").stdout.split()
        if machines:
            lab.rayos("rm", "-f", *machines, status=None)
        left = before.wait_gone()
        left += [str(path) for path in (lab.directory / "run").rglob("*") if path.name not in KEPT]
        shutil.rmtree(lab.directory)
    assert not left, left


def multiboot_kernel(text: str) -> bytes:
    """A kernel of a hobby: an ELF of 32 bits with a Multiboot 0.6.96 header that prints on COM1 and halts."""
    base, head = 0x100000, 52 + 32
    magic, flags = 0x1BADB002, 0
    header = struct.pack("<III", magic, flags, -(magic + flags) & 0xFFFFFFFF)
    code = b"\x66\xba\xf8\x03"  # mov dx, 0x3f8
    for character in text.encode():
        code += b"\xb0" + bytes([character]) + b"\xee"  # mov al, character; out dx, al
    code += b"\xf4\xeb\xfd"  # hlt; jmp to it
    body = header + code
    entry = base + head + len(header)
    elf = struct.pack(
        "<16sHHIIIIIHHHHHH", b"\x7fELF\x01\x01\x01", 2, 3, 1, entry, 52, 0, 0, 52, 32, 1, 0, 0, 0
    )
    size = head + len(body)
    segment = struct.pack("<IIIIIIII", 1, 0, base, base, size, size, 7, 0x1000)
    return elf + segment + body
