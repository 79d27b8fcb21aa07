"""Makes the synchronous and the asyncio face of `Guest` from its own source: `python -m rayos_vmm.testing.faces`.

The verbs are written once, for trio, in `guest.py` and `console.py`. Each face has the same methods, arguments,
docstrings and errors; a call is carried to a trio loop in a thread of its own (`portal.py`).
"""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from rayos_vmm.testing import console, guest

FOLDER: Final = Path(__file__).parent
_SOURCES: Final = ((console, "GuestConsole"), (guest, "Guest"))
_CONSOLES: Final = ("console", "log", "serial")
#: Names that the annotations and defaults of the verbs use, and where a face gets them.
_IMPORTS: Final = """
from __future__ import annotations

{more}import re
from collections.abc import {iterator}
from contextlib import ExitStack, {manager}
from functools import partial
from pathlib import Path
from typing import Any

from rayos_vmm.config.spec import VmSpec
from rayos_vmm.events import Event
from rayos_vmm.machine.view import Damage, ExecResult, VmView
from rayos_vmm.shared.tap import Case
from rayos_vmm.testing import console as _console
from rayos_vmm.testing import guest as _guest
from rayos_vmm.testing.console import TIMEOUT_S, Pattern
from rayos_vmm.testing.daemon import PrivateDaemon, open_private_daemon
from rayos_vmm.testing.guest import COMMAND_TIMEOUT_S, Subtests
from rayos_vmm.testing.open import open_guest as _open_guest
from rayos_vmm.testing.picture import Picture
from rayos_vmm.testing.portal import Portal, open_portal
from rayos_vmm.testing.screen import Region, Wanted
"""


_PROPERTIES: Final = '''
    @property
    def name(self) -> str:
        """Its name."""
        return self._inner.name

    @property
    def spec(self) -> VmSpec:
        """Its specification."""
        return self._inner.spec
'''


class Face(NamedTuple):
    """How one face is spelled."""

    file: str
    title: str
    example: str
    definition: str  # of a method
    call: str  # around the partial that is carried over
    opener: str


_SYNC: Final = Face(
    "sync.py",
    "Guests for code that is not asynchronous: scripts, Jupyter, unittest, plain test functions.",
    'with open_guest(disk="64MiB") as guest:\n        guest.succeed("mkfs.ext4 /dev/vda")',
    "def",
    "self._portal.call({})",
    '''
@contextmanager
def open_guest(daemon: PrivateDaemon | None = None, **options: Any) -> Iterator[Guest]:
    """A guest, gone with its disks at the end of the block.

    Args:
        daemon: from `open_private_daemon`; None starts one that ends with the block.
        options: those of `rayos_vmm.testing.open_guest`.

    Raises:
        RayosError: the guest could not be defined or started.
    """
    with ExitStack() as stack:
        chosen = daemon or stack.enter_context(open_private_daemon())
        portal = stack.enter_context(open_portal())
        yield Guest(stack.enter_context(portal.hold(_open_guest(chosen, **options))), portal)
''',
)
_ASYNC: Final = Face(
    "aio.py",
    "Guests for asyncio: the same verbs, to be awaited in any asyncio loop.",
    'async with open_guest(disk="64MiB") as guest:\n        await guest.succeed("mkfs.ext4 /dev/vda")',
    "async def",
    "await self._portal.run({})",
    '''
@asynccontextmanager
async def open_guest(daemon: PrivateDaemon | None = None, **options: Any) -> AsyncIterator[Guest]:
    """A guest, gone with its disks at the end of the block.

    Args:
        daemon: from `open_private_daemon`; None starts one that ends with the block.
        options: those of `rayos_vmm.testing.open_guest`.

    Raises:
        RayosError: the guest could not be defined or started.
    """
    with ExitStack() as stack:
        if daemon is None:
            daemon = await asyncio.to_thread(stack.enter_context, open_private_daemon())
        portal = stack.enter_context(open_portal())
        held = _open_guest(daemon, **options)
        guest = await portal.run(held.__aenter__)
        try:
            yield Guest(guest, portal)
        except BaseException as error:
            if not await portal.finish(partial(held.__aexit__, type(error), error, error.__traceback__)):
                raise
        else:
            await portal.finish(partial(held.__aexit__, None, None, None))
''',
)
FACES: Final = (_SYNC, _ASYNC)


