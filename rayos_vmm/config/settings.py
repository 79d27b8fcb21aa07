"""The service's own settings: the `[service]` and the `[audit]` table."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from rayos_vmm.config.units import Duration, Size, format_size, parse_duration, parse_size
from rayos_vmm.errors import Invalid

IFNAMSIZ: Final = 16  # linux/if.h, with the NUL
_OCTET: Final = r"(25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])"
SEGMENT_MINIMUM_BYTES: Final = 64 << 10
SEGMENT_MAXIMUM_BYTES: Final = 64 << 20
WITNESS_PATTERN: Final = r"^(|/.*|https?://[!-~]+)$"
RESOLVER_PATTERN: Final = rf"^(|host|{_OCTET}(\.{_OCTET}){{3}})$"


class ServiceConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the daemon itself behaves.

    `subnet` is where guests live; the bridge gets its first address. When it collides with a route of the
    host the next free one of 10.86.0.0/16 is taken, unless `subnet_is_fixed`. `resolver` is who is asked for names
    that are no guest's: nobody (""), the "host"'s own name server, or an address. `shared_socket` is a second socket
    of the API, that every user may connect to and needs a token on. `balance`: device workers are moved to idler
    processors while their load is uneven. `overcommit`: a machine may ask for more processors and memory than the
    host has, and is told; else it is refused. `qemu_arguments`: a machine may bring arguments for QEMU of its own.
    """

    bridge: Annotated[str, Meta(pattern=r"^[a-z][a-z0-9-]{0,14}$")] = "rayos0"
    subnet: str = "10.86.0.0/24"
    subnet_is_fixed: bool = False
    network: bool = True
    resolver: Annotated[str, Meta(pattern=RESOLVER_PATTERN)] = ""
    start_timeout: Duration = "60s"
    idle_exit: Duration = "10s"
    balance: bool = True
    overcommit: bool = True
    qemu_arguments: bool = True
    shared_socket: Annotated[str, Meta(pattern="^/", max_length=100)] | None = None

    @property
    def start_timeout_s(self) -> float:
        return parse_duration(self.start_timeout)

    @property
    def idle_exit_s(self) -> float:
        return parse_duration(self.idle_exit)

    @property
    def network_address(self) -> ipaddress.IPv4Network:
        """The subnet.

        Raises:
            Invalid: it is not an IPv4 network of /16 to /29.
        """
        try:
            network = ipaddress.IPv4Network(self.subnet)
        except ValueError as error:
            raise Invalid(
                f"service.subnet = {self.subnet!r} is not an IPv4 network: {error}",
                hint='write for example subnet = "10.86.0.0/24"',
            ) from None
        if not 16 <= network.prefixlen <= 29:
            raise Invalid(f"service.subnet = {self.subnet!r}; allowed are prefixes from /16 to /29")
        return network


class AuditConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The record of decisions: where its head is kept beside, and the room that it takes.

    `witness` gets the signed head at each checkpoint: a URL that takes a POST, or a file on another mount. A segment of
    `segment` bytes is closed and another begun; the last `kept` closed ones are kept.
    """

    witness: Annotated[str, Meta(pattern=WITNESS_PATTERN, max_length=1024)] = ""
    segment: Size = "4MiB"
    kept: Annotated[int, Meta(ge=1, le=4096)] = 256

    @property
    def segment_bytes(self) -> int:
        """The size of a segment.

        Raises:
            Invalid: out of bounds.
        """
        size = parse_size(self.segment)
        if not SEGMENT_MINIMUM_BYTES <= size <= SEGMENT_MAXIMUM_BYTES:
            low, high = format_size(SEGMENT_MINIMUM_BYTES), format_size(SEGMENT_MAXIMUM_BYTES)
            raise Invalid(f"audit.segment = {self.segment!r}; allowed are {low} to {high}")
        return size
