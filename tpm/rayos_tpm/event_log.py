"""Event logs: entries, TCG's crypto-agile binary form, and JSON.

A binary log is little endian: one TCG_PCR_EVENT that carries the "Spec ID Event03" header, then
TCG_PCR_EVENT2 records. Invariant: decode(encode(entries)) gives the same registers, digests and data.
Specification: TCG PC Client Platform Firmware Profile 1.06, 10.2 and 10.4.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from enum import IntEnum, StrEnum
from typing import Final

import msgspec

from rayos_tpm import pcr
from rayos_tpm.errors import MalformedMessage

HOST_LIMIT: Final = 256  # entries a launch may log; an extend without an entry could never be replayed
GUEST_LIMIT: Final = 4096  # entries kept of what the guest extends; its registers are followed beyond that
_DECODE_LIMIT: Final = 65536
_EVENT_LIMIT: Final = 1 << 20  # bytes of one event's data

_LEGACY: Final = struct.Struct("<II20sI")  # pcrIndex, eventType, SHA-1 digest, eventDataSize
_EVENT2: Final = struct.Struct("<III")  # pcrIndex, eventType, digest count
_DIGEST_SIZES: Final = {0x0004: 20, 0x000B: 32, 0x000C: 48, 0x000D: 64}
_SHA256: Final = 0x000B
_GUEST_TAG: Final = 0x52415947  # "GYAR" in memory
_SIGNATURE: Final = b"Spec ID Event03\0"


class EventType(IntEnum):
    """Event types (10.4.1) that this code writes or explains."""

    POST_CODE = 0x1
    NO_ACTION = 0x3
    SEPARATOR = 0x4
    ACTION = 0x5
    EVENT_TAG = 0x6
    S_CRTM_CONTENTS = 0x7
    S_CRTM_VERSION = 0x8
    CPU_MICROCODE = 0x9
    PLATFORM_CONFIG_FLAGS = 0xA
    TABLE_OF_DEVICES = 0xB
    COMPACT_HASH = 0xC
    IPL = 0xD
    IPL_PARTITION_DATA = 0xE
    NONHOST_CODE = 0xF
    NONHOST_CONFIG = 0x10
    NONHOST_INFO = 0x11
    OMIT_BOOT_DEVICE_EVENTS = 0x12
    EFI_VARIABLE_DRIVER_CONFIG = 0x80000001
    EFI_VARIABLE_BOOT = 0x80000002
    EFI_BOOT_SERVICES_APPLICATION = 0x80000003
    EFI_BOOT_SERVICES_DRIVER = 0x80000004
    EFI_RUNTIME_SERVICES_DRIVER = 0x80000005
    EFI_GPT_EVENT = 0x80000006
    EFI_ACTION = 0x80000007
    EFI_PLATFORM_FIRMWARE_BLOB = 0x80000008
    EFI_HANDOFF_TABLES = 0x80000009
    EFI_PLATFORM_FIRMWARE_BLOB2 = 0x8000000A
    EFI_HANDOFF_TABLES2 = 0x8000000B
    EFI_VARIABLE_BOOT2 = 0x8000000C
    EFI_VARIABLE_AUTHORITY = 0x800000E0


def type_name(number: int) -> str:
    """An event type's name, or its number in hexadecimal."""
    return f"EV_{EventType(number).name}" if number in EventType._value2member_map_ else f"{number:#x}"


class Source(StrEnum):
    """Who caused an extend."""

    HOST = "host"
    GUEST = "guest"


class Entry(msgspec.Struct, frozen=True):
    """One change of a register.

    pcr: the register. digest: what it was extended with; empty for a reset by the guest.
    source: host (measured by us) or guest (seen by us on its way to the TPM).
    phase: the boot phase of a host entry, else empty.
    description: for people.
    """

    pcr: int
    digest: bytes
    source: Source
    phase: str
    description: str


class Log(msgspec.Struct, frozen=True):
    """A log to keep in a file.

    profile: the PCR profile's name. entries: in the order in which they happened.
    missing: guest entries that were not kept, for there were more than GUEST_LIMIT.
    """

    vm_uuid: str
    profile: str
    entries: list[Entry]
    missing: int = 0

    def to_json(self) -> bytes:
        """The log as JSON, digests in Base64."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1)

    @classmethod
    def from_json(cls, data: bytes) -> Log:
        """MalformedMessage: not a log."""
        try:
            log = msgspec.json.decode(data, type=cls)
        except (msgspec.DecodeError, ValueError) as error:
            raise MalformedMessage(f"not an event log: {error}") from None
        for entry in log.entries:
            if not 0 <= entry.pcr < pcr.PCR_COUNT or len(entry.digest) not in (0, pcr.DIGEST_SIZE):
                raise MalformedMessage(
                    f"the log has an entry for PCR {entry.pcr} with {len(entry.digest)} digest bytes"
                )
        return log

    def to_tcg(self) -> bytes:
        """The log in TCG's binary form. Resets have no form there and are left out."""
        return encode(entry for entry in self.entries if entry.digest)


def replay(entries: Iterable[Entry]) -> dict[int, bytes]:
    """All 24 registers after these entries, dynamic ones from zero on."""
    bank = pcr.Bank(dict.fromkeys(range(pcr.PCR_COUNT), pcr.ZERO))
    for entry in entries:
        if entry.digest:
            bank.extend(entry.pcr, entry.digest)
        else:
            bank.reset(entry.pcr)
    return bank.values


