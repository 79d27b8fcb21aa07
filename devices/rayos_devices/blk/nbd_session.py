"""One NBD connection, server side, sans-IO: bytes in; bytes to send and requests to do out.

Theory of operation: the fixed newstyle handshake goes from the client's flags through any number of options to GO or
EXPORT_NAME; from then on the client sends requests until it says DISC. A client that breaks the protocol gets a
ProtocolError and is dropped. Replies are simple ones, in any order: the cookie says whose they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from rayos_devices.blk.nbd_wire import (
    CLIENT_FLAGS,
    EXPORT,
    EXPORT_PADDING,
    GREETING,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    MAGIC,
    MAX_OPTION_BYTES,
    MAX_PAYLOAD_BYTES,
    OPTION,
    OPTION_MAGIC,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    REPLY,
    REPLY_MAGIC,
    REQUEST,
    REQUEST_MAGIC,
    Command,
    CommandFlag,
    Error,
    HandshakeFlag,
    Info,
    Option,
    OptionReply,
    TransmissionFlag,
)
from rayos_devices.errors import ProtocolError

_FLAGS: Final = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
#: Data that a client may ask to read or write at once; TRIM and WRITE_ZEROES carry none.
_CARRIES_DATA: Final = (Command.READ, Command.WRITE)


@dataclass(frozen=True, slots=True)
class Export:
    """The one disk that is served, by any name. All sizes in bytes."""

    size_bytes: int
    is_read_only: bool = False
    block_bytes: int = 512
    preferred_bytes: int = 4096

    @property
    def flags(self) -> TransmissionFlag:
        """The flags that tell a client of what it may ask."""
        flags = TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH
        if self.is_read_only:
            return flags | TransmissionFlag.READ_ONLY
        return (
            flags
            | TransmissionFlag.SEND_FUA
            | TransmissionFlag.SEND_TRIM
            | TransmissionFlag.SEND_WRITE_ZEROES
        )


@dataclass(frozen=True, slots=True)
class Request:
    """A request that keeps the rules; `data` is what is to be written."""

    command: Command
    flags: CommandFlag
    cookie: int
    offset: int
    length: int
    data: bytes = b""


class _Phase(Enum):
    FLAGS = auto()
    OPTIONS = auto()
    TRANSMISSION = auto()
    OVER = auto()


class NbdSession:
    """`receive` bytes, send what `take_output` gives, do the requests, `reply` to each once."""

    def __init__(self, export: Export) -> None:
        self._export = export
        self._phase = _Phase.FLAGS
        self._input = bytearray()
        self._output = bytearray(GREETING.pack(MAGIC, OPTION_MAGIC, _FLAGS))
        self._has_zeroes = True

    @property
    def is_over(self) -> bool:
        """The client has said that it leaves."""
        return self._phase is _Phase.OVER

    @property
    def output_bytes(self) -> int:
        """Bytes that wait to be sent."""
        return len(self._output)

    def take_output(self) -> bytearray:
        """The bytes to send now."""
        output, self._output = self._output, bytearray()
        return output

    def receive(self, data: bytes | memoryview) -> list[Request]:
        """The requests that are complete with `data`; those that break a rule are answered here.

        Errors: ProtocolError, after which the connection is of no use.
        """
        self._input += data
        requests: list[Request] = []
        used = 0
        view = memoryview(self._input)
        while (step := self._step(view[used:], requests)) > 0:
            used += step
        view.release()
        del self._input[:used]
        return requests

    def _step(self, data: memoryview, requests: list[Request]) -> int:
        """Takes one message from the front; how many bytes it was, 0 when it is not all there."""
        match self._phase:
            case _Phase.FLAGS:
                return self._take_flags(data)
            case _Phase.OPTIONS:
                return self._take_option(data)
            case _Phase.TRANSMISSION:
                return self._take_request(data, requests)
            case _Phase.OVER:
                return len(data)

    # -- handshake -----------------------------------------------------------------------------------------------

    def _take_flags(self, data: memoryview) -> int:
        if len(data) < CLIENT_FLAGS.size:
            return 0
        (flags,) = CLIENT_FLAGS.unpack_from(data)
        if flags & ~int(_FLAGS) or not flags & HandshakeFlag.FIXED_NEWSTYLE:
            raise ProtocolError(f"client flags {flags:#x}: 1 or 3 are allowed (fixed newstyle)")
        self._has_zeroes = not flags & HandshakeFlag.NO_ZEROES
        self._phase = _Phase.OPTIONS
        return CLIENT_FLAGS.size

    def _take_option(self, data: memoryview) -> int:
        if len(data) < OPTION.size:
            return 0
        magic: int
        option: int
        length: int
        magic, option, length = OPTION.unpack_from(data)
        if magic != OPTION_MAGIC:
            raise ProtocolError(f"option magic {magic:#x}: {OPTION_MAGIC:#x} is allowed")
        if length > MAX_OPTION_BYTES:
            raise ProtocolError(f"an option of {length} bytes: at most {MAX_OPTION_BYTES} are allowed")
        end = OPTION.size + length
        if len(data) < end:
            return 0
        content = bytes(data[OPTION.size : end])
        match option:
            case Option.EXPORT_NAME:
                self._output += EXPORT.pack(self._export.size_bytes, self._export.flags)
                self._output += bytes(EXPORT_PADDING if self._has_zeroes else 0)
                self._phase = _Phase.TRANSMISSION
            case Option.ABORT:
                self._answer(option, OptionReply.ACK)
                self._phase = _Phase.OVER
            case Option.LIST:
                self._list(option, content)
            case Option.INFO | Option.GO:
                self._inform(option, content)
            case _:
                self._answer(option, OptionReply.ERR_UNSUP)
        return end

    def _answer(self, option: int, kind: OptionReply, content: bytes = b"") -> None:
        self._output += OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, kind, len(content)) + content

    def _list(self, option: int, content: bytes) -> None:
        if content:
            self._answer(option, OptionReply.ERR_INVALID)
            return
        self._answer(option, OptionReply.SERVER, bytes(4))  # one export, whose name is empty
        self._answer(option, OptionReply.ACK)

    def _inform(self, option: int, content: bytes) -> None:
        """INFO and GO: name length u32, name, count u16, that many types u16."""
        name_bytes = int.from_bytes(content[:4])
        rest = content[4 + name_bytes :]
        count = int.from_bytes(rest[:2])
        if len(content) < 6 + name_bytes or len(rest) != 2 + 2 * count:
            self._answer(option, OptionReply.ERR_INVALID)
            return
        export = self._export
        asked = {int.from_bytes(rest[at : at + 2]) for at in range(2, len(rest), 2)}
        self._answer(option, OptionReply.INFO, INFO_EXPORT.pack(Info.EXPORT, export.size_bytes, export.flags))
        if Info.BLOCK_SIZE in asked:
            sizes = (export.block_bytes, export.preferred_bytes, MAX_PAYLOAD_BYTES)
            self._answer(option, OptionReply.INFO, INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, *sizes))
        self._answer(option, OptionReply.ACK)
        if option == Option.GO:
            self._phase = _Phase.TRANSMISSION

    # -- transmission --------------------------------------------------------------------------------------------

    def _take_request(self, data: memoryview, requests: list[Request]) -> int:
        if len(data) < REQUEST.size:
            return 0
        magic, flags, kind, cookie, offset, length = REQUEST.unpack_from(data)
        if magic != REQUEST_MAGIC:
            raise ProtocolError(f"request magic {magic:#x}: {REQUEST_MAGIC:#x} is allowed")
        end = REQUEST.size
        if kind in _CARRIES_DATA and length > MAX_PAYLOAD_BYTES:
            raise ProtocolError(f"a request of {length} bytes: at most {MAX_PAYLOAD_BYTES} are allowed")
        if kind == Command.WRITE:
            end += length
            if len(data) < end:
                return 0
        if kind == Command.DISC:
            self._phase = _Phase.OVER
            return end
        error = self._check(kind, flags, offset, length)
        if error is Error.OK:
            content = bytes(data[REQUEST.size : end])
            requests.append(Request(Command(kind), CommandFlag(flags), cookie, offset, length, content))
        else:
            self.reply(cookie, error)
        return end

    def _check(self, kind: int, flags: int, offset: int, length: int) -> Error:
        """Whether a request keeps the rules of the export."""
        export = self._export
        if kind not in list(Command) or flags & ~int(CommandFlag.FUA | CommandFlag.NO_HOLE):
            return Error.EINVAL
        if kind == Command.FLUSH:
            return Error.EINVAL if offset or length else Error.OK
        if export.is_read_only and kind != Command.READ:
            return Error.EPERM
        is_aligned = offset % export.block_bytes == 0 and length % export.block_bytes == 0
        is_inside = offset + length <= export.size_bytes
        return Error.OK if length and is_aligned and is_inside else Error.EINVAL

    def reply(self, cookie: int, error: Error, data: bytes | bytearray | memoryview = b"") -> None:
        """Answers a request; `data` is what was read, of one that succeeded."""
        self._output += REPLY.pack(REPLY_MAGIC, error, cookie)
        self._output += data
