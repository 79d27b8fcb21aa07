"""The host's side of the guest agent: requests in, bytes out; bytes in, replies out. No clock, no socket.

The agent (`images/rayos_images/guest/agent`) is a shell script on a console port that carries bytes and nothing else:
no message borders, and neither side is told when the other is replaced. So every conversation begins with `hello` and
a nonce that no stale byte can contain, and the host throws away all that comes before its echo.

host to guest, lines of shell words           guest to host, a line, then the announced bytes hello NONCE
@hello NONCE VERSION exec ID LIMIT WORD...                         @exit ID STATUS OUT ERR OUT_TOTAL
ERR_TOTAL, OUT + ERR bytes kill                                          (the @exit of the command, status
137) get ID LIMIT PATH                             @data ID SIZE, SIZE bytes put ID MODE PATH; piece SIZE,
bytes...; end   @done ID any of the three                              @fail ID SIZE, SIZE bytes of text
@ready VERSION when the agent starts: say hello

One request at a time. A host that died inside a `piece` has left the agent waiting for at most `PIECE_SIZE`
bytes: `resync()` sends that many spaces, which either complete the piece or are a blank line, and then says
hello.

The guest is hostile: header lines and lengths are bounded, each field is checked against the request, and a
violation raises `ProtocolError` and loses the conversation until the next hello.
"""

import enum
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

VERSION: Final = 1
PIECE_SIZE: Final = 128 * 1024  # bytes; each piece costs the guest one fork, each byte of a resync one read
MAX_LINE: Final = 64 * 1024  # bytes of one request line: the agent's shell reads it byte by byte
MAX_HEADER: Final = 160  # bytes of one reply line: seven numbers and a keyword
MAX_DATA: Final = 64 * 1024 * 1024  # bytes of one stream or file
MAX_FAILURE: Final = 8192  # bytes of an error text: a path and a reason
_NONCE: Final = re.compile(r"[0-9a-f]{16,64}")
_NUMBER: Final = re.compile(rb"[0-9]{1,18}")
_READY: Final = re.compile(rb"\n@ready ([0-9]{1,4})\n")


class ProtocolError(Exception):
    """The guest sent what its agent never sends (remote fault): say hello again or give up."""


class AgentBusyError(Exception):
    """A request was made while there is no conversation or another request is not answered (local fault)."""


class AgentState(enum.Enum):
    LOST = "lost"  # nothing is known of the agent
    SYNCING = "syncing"  # hello was sent
    IDLE = "idle"
    WAITING = "waiting"  # a request was sent


class AgentEvent(enum.Enum):
    SAID_HELLO = "said hello"
    HEARD_HELLO = "heard hello"
    REQUESTED = "requested"
    ANSWERED = "answered"
    RESTARTED = "restarted"
    VIOLATED = "violated"


TRANSITIONS: Final[Mapping[tuple[AgentState, AgentEvent], AgentState]] = {
    **{(state, AgentEvent.SAID_HELLO): AgentState.SYNCING for state in AgentState},
    **{(state, AgentEvent.VIOLATED): AgentState.LOST for state in AgentState},
    **{(state, AgentEvent.RESTARTED): AgentState.LOST for state in AgentState},
    (AgentState.SYNCING, AgentEvent.HEARD_HELLO): AgentState.IDLE,
    (AgentState.IDLE, AgentEvent.REQUESTED): AgentState.WAITING,
    (AgentState.WAITING, AgentEvent.ANSWERED): AgentState.IDLE,
}


@dataclass(frozen=True, slots=True)
class Ready:
    """The agent has started (boot, or it died): a pending request is lost, say hello."""


@dataclass(frozen=True, slots=True)
class Hello:
    """The agent answers us."""

    version: int


@dataclass(frozen=True, slots=True)
class Exited:
    """A command has ended: `status` as the shell tells it (128 + signal). Totals exceed what was sent when
    clipped."""

    id: int
    status: int
    stdout: bytes
    stderr: bytes
    stdout_total: int
    stderr_total: int


@dataclass(frozen=True, slots=True)
class FileData:
    """The contents of the file that was asked for."""

    id: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Done:
    """The file was written."""

    id: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The request could not be done; `message` is the guest's own text."""

    id: int
    message: str


Reply = Ready | Hello | Exited | FileData | Done | Failed


