"""The head of the audit record in a place outside of this host, where nobody who owns this host can change it.

A witness is a URL that takes a POST of one JSON object (`audit.Head`), or a file on another mount to which one is
appended a line. Whoever rewrites the record here, its key and the store, still cannot rewrite what was told before.
"""

from __future__ import annotations

import logging
import os
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec
import trio

from rayos_vmm.errors import Invalid, RayosError
from rayos_vmm.policy.audit import Anchor, Head

log = logging.getLogger(__name__)
POST_TIMEOUT_S: Final = 10.0
#: So long the end of the service waits for the witness to take the last head.
LAST_TIMEOUT_S: Final = 2.0
HEADS_MAXIMUM_BYTES: Final = 64 << 20


class AnchorStore(Protocol):
    """Keeps the record's end on this host."""

    async def save_anchor(self, anchor: bytes) -> None: ...


class AuditWitness:
    """A place that takes heads: `http://…`, `https://…` or the path of a file."""

    def __init__(self, place: str) -> None:
        self.place = place

    @property
    def is_url(self) -> bool:
        return self.place.startswith(("http://", "https://"))

    def check(self, record: Path) -> None:
        """Raises Invalid when it is a file that cannot be written, or on the mount of the record itself."""
        if self.is_url:
            return
        path = Path(self.place)
        try:
            device = (path if path.exists() else path.parent).stat().st_dev
        except OSError as error:
            raise Invalid(f"audit.witness = {self.place!r}: {error.strerror}") from None
        if device == record.parent.stat().st_dev:
            raise Invalid(
                f"audit.witness = {self.place!r} is on the file system of the record itself",
                hint="a witness is a URL, or a file on another mount",
            )

    def tell(self, head: Head) -> None:
        """Returns when the head is kept there. Blocks; raises OSError or ValueError."""
        data = msgspec.json.encode(head)
        if self.is_url:
            _request(self.place, data)
            return
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(self.place, flags, 0o600)
        try:
            os.write(fd, data + b"\n")
            os.fsync(fd)
        finally:
            os.close(fd)

    def read(self) -> list[Head]:
        """Returns every head that is kept there, a JSON object a line; from a URL by GET. Blocks.

        Raises:
            Invalid: it cannot be read, or holds something else.
        """
        try:
            data = _request(self.place, None) if self.is_url else _read(Path(self.place))
        except (OSError, ValueError, HTTPException) as error:
            raise Invalid(f"the witness {self.place}: {error}", code="file_missing") from None
        heads: list[Head] = []
        for number, line in enumerate(data.splitlines(), 1):
            try:
                heads.append(msgspec.json.decode(line, type=Head))
            except msgspec.MsgspecError as error:
                raise Invalid(f"the witness {self.place}, line {number}: no head: {error}") from None
        return heads


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A head goes where the owner said, and nowhere else."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _request(url: str, data: bytes | None) -> bytes:
    fields = {"Content-Type": "application/json"} if data is not None else {}
    request = urllib.request.Request(url, data, fields)
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=POST_TIMEOUT_S) as answer:
            content: bytes = answer.read(HEADS_MAXIMUM_BYTES)
            return content
    except urllib.error.HTTPError as error:
        with error:
            raise OSError(f"it answers {error.code} {error.reason}") from None


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEADS_MAXIMUM_BYTES)


class Heads:
    """Keeps each head of the record: its end in the store, the head with the witness if there is one."""

    def __init__(self, store: AnchorStore, witness: AuditWitness | None) -> None:
        self._store = store
        self._witness = witness
        self._latest: Head | None = None  # not told yet
        self._news = trio.Event()
        self.trouble = ""  # why the witness does not know the latest

    async def keep(self, head: Head, end: Anchor) -> None:
        """The end is in the store when this returns; the witness is told soon."""
        try:
            await self._store.save_anchor(msgspec.json.encode(end))
        except (RayosError, OSError) as error:
            log.error("The audit record's end could not be stored: %s", error)
        self._latest = head
        self._news.set()

    async def run(self) -> None:
        """Tells the witness; what it does not take it is told with the next. Ends when cancelled."""
        while self._witness is not None:
            await self._news.wait()
            self._news = trio.Event()
            await self._tell(self._witness, POST_TIMEOUT_S)

    async def tell_last(self) -> None:
        """Tells the witness what it does not know yet, within `LAST_TIMEOUT_S`."""
        if self._witness is not None and self._latest is not None:
            await self._tell(self._witness, LAST_TIMEOUT_S)

    async def _tell(self, witness: AuditWitness, timeout_s: float) -> None:
        head = self._latest
        if head is None:
            return
        why = f"nothing was answered within {timeout_s:g} s"
        with trio.move_on_after(timeout_s):
            try:
                await trio.to_thread.run_sync(witness.tell, head, abandon_on_cancel=True)
                why = ""
            except (OSError, ValueError, HTTPException) as error:
                why = str(error)
        if why and not self.trouble:
            log.error("The audit witness %s does not take the record's head: %s", witness.place, why[:200])
        self.trouble = why and f"{witness.place}: {why[:200]}"
        if not why and self._latest is head:
            self._latest = None
