"""The names of one subnet's guests as a DNS zone, without I/O (RFC 1034, 4.3; RFC 1035, 4; RFC 2308).

Forward names `NAME.DOMAIN` have an A record, the subnet's addresses a PTR record; the server itself is
`host.DOMAIN` (and the zone's name server). Every other name is somebody else's: see `Query.is_ours`.

Invariant: an address has one name and a name one address; there are no more names than addresses. Of a query
the header and its one question are read, nothing behind; whatever the bytes are, nothing is raised, and no
answer exceeds 512 bytes.
"""

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Final

from dnslib import (  # type: ignore[import-untyped]
    CLASS,
    NS,
    OPCODE,
    PTR,
    QTYPE,
    RCODE,
    RR,
    SOA,
    A,
    DNSHeader,
    DNSQuestion,
    DNSRecord,
)
from dnslib.dns import DNSBuffer, DNSError  # type: ignore[import-untyped]

TTL_SECONDS: Final = 30  # a lease may end at any time
NEGATIVE_TTL_SECONDS: Final = 5  # a guest that boots has its name soon (RFC 2308, 5)
QUERY_MAX: Final = 4096  # ours: nobody asks more in one question
HEADER_SIZE: Final = 12  # RFC 1035, 4.1.1
LABEL_MAX: Final = 63  # RFC 1035, 2.3.4
NAME_MAX: Final = 255
HOST: Final = "host"
LABEL: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\Z")
_REVERSE: Final = re.compile(r"(\d{1,3})\.(\d{1,3})\.(\d{1,3})\.(\d{1,3})\.in-addr\.arpa\Z")


@dataclass(frozen=True, slots=True)
class Query:
    """One question. `name` is lower case without the last dot; `fault` is the RCODE of one that is refused."""

    header: DNSHeader
    question: DNSQuestion | None
    name: str
    is_ours: bool
    fault: int = RCODE.NOERROR


class Zone:
    """The zone `domain` over the addresses of `network`; `server` is us."""

    def __init__(self, domain: str, network: IPv4Network, server: IPv4Address) -> None:
        self.domain = domain.lower().strip(".")
        self.network = network
        self._names: dict[str, int] = {HOST: int(server)}
        self._addresses: dict[int, str] = {int(server): HOST}
        self._serial = 1

    def put(self, address: int, name: str | None) -> bool:
        """Give `address` this name, None or a taken one: none at all; return whether it has one now.

        A name is one label of lower-case letters, digits and inner hyphens.
        """
        before = self._addresses.get(address)
        if before == name:
            return name is not None
        if before is not None:
            if before == HOST:
                return False
            del self._addresses[address], self._names[before]
            self._serial += 1
        if name is None or name in self._names or not LABEL.match(name):
            return False
        if IPv4Address(address) not in self.network:
            return False
        self._names[name], self._addresses[address] = address, name
        self._serial += 1
        return True

    def holder(self, name: str) -> int | None:
        """The address that has this name."""
        return self._names.get(name)

    def read(self, data: bytes) -> Query | None:
        """The query in a datagram; None when it deserves no answer (an answer itself, or no header)."""
        if not HEADER_SIZE <= len(data) <= QUERY_MAX:
            return None
        buffer = DNSBuffer(data)
        header = DNSHeader.parse(buffer)
        if header.qr:
            return None
        if header.opcode != OPCODE.QUERY:
            return Query(header, None, "", True, RCODE.NOTIMP)
        if header.q != 1:
            return Query(header, None, "", True, RCODE.FORMERR)
        try:
            question = DNSQuestion.parse(buffer) if _has_plain_name(data) else None
        except DNSError:
            question = None
        if question is None:
            return Query(header, None, "", True, RCODE.FORMERR)
        name = str(question.qname).lower().rstrip(".")
        if question.qclass != CLASS.IN:
            return Query(header, question, name, True, RCODE.REFUSED)
        return Query(header, question, name, self._is_ours(name))

    def answer(self, query: Query) -> bytes:
        """Returns the zone's answer; REFUSED to a name that is not ours."""
        fault = query.fault or (RCODE.NOERROR if query.is_ours else RCODE.REFUSED)
        if fault or query.question is None:
            return refusal(query, fault)
        reply = _reply(query, RCODE.NOERROR)
        reply.header.aa = 1
        kind, asked = query.question.qtype, query.question.qname
        if query.name == self.domain:
            if kind in (QTYPE.SOA, QTYPE.ANY):
                reply.add_answer(self._soa(TTL_SECONDS))
            if kind in (QTYPE.NS, QTYPE.ANY):
                server = NS(f"{HOST}.{self.domain}")
                reply.add_answer(RR(self.domain, QTYPE.NS, ttl=TTL_SECONDS, rdata=server))
        elif (reverse := _address(query.name)) is not None:
            known = self._addresses.get(reverse)
            if known is None:
                reply.header.rcode = RCODE.NXDOMAIN
            elif kind in (QTYPE.PTR, QTYPE.ANY):
                target = PTR(f"{known}.{self.domain}")
                reply.add_answer(RR(asked, QTYPE.PTR, ttl=TTL_SECONDS, rdata=target))
        else:
            address = self._names.get(query.name.removesuffix(f".{self.domain}"))
            if address is None:
                reply.header.rcode = RCODE.NXDOMAIN
            elif kind in (QTYPE.A, QTYPE.ANY):
                rdata = A(str(IPv4Address(address)))
                reply.add_answer(RR(asked, QTYPE.A, ttl=TTL_SECONDS, rdata=rdata))
        if not reply.rr:
            reply.add_auth(self._soa(NEGATIVE_TTL_SECONDS))
        data: bytes = reply.pack()
        return data

    def _is_ours(self, name: str) -> bool:
        if name == self.domain or name.endswith(f".{self.domain}"):
            return True
        reverse = _address(name)
        return reverse is not None and IPv4Address(reverse) in self.network

    def _soa(self, ttl: int) -> RR:
        times = (self._serial, 3600, 600, 86400, NEGATIVE_TTL_SECONDS)
        data = SOA(f"{HOST}.{self.domain}", f"hostmaster.{self.domain}", times)
        return RR(self.domain, QTYPE.SOA, ttl=ttl, rdata=data)


def refusal(query: Query, fault: int) -> bytes:
    """An answer without records: FORMERR, SERVFAIL, REFUSED…"""
    data: bytes = _reply(query, fault).pack()
    return data


def _reply(query: Query, fault: int) -> DNSRecord:
    header = DNSHeader(id=query.header.id, qr=1, opcode=query.header.opcode, rd=query.header.rd, rcode=fault)
    header.aa = 0
    return DNSRecord(header, q=query.question)


def _address(name: str) -> int | None:
    found = _REVERSE.match(name)
    if found is None:
        return None
    octets = [int(one) for one in reversed(found.groups())]
    if max(octets) > 255:
        return None
    return int.from_bytes(bytes(octets), "big")


def _has_plain_name(data: bytes) -> bool:
    # No compression: there is nothing before the question to point to, and dnslib follows pointers in circles.
    at = HEADER_SIZE
    while at < len(data) and data[at]:
        if data[at] > LABEL_MAX:
            return False
        at += 1 + data[at]
    return at + 5 <= len(data) and at + 1 - HEADER_SIZE <= NAME_MAX