def quote(word: str | bytes) -> bytes:
    """Return `word` as one shell word on one line, whatever bytes it has. NUL raises `ValueError`."""
    data = word.encode("utf-8", "surrogateescape") if isinstance(word, str) else word
    if b"\0" in data:
        raise ValueError("a NUL byte cannot be in an argument or a path")
    return (
        b"$'"
        + re.sub(rb"[^\w@%+=:,./ -]", lambda match: b"\\%03o" % match[0][0], data, flags=re.ASCII)
        + b"'"
    )


class AgentProtocol:
    """One conversation after another with the agent behind one port."""

    def __init__(self) -> None:
        self.state = AgentState.LOST
        self._buffer = bytearray()
        self._nonce = b""
        self._id = 0
        self._kind = b""
        self._limit = 0

    def hello(self, nonce: str) -> bytes:
        """Return what begins a conversation; a pending request is given up, its command is killed.

        `nonce` is 16 to 64 hexadecimal digits that no earlier conversation had; to say it again, while there is no
        answer, repeats the one, and further answers to it are passed over.
        """
        if not _NONCE.fullmatch(nonce):
            raise ValueError(f"nonce {nonce!r} is not 16 to 64 hexadecimal digits")
        self._step(AgentEvent.SAID_HELLO)
        self._nonce = nonce.encode()
        return b"\nhello %b\n" % self._nonce

    def resync(self, nonce: str) -> bytes:
        """Return a hello that gets through even if the agent waits for the rest of a piece. Use it when no
        answer to `hello` came within about a second."""
        return b" " * PIECE_SIZE + self.hello(nonce)

    def exec(self, argv: Sequence[str | bytes], *, limit_bytes: int = MAX_DATA) -> tuple[int, bytes]:
        """Return the request's number and what runs `argv` (no shell; stdin is empty, working directory
        /root).

        At most `limit_bytes` of each output come back. Answered by `Exited`.
        """
        if not argv:
            raise ValueError("argv is empty")
        return self._request(b"exec", b"exit", limit_bytes, b"%d" % limit_bytes, *map(quote, argv))

    def shell(self, command: str, *, limit_bytes: int = MAX_DATA) -> tuple[int, bytes]:
        """As `exec`, for a command line of the guest's sh."""
        return self.exec(["sh", "-c", command], limit_bytes=limit_bytes)

    def kill(self) -> bytes:
        """Return what kills the running command with its process group; its `Exited` (137) still comes."""
        if self.state is not AgentState.WAITING or self._kind != b"exit":
            raise AgentBusyError("no command is running")
        return b"kill\n"

    def get(self, path: str | bytes, *, limit_bytes: int = MAX_DATA) -> tuple[int, bytes]:
        """Return the request's number and what reads a file. Answered by `FileData`, or `Failed` (also when
        it is larger than `limit_bytes`)."""
        return self._request(b"get", b"data", limit_bytes, b"%d" % limit_bytes, quote(path))

    def put(self, path: str | bytes, data: bytes, *, mode: int = 0o644) -> tuple[int, Iterator[bytes]]:
        """Return the request's number and what writes a file, in parts to send one after the other.

        A regular file is replaced as a whole, a device is written in place. Answered by `Done` or `Failed`.
        Parts must all be sent: when that is interrupted, `resync`.
        """
        if len(data) > MAX_DATA:
            raise ValueError(f"file of {len(data)} bytes exceeds {MAX_DATA}")
        if not 0 <= mode <= 0o7777:
            raise ValueError(f"mode {mode:#o} is not within 0 to 0o7777")
        number, head = self._request(b"put", b"done", 0, b"%o" % mode, quote(path))
        return number, self._parts(head, data)

    @staticmethod
    def _parts(head: bytes, data: bytes) -> Iterator[bytes]:
        yield head
        for start in range(0, len(data), PIECE_SIZE):
            piece = data[start : start + PIECE_SIZE]
            yield b"piece %d\n%b" % (len(piece), piece)
        yield b"end\n"

    def receive(self, data: bytes) -> list[Reply]:
        """Take bytes from the port and return the replies that they complete, in order.

        Raises `ProtocolError` when the guest breaks the protocol; the state is then LOST and replies that the
        same bytes completed before are dropped with it.
        """
        self._buffer += data
        replies: list[Reply] = []
        while (reply := self._next()) is not None:
            replies.append(reply)
        return replies

    def _request(self, verb: bytes, answer: bytes, limit_bytes: int, *words: bytes) -> tuple[int, bytes]:
        if not 0 <= limit_bytes <= MAX_DATA:
            raise ValueError(f"limit of {limit_bytes} bytes is not within 0 to {MAX_DATA}")
        line = b" ".join((verb, b"%d" % (self._id + 1), *words)) + b"\n"
        if len(line) > MAX_LINE:
            raise ValueError(f"request of {len(line)} bytes exceeds {MAX_LINE}: put a script into the guest")
        if self.state is not AgentState.IDLE:
            raise AgentBusyError(f"the agent is {self.state.value}, a request needs it idle")
        self._step(AgentEvent.REQUESTED)
        self._id += 1
        self._kind = answer
        self._limit = limit_bytes
        return self._id, line

    def _step(self, event: AgentEvent) -> None:
        self.state = TRANSITIONS[self.state, event]

    def _violation(self, text: str) -> ProtocolError:
        self._step(AgentEvent.VIOLATED)
        self._buffer.clear()
        return ProtocolError(text)

    def _next(self) -> Reply | None:
        if self.state in (AgentState.LOST, AgentState.SYNCING):
            return self._search()
        while self._buffer[:1] == b"\n":
            del self._buffer[:1]
        end = self._buffer.find(b"\n", 0, MAX_HEADER)
        if end < 0:
            if len(self._buffer) >= MAX_HEADER:
                raise self._violation(f"header line exceeds {MAX_HEADER} bytes")
            return None
        kind, *fields = bytes(self._buffer[:end]).split(b" ")
        if kind == b"@ready":
            del self._buffer[:end]  # its newline may begin the next marker
            self._step(AgentEvent.RESTARTED)
            return Ready()
        if kind == b"@hello" and fields[:1] == [self._nonce]:  # one more answer to what was said again
            del self._buffer[:end]
            return self._next()
        if self.state is not AgentState.WAITING:
            raise self._violation(f"{kind[:16]!r} without a request")
        numbers = self._numbers(kind, fields)
        sizes = numbers[2:4] if kind == b"@exit" else numbers[1:2]
        total = end + 1 + sum(sizes)
        if len(self._buffer) < total:
            return None
        body = bytes(self._buffer[end + 1 : total])
        del self._buffer[:total]
        self._step(AgentEvent.ANSWERED)
        match kind:
            case b"@exit":
                number, status, out, _, out_total, err_total = numbers
                return Exited(number, status, body[:out], body[out:], out_total, err_total)
            case b"@data":
                return FileData(numbers[0], body)
            case b"@done":
                return Done(numbers[0])
            case _:
                return Failed(numbers[0], body.decode("utf-8", "replace"))

    def _numbers(self, kind: bytes, fields: Sequence[bytes]) -> list[int]:
        """Return the fields of a reply line after checking all of them."""
        expected = {b"@exit": 6, b"@data": 2, b"@done": 1, b"@fail": 2}.get(kind)
        if expected is None or (kind != b"@fail" and kind != b"@" + self._kind):
            raise self._violation(f"{kind[:16]!r} is no answer to the request, @{self._kind.decode()} is")
        if len(fields) != expected or not all(_NUMBER.fullmatch(field) for field in fields):
            raise self._violation(f"{kind.decode()} needs {expected} numbers")
        numbers = [int(field) for field in fields]
        if numbers[0] != self._id:
            raise self._violation(f"answer to request {numbers[0]}, but {self._id} was asked")
        if kind == b"@exit" and numbers[1] > 255:
            raise self._violation(f"exit status {numbers[1]} exceeds 255")
        limit = MAX_FAILURE if kind == b"@fail" else self._limit
        sizes = numbers[2:4] if kind == b"@exit" else numbers[1:2]
        if any(size > limit for size in sizes):
            raise self._violation(f"{max(sizes)} bytes announced, {limit} allowed")
        return numbers

    def _search(self) -> Reply | None:
        """Throw away everything up to the echo of our nonce, or an agent that starts."""
        hello = rb"|\n@hello %b ([0-9]{1,4})\n" % self._nonce if self.state is AgentState.SYNCING else b""
        found = re.search(_READY.pattern + hello, self._buffer)
        if found is None:
            del self._buffer[:-MAX_HEADER]  # a marker may be cut here
            return None
        version = found[2] if hello and found[2] else None
        del self._buffer[: found.end() - 1]
        if version is None:
            self._step(AgentEvent.RESTARTED)
            return Ready()
        if int(version) != VERSION:
            raise self._violation(f"the agent speaks version {int(version)}, we {VERSION}")
        self._step(AgentEvent.HEARD_HELLO)
        return Hello(int(version))
