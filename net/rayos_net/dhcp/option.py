"""DHCP options: code numbers, the tag-length-value walk, long options, and value codecs (RFC 2132, 3396,
3442).

Invariant: a decoded value has been bounds-checked against its area, and the work is linear in the area's
size; an area may end without its end option, as small clients send it. Encoding never writes beyond the room
that it was given.
"""

import re
import struct
from collections.abc import Iterable, Sequence
from enum import IntEnum
from ipaddress import IPv4Address, IPv4Network
from typing import Final


class Code(IntEnum):
    """Option codes that we read or send, each with the document that defines it."""

    PAD = 0  # RFC 2132, 3.1
    SUBNET_MASK = 1  # 3.3
    ROUTER = 3  # 3.5
    DNS = 6  # 3.8
    HOST_NAME = 12  # 3.14
    DOMAIN_NAME = 15  # 3.17
    MTU = 26  # 5.1
    BROADCAST = 28  # 5.3
    NTP = 42  # 8.3
    REQUESTED_ADDRESS = 50  # 9.1
    LEASE_TIME = 51  # 9.2
    OVERLOAD = 52  # 9.3
    MESSAGE_TYPE = 53  # 9.6
    SERVER_ID = 54  # 9.7
    PARAMETER_LIST = 55  # 9.8
    MESSAGE = 56  # 9.9
    MAX_SIZE = 57  # 9.10
    RENEWAL_TIME = 58  # 9.11
    REBINDING_TIME = 59  # 9.12
    VENDOR_CLASS = 60  # 9.13
    CLIENT_ID = 61  # 9.14
    TFTP_SERVER = 66  # 9.4
    BOOT_FILE = 67  # 9.5
    RAPID_COMMIT = 80  # RFC 4039
    FQDN = 81  # RFC 4702
    RELAY_AGENT = 82  # RFC 3046
    ARCHITECTURE = 93  # RFC 4578, 2.1
    IPV6_ONLY = 108  # RFC 8925
    SUBNET_SELECTION = 118  # RFC 3011
    DOMAIN_SEARCH = 119  # RFC 3397
    CLASSLESS_ROUTES = 121  # RFC 3442
    END = 255  # RFC 2132, 3.2


class RelayCode(IntEnum):
    """Sub-options of the relay agent information option."""

    CIRCUIT_ID = 1  # RFC 3046, 2.0
    REMOTE_ID = 2  # RFC 3046, 2.0
    LINK_SELECTION = 5  # RFC 3527
    SERVER_ID_OVERRIDE = 11  # RFC 5107


LENGTH_MAX: Final = 255  # the length field is one byte
INFINITE: Final = 0xFFFFFFFF  # a lease time without end (RFC 2131, 3.3)

_U16: Final = struct.Struct("!H")
_U32: Final = struct.Struct("!I")
_LABEL: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\Z")


class BadOption(ValueError):
    """The remote side sent an option area that breaks the format."""


def scan(area: bytes, into: dict[int, bytes], at: int = 0) -> None:
    """Read one option area, from byte `at` on, into `into`; a code that is there already is continued (RFC
    3396, 5).

    Raises BadOption when a length passes the end of the area.
    """
    first, size = at, len(area)
    while at < size:
        code = area[at]
        if code == 255:
            return
        at += 1
        if code == 0:
            continue
        if at >= size:
            raise BadOption(f"option {code} at byte {at - 1 - first} has no length byte")
        length = area[at]
        at += 1
        stop = at + length
        if stop > size:
            raise BadOption(f"option {code} is {length} bytes long, {size - at} are left")
        into[code] = into[code] + area[at:stop] if code in into else area[at:stop]
        at = stop


def encode(code: int, value: bytes) -> bytes:
    """One option as bytes, split into several of the same code beyond 255 bytes (RFC 3396, 7)."""
    if len(value) <= LENGTH_MAX:
        return bytes((code, len(value))) + value
    parts = [value[at : at + LENGTH_MAX] for at in range(0, len(value), LENGTH_MAX)]
    return b"".join(bytes((code, len(part))) + part for part in parts)


def u8(value: bytes | None) -> int | None:
    """The one-byte number in `value`, None when absent or of another size."""
    return value[0] if value is not None and len(value) == 1 else None


def u16(value: bytes | None) -> int | None:
    """The two-byte number in `value`, None when absent or of another size."""
    return _U16.unpack(value)[0] if value is not None and len(value) == 2 else None


def u32(value: bytes | None) -> int | None:
    """The four-byte number (an address or seconds) in `value`, None when absent or of another size."""
    return _U32.unpack(value)[0] if value is not None and len(value) == 4 else None


def addresses(values: Iterable[IPv4Address]) -> bytes:
    """A list of addresses as an option value."""
    return b"".join(value.packed for value in values)


def read_addresses(value: bytes | None) -> tuple[IPv4Address, ...]:
    """The addresses in an option value; a torn last one is left out."""
    if value is None:
        return ()
    return tuple(IPv4Address(value[at : at + 4]) for at in range(0, len(value) - 3, 4))


def routes(values: Iterable[tuple[IPv4Network, IPv4Address]]) -> bytes:
    """Classless routes as an option value: prefix length, its significant bytes, router (RFC 3442)."""
    out = b""
    for network, router in values:
        significant = (network.prefixlen + 7) // 8
        out += bytes((network.prefixlen,)) + network.network_address.packed[:significant] + router.packed
    return out


def read_routes(value: bytes | None) -> tuple[tuple[IPv4Network, IPv4Address], ...]:
    """The classless routes in an option value, () when it breaks the format (then option 3 counts again)."""
    found = []
    at = 0
    while value is not None and at < len(value):
        prefix = value[at]
        significant = (prefix + 7) // 8
        stop = at + 1 + significant + 4
        if prefix > 32 or stop > len(value):
            return ()
        destination = value[at + 1 : at + 1 + significant].ljust(4, b"\0")
        network = IPv4Network((destination, prefix), strict=False)
        found.append((network, IPv4Address(value[stop - 4 : stop])))
        at = stop
    return tuple(found)


def search_list(domains: Sequence[str]) -> bytes:
    """Domain names in DNS wire form, without compression (RFC 3397, 2)."""
    out = b""
    for domain in domains:
        for label in domain.rstrip(".").split("."):
            out += bytes((len(label),)) + label.encode("ascii")
        out += b"\0"
    return out


def host_name(value: bytes | None) -> str | None:
    """The first label of a host name that is fit for DNS, lower case, or None (letters, digits, inner
    hyphens).
    """
    if value is None:
        return None
    label = value.rstrip(b"\0").split(b".", 1)[0].decode("ascii", "replace")
    return label.lower() if _LABEL.match(label) else None


def fqdn_name(value: bytes | None) -> str | None:
    """The first label of a client FQDN option (RFC 4702, 2.1 to 2.3): both encodings, else None."""
    if value is None or len(value) < 4:
        return None
    name = value[3:]
    if value[0] & 0x04:  # E bit: DNS wire form
        if not 1 <= name[0] <= 63:
            return None
        name = name[1 : 1 + name[0]]
    return host_name(name)
