"""Debian packages without root and without touching the system: apt-get with a private state directory.

The private state has an empty dpkg status, so a closure is the full list of packages, and only our own
sources, so a broken third-party source of the host does not matter. Packages are verified by apt against
Debian's signed index.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rayos_images.arch import DEFAULT
from rayos_images.errors import ImageError

KEYRING: Final = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
ARCHIVE: Final = "http://deb.debian.org/debian"
SECURITY: Final = "http://deb.debian.org/debian-security"
TIMEOUT_S: Final = 600.0  # one apt-get; the largest download is a kernel of 70 MB

_CONF: Final = """\
Dir::Etc::sourcelist "{root}/sources.list"; Dir::Etc::sourceparts "-";
Dir::Etc::preferences "-"; Dir::Etc::preferencesparts "-";
Dir::State "{root}"; Dir::State::Lists "{root}/lists"; Dir::State::status "{root}/status";
Dir::Cache "{root}/cache";
APT::Install-Recommends "false"; APT::Architecture "{architecture}"; APT::Architectures "{architecture}";
APT::Sandbox::User "root";
Acquire::Languages "none"; Acquire::Retries "2"; Acquire::http::Timeout "30"; Acquire::https::Timeout "30";
"""
_PRINT_URI: Final = re.compile(
    r"'(?P<uri>[^']+)' (?P<file>\S+) (?P<size>\d+)(?: SHA256:(?P<sha256>[0-9a-f]{64}))?"
)


@dataclass(frozen=True, slots=True)
class Package:
    """One package file in the archive; `sha256` is empty where apt did not print it."""

    file: str
    size_bytes: int
    sha256: str

    @property
    def name(self) -> str:
        return self.file.partition("_")[0]


def mirror(path: str, default: str, etc: Path = Path("/etc/apt")) -> str:
    """Return the host's own mirror whose URI ends in `path` ("/debian"), so a local mirror is used, else
    `default`."""
    files = [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))]
    for file in files:
        try:
            text = file.read_text(errors="replace")
        except OSError:
            continue
        for line in text.splitlines():
            if line.startswith(("URIs:", "deb ")):
                for word in line.split():
                    if "://" in word and word.rstrip("/").endswith(path):
                        return word.rstrip("/")
    return default


class Apt:
    """apt-get on a private state in `root` (made here) that knows `suites` of the main component.

    `suites` are (mirror URI, suite) pairs, `architecture` is Debian's word for that of the packages. The
    constructor downloads the indexes: 1-10 s.
    """

    def __init__(
        self, root: Path, suites: Sequence[tuple[str, str]], architecture: str = DEFAULT.debian
    ) -> None:
        for program in ("apt-get", "dpkg-deb"):
            if shutil.which(program) is None:
                raise ImageError(
                    f"{program} not found: images are built from Debian packages; install apt and dpkg"
                )
        if not KEYRING.exists():
            raise ImageError(f"{KEYRING} not found: install debian-archive-keyring")
        for directory in (root / "lists/partial", root / "cache/archives/partial"):
            directory.mkdir(parents=True)
        (root / "status").touch()
        (root / "sources.list").write_text(
            "".join(f"deb [signed-by={KEYRING}] {uri} {suite} main\n" for uri, suite in suites)
        )
        (root / "conf").write_text(_CONF.format(root=root, architecture=architecture))
        self._env = {**os.environ, "APT_CONFIG": str(root / "conf"), "LC_ALL": "C"}
        self._run("update")

    def closure(self, package: str, *, suite: str) -> list[str]:
        """Return the names of `package` and all that it depends on, resolved with `suite` preferred."""
        lines = self._run("-t", suite, "install", "--print-uris", package).splitlines()
        names = [Package(match["file"], 0, "").name for line in lines if (match := _PRINT_URI.match(line))]
        return sorted(set(names))

    def depends(self, package: str) -> list[str]:
        """Return the names that the newest `package` depends on directly, without alternatives."""
        show = subprocess.run(
            ["apt-cache", "show", "--no-all-versions", package], env=self._env, capture_output=True, text=True
        )
        for line in show.stdout.splitlines():
            if line.startswith("Depends: "):
                return [term.split()[0] for term in line.removeprefix("Depends: ").split(",")]
        raise ImageError(f"package {package} not found in the archive: {show.stderr.strip()}")

    def resolve(self, specs: Iterable[str]) -> list[Package]:
        """Return the files that `specs` (`name` or `name/suite`) would download, sorted by name."""
        found = [
            Package(match["file"], int(match["size"]), match["sha256"] or "")
            for line in self._run("download", "--print-uris", *specs).splitlines()
            if (match := _PRINT_URI.match(line))
        ]
        return sorted(found, key=lambda package: package.file)

    def download(self, specs: Iterable[str], into: Path) -> list[Path]:
        """Download `specs` into the directory `into` and return the package files."""
        into.mkdir(parents=True, exist_ok=True)
        self._run("download", *specs, cwd=into)
        return sorted(into.glob("*.deb"))

    def _run(self, *arguments: str, cwd: Path | None = None) -> str:
        command = ["apt-get", "-qq", *arguments]
        try:
            done = subprocess.run(
                command, env=self._env, cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT_S
            )
        except subprocess.TimeoutExpired:
            raise ImageError(f"apt-get {arguments[0]} did not finish within {TIMEOUT_S:.0f} s") from None
        if done.returncode != 0:
            errors = [line for line in done.stderr.splitlines() if line.startswith("E:")] or [
                done.stderr.strip()
            ]
            raise ImageError(
                f"apt-get {arguments[0]} failed: {' '.join(errors)[:500]}; is the archive reachable?"
            )
        return done.stdout


def unpack(packages: Iterable[Path], into: Path) -> None:
    """Unpack package files into `into`, two at a time (xz is the cost)."""

    def one(package: Path) -> None:
        done = subprocess.run(["dpkg-deb", "-x", package, into], capture_output=True, text=True)
        if done.returncode != 0:
            raise ImageError(f"cannot unpack {package.name}: {done.stderr.strip()[:300]}")

    into.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(one, packages):
            pass