def _methods(node: ast.ClassDef) -> Iterator[ast.AsyncFunctionDef | ast.FunctionDef]:
    for item in node.body:
        if not isinstance(item, ast.AsyncFunctionDef | ast.FunctionDef):
            continue
        if not item.name.startswith("_") and not item.decorator_list:
            yield item


def _forwarded(arguments: ast.arguments) -> str:
    """The arguments of a method as a call passes them on."""
    positional = [one.arg for one in (*arguments.posonlyargs, *arguments.args)][1:]
    words = [*positional]
    if arguments.vararg is not None:
        words.append(f"*{arguments.vararg.arg}")
    words += [f"{one.arg}={one.arg}" for one in arguments.kwonlyargs]
    if arguments.kwarg is not None:
        words.append(f"**{arguments.kwarg.arg}")
    return "".join(f", {word}" for word in words)


def _method(face: Face, item: ast.AsyncFunctionDef | ast.FunctionDef) -> str:
    is_carried = isinstance(item, ast.AsyncFunctionDef)
    call = f"partial(self._inner.{item.name}{_forwarded(item.args)})"
    plain = f"self._inner.{item.name}({_forwarded(item.args).removeprefix(', ')})"
    value = face.call.format(call) if is_carried else plain
    definition = face.definition if is_carried else "def"
    doc = (ast.get_docstring(item, clean=True) or "").replace("\\", "\\\\")
    quoted = '        """' + doc.replace("\n", "\n        ").replace("\n        \n", "\n\n")
    quoted += '\n        """' if "\n" in doc else '"""'
    returns = ast.unparse(item.returns) if item.returns is not None else "None"
    body = value if returns == "None" else f"return {value}"
    return f"    {definition} {item.name}({ast.unparse(item.args)}) -> {returns}:\n{quoted}\n        {body}\n"


def _class(face: Face, node: ast.ClassDef) -> str:
    doc = (ast.get_docstring(node) or "").splitlines()[0]
    source = "_guest.Guest" if node.name == "Guest" else "_console.GuestConsole"
    lines = [
        f"class {node.name}:",
        f'    """{doc}"""',
        "",
        f"    def __init__(self, inner: {source}, portal: Portal) -> None:",
        "        self._inner = inner",
        "        self._portal = portal",
    ]
    if node.name == "Guest":
        lines += [f"        self.{name} = GuestConsole(inner.{name}, portal)" for name in _CONSOLES]
        lines.append(_PROPERTIES)
    return "\n".join(lines) + "\n\n" + "\n".join(_method(face, item) for item in _methods(node))


def render(face: Face) -> str:
    """Returns the source of a face, formatted."""
    is_sync = face.definition == "def"
    head = _IMPORTS.format(
        iterator="Iterator" if is_sync else "AsyncIterator",
        manager="contextmanager" if is_sync else "asynccontextmanager",
        more="" if is_sync else "import asyncio\n",
    )
    made = "Made from guest.py and console.py by `python -m rayos_vmm.testing.faces`."
    parts = [f'"""{face.title}\n\n    {face.example}\n\n{made}\n"""\n{head}']
    for module, name in _SOURCES:
        tree = ast.parse(inspect.getsource(module))
        (node,) = (one for one in tree.body if isinstance(one, ast.ClassDef) and one.name == name)
        parts.append(_class(face, node))
    source = "\n\n".join([*parts, face.opener.strip() + "\n"])
    command = [sys.executable, "-P", "-m", "ruff", "format", "--stdin-filename", str(FOLDER / face.file), "-"]
    return subprocess.run(command, input=source, capture_output=True, text=True, check=True).stdout


def main() -> int:
    """Writes both faces."""
    for face in FACES:
        (FOLDER / face.file).write_text(render(face))
    return 0


if __name__ == "__main__":
    sys.exit(main())
