"""Compile the data path (see `rayos_devices.compiled`): Cython to C, the C compiler to extensions, all cores at once.

    python -P -m rayos_devices.build        prints what it did; nothing to do means no time lost

Needs Cython, a C compiler (`$CC`, else gcc or cc) and Python's headers. Without them the interpreted code runs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final

from rayos_devices import compiled

#: Indices are checked by the code itself, where a guest could choose them, and tests run it interpreted too.
DIRECTIVES: Final = {
    "language_level": "3",
    "annotation_typing": "False",  # types are in the .pxd files: annotations stay Python's
    "boundscheck": "False",
    "wraparound": "False",
    "initializedcheck": "False",
    "cdivision": "True",
}
C_FLAGS: Final = ("-O2", "-fPIC", "-shared", "-fwrapv", "-fno-strict-aliasing", "-DNDEBUG", "-w")
#: Builds that are kept: a process that runs since before the last one may still import from its own.
KEPT: Final = 3


class BuildError(Exception):
    """The sources could not be compiled; the text says what is missing or what the compiler said."""


def build() -> Path:
    """Compile what today's sources need; returns the directory of the extensions. Errors: BuildError."""
    target = compiled.directory()
    if not all(compiled.extension(target, module).exists() for module in compiled.MODULES):
        _compiler()
        target.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as name:
            folder = Path(name)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                for done in [pool.submit(_compile, module, folder) for module in compiled.MODULES]:
                    done.result()
            with suppress(OSError):  # somebody else was as quick
                folder.chmod(0o755)
                folder.rename(target)
                folder.mkdir()
        _forget_old(target)
    return target


def _compiler() -> list[str]:
    compiler = (
        os.environ.get("CC", "").split() or [found for found in map(shutil.which, ("gcc", "cc")) if found][:1]
    )
    if not compiler:
        raise BuildError("no C compiler: apt-get install gcc python3-dev")
    headers = sysconfig.get_path("include")
    if not Path(headers, "Python.h").exists():
        raise BuildError(f"no Python.h in {headers}: apt-get install python3-dev")
    return [*compiler, *C_FLAGS, f"-I{headers}"]


def _compile(module: str, folder: Path) -> None:
    """Also takes a module from an earlier build when neither it nor any module's C types have changed since."""
    source = compiled.source(module)
    target = compiled.extension(folder, module)
    mark = f"{module}.{compiled.fingerprint(module)}"
    (folder / mark).touch()
    for found in folder.parent.glob(f"*/{mark}"):
        with suppress(OSError):
            target.hardlink_to(compiled.extension(found.parent, module))
            return
    compile_extension(source, source.parents[module.count(".")], target)


def compile_extension(source: Path, root: Path, target: Path, **directives: str) -> None:
    """Compile `source`, a module of a package below `root`, to the extension `target`; `directives` change DIRECTIVES.

    Errors: BuildError.
    """
    options = [
        word for name, value in {**DIRECTIVES, **directives}.items() for word in ("-X", f"{name}={value}")
    ]
    c_file = target.with_suffix(".c")
    # With -P our packages (`net`) stay out of Cython's way.
    cython = [sys.executable, "-P", "-m", "cython", *options, "-w", str(root), "-o", str(c_file)]
    try:
        _run(cython, str(source.relative_to(root)))
        _run(_compiler(), str(c_file), "-o", str(target))
    finally:
        c_file.unlink(missing_ok=True)


def _run(command: list[str], *arguments: str) -> None:
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{' '.join(arguments)}: {(done.stderr or done.stdout).strip()}")


def _forget_old(newest: Path) -> None:
    finished = [path for path in newest.parent.iterdir() if not path.name.startswith(".")]
    builds = sorted(finished, key=lambda path: path.stat().st_mtime, reverse=True)
    for path in builds[KEPT:]:
        if path != newest:
            shutil.rmtree(path, ignore_errors=True)


def main() -> int:
    started = time.monotonic()
    before = compiled.directory().exists()
    try:
        target = build()
    except BuildError as error:
        print(f"build: {error}\nbuild: the data path runs interpreted", file=sys.stderr)
        return 1
    if not before:
        print(
            f"build: {len(compiled.MODULES)} modules compiled in {time.monotonic() - started:.0f} s ({target.name})"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