class TcgEvent(msgspec.Struct, frozen=True):
    """A record of a binary log: register, type, SHA-256 digest (None when that bank is absent), data."""

    pcr: int
    kind: int
    digest: bytes | None
    data: bytes

    @property
    def extends(self) -> bool:
        """Whether the record stands for an extend (EV_NO_ACTION records do not)."""
        return self.kind != EventType.NO_ACTION and self.digest is not None


def _header() -> bytes:
    spec = _SIGNATURE + struct.pack("<IBBBB", 0, 0, 2, 105, 2) + struct.pack("<IHHB", 1, _SHA256, 32, 0)
    return _LEGACY.pack(0, EventType.NO_ACTION, bytes(20), len(spec)) + spec


def encode(entries: Iterable[Entry]) -> bytes:
    """A crypto-agile log with the SHA-256 bank. Host entries show their description as EV_POST_CODE."""
    out = [_header()]
    for entry in entries:
        text = entry.description.encode()
        if entry.source is Source.HOST:
            kind, data = EventType.POST_CODE, text
        else:
            kind, data = EventType.EVENT_TAG, struct.pack("<II", _GUEST_TAG, len(text)) + text
        out.append(_EVENT2.pack(entry.pcr, kind, 1) + struct.pack("<H", _SHA256) + entry.digest)
        out.append(struct.pack("<I", len(data)) + data)
    return b"".join(out)


def decode(log: bytes) -> list[TcgEvent]:
    """The records after the header of a crypto-agile log, as firmware leaves it.

    MalformedMessage: not a crypto-agile log, or a record that reaches past the end.
    """
    sizes, offset = _decode_header(log)
    events: list[TcgEvent] = []
    while offset < len(log):
        if len(events) == _DECODE_LIMIT:
            raise MalformedMessage(f"the event log has more than {_DECODE_LIMIT} records")
        event, offset = _decode_event(log, offset, sizes)
        events.append(event)
    return events


def _take(log: bytes, offset: int, size: int) -> bytes:
    if offset + size > len(log):
        raise MalformedMessage(f"the event log of {len(log)} bytes ends inside a field of {size} at {offset}")
    return log[offset : offset + size]


def _decode_header(log: bytes) -> tuple[dict[int, int], int]:
    _, kind, _, size = _LEGACY.unpack(_take(log, 0, _LEGACY.size))
    spec = _take(log, _LEGACY.size, size)
    if kind != EventType.NO_ACTION or not spec.startswith(_SIGNATURE):
        raise MalformedMessage("the event log does not start with a Spec ID Event03 header")
    (count,) = struct.unpack("<I", _take(spec, 24, 4))
    if count > 16:
        raise MalformedMessage(f"the event log's header has {count} algorithms; allowed are 16")
    sizes = {}
    for index in range(count):
        algorithm, digest_size = struct.unpack("<HH", _take(spec, 28 + 4 * index, 4))
        if digest_size > 64:
            raise MalformedMessage(f"the event log has digests of {digest_size} bytes; allowed are 64")
        sizes[algorithm] = digest_size
    return _DIGEST_SIZES | sizes, _LEGACY.size + size


def _decode_event(log: bytes, offset: int, sizes: dict[int, int]) -> tuple[TcgEvent, int]:
    index, kind, count = _EVENT2.unpack(_take(log, offset, _EVENT2.size))
    if index >= pcr.PCR_COUNT and kind != EventType.NO_ACTION:
        raise MalformedMessage(f"the event log extends PCR {index}; there are {pcr.PCR_COUNT}")
    if count > len(sizes):
        raise MalformedMessage(f"a record with {count} digests; the header has {len(sizes)} algorithms")
    offset += _EVENT2.size
    digest = None
    for _ in range(count):
        (algorithm,) = struct.unpack("<H", _take(log, offset, 2))
        if algorithm not in sizes:
            raise MalformedMessage(f"a record has a digest of unknown algorithm {algorithm:#x}")
        value = _take(log, offset + 2, sizes[algorithm])
        offset += 2 + sizes[algorithm]
        if algorithm == _SHA256:
            digest = value
    (size,) = struct.unpack("<I", _take(log, offset, 4))
    if size > _EVENT_LIMIT:
        raise MalformedMessage(f"a record with {size} bytes of data; allowed are {_EVENT_LIMIT}")
    data = _take(log, offset + 4, size)
    return TcgEvent(index, kind, digest, data), offset + 4 + size


def describe(event: TcgEvent) -> str:
    """A record for people: its type, and its data when that is text."""
    data = event.data.rstrip(b"\0")
    if event.kind == EventType.EVENT_TAG and len(data) > 8:
        data = data[8:]
    text = data.decode("ascii", "replace")
    is_text = bool(text) and len(text) <= 200 and text.isprintable() and "\ufffd" not in text
    return f"{type_name(event.kind)} {text}" if is_text else type_name(event.kind)


def describe_guest(entries: Sequence[Entry], events: Sequence[TcgEvent]) -> list[str]:
    """A description for each entry: the firmware's for the guest entries that its log explains.

    A record explains the next guest entry of its register that has its digest.
    """
    names = [entry.description for entry in entries]
    position = dict.fromkeys(range(pcr.PCR_COUNT), 0)
    for event in events:
        if not event.extends:
            continue
        for index in range(position[event.pcr], len(entries)):
            entry = entries[index]
            if entry.source is Source.GUEST and entry.pcr == event.pcr and entry.digest == event.digest:
                names[index] = describe(event)
                position[event.pcr] = index + 1
                break
    return names
