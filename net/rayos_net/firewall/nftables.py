"""The spoof guard of a tap as nftables rules: the same verdict as rayos_net.guard, given by the kernel (nft(8),
family netdev).

It stands where a worker that was taken over by its guest can't reach: at the ingress of the tap. One table
for all, a chain and two sets for each tap. Every change is one script, which nft applies as one transaction:
no packet meets half of it.

Invariant: what no rule names is dropped. The kernel gives no transport header to an IP packet whose lengths
don't fit, so the accepting rules, which all look at one, refuse those as rayos_net.packet does. Not seen here, and
left to the parser on the other path: broken IP options, UDP and TCP lengths inside the packet, the order of
IPv6 extension headers, and whether a later fragment has a first.
"""

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from rayos_net.guard import Guard

TABLE: Final = "netdev rayos"

# {mac}, {mac_hex}, {ip4} and {ip6} (sets) are filled in. `ip frag-off` counts 8 bytes; & 0x1fff is the
# offset, 0x2000 "more".
_RULES: Final = """\
    ether saddr != {mac} counter drop comment "source_mac"
    ether daddr & ff:ff:ff:ff:ff:00 == 01:80:c2:00:00:00 counter drop comment "reserved_mac"
    ether type arp jump {chain}.arp
    ether type ip jump {chain}.v4
    ether type ip6 jump {chain}.v6
    counter drop comment "other"
"""

_ARP: Final = """\
    arp htype != 1 counter drop comment "arp"
    arp ptype != ip counter drop comment "arp"
    arp hlen != 6 counter drop comment "arp"
    arp plen != 4 counter drop comment "arp"
    arp saddr ether != {mac} counter drop comment "arp_sender"
    arp operation {{ 1, 2 }} arp saddr ip @{ip4} arp daddr ip 0.0.0.0-255.255.255.255 accept
    arp operation 1 arp saddr ip 0.0.0.0 arp daddr ip 0.0.0.0-255.255.255.255 accept
"""

_IPV4: Final = """\
    ip version != 4 counter drop comment "ipv4"
    ip option lsrr exists counter drop comment "source_route"
    ip option ssrr exists counter drop comment "source_route"
    ip frag-off & 0x1fff != 0 goto {chain}.v4later
    udp sport 67 counter drop comment "dhcp_server"
    udp dport 68 counter drop comment "dhcp_server"
{dhcp_limit}    udp dport 67 @th,288,48 != {mac_hex} counter drop comment "dhcp_client"
    udp dport 67 ip frag-off & 0x2000 != 0 counter drop comment "dhcp_client"
    udp dport 67 udp length >= 42 ip saddr 0.0.0.0 accept
    ip protocol igmp @th,0,8 0x11 counter drop comment "router"
    ip saddr != @{ip4} counter drop comment "source_address"
    tcp doff >= 5 tcp urgptr 0-65535 accept
    udp length >= 8 accept
    meta l4proto icmp @th,48,16 0-65535 accept
    meta l4proto != {{ tcp, udp, icmp, icmpv6 }} accept
"""

# Fragments but the first have no transport header; rules above that look at one would take their payload for
# it.
_IPV4_LATER: Final = """\
    ip saddr != @{ip4} counter drop comment "source_address"
    ip protocol tcp ip frag-off & 0x1fff {{ 1, 2 }} counter drop comment "fragment"
    meta l4proto 0-255 accept
"""

_IPV6: Final = """\
    ip6 version != 6 counter drop comment "ipv6"
    rt type 0 counter drop comment "source_route"
    frag frag-off != 0 goto {chain}.v6later
    icmpv6 type {{ 130, 134, 137 }} counter drop comment "router"
    icmpv6 type {{ 135, 136 }} exthdr frag exists counter drop comment "neighbour"
    icmpv6 type 136 @th,64,128 != {{ {own6} }} counter drop comment "neighbour"
    ip6 saddr :: icmpv6 type 135 @th,64,128 {{ {own6} }} accept
    ip6 saddr :: icmpv6 type 143 accept
    udp sport 547 counter drop comment "dhcp_server"
    ip6 saddr != @{ip6} counter drop comment "source_address"
    tcp doff >= 5 tcp urgptr 0-65535 accept
    udp length >= 8 accept
    meta l4proto icmpv6 @th,48,16 0-65535 accept
    meta l4proto != {{ tcp, udp, icmp, icmpv6 }} accept
"""


_IPV6_LATER: Final = """\
    ip6 saddr != @{ip6} counter drop comment "source_address"
    meta l4proto tcp frag frag-off {{ 1, 2 }} counter drop comment "fragment"
    meta l4proto 0-255 accept
"""

# Those that others jump to come first.
_CHAINS: Final = {
    "arp": _ARP,
    "v4later": _IPV4_LATER,
    "v6later": _IPV6_LATER,
    "v4": _IPV4,
    "v6": _IPV6,
}


def install(tap: str, guard: Guard, *, dhcp_per_second: int | None = 50) -> str:
    """The script that puts the guard on `tap`, in the place of one that is there already.

    More DHCP messages than `dhcp_per_second` are dropped in the kernel, before the server spends time on them.
    """
    ip4, ip6 = f"{tap}.ip4", f"{tap}.ip6"
    words = {
        "chain": tap,
        "mac": guard.mac.hex(":"),
        "mac_hex": f"0x{guard.mac.hex()}",
        "ip4": ip4,
        "ip6": ip6,
        "dhcp_limit": ""
        if dhcp_per_second is None
        else f'    udp dport 67 limit rate over {dhcp_per_second}/second counter drop comment "dhcp_rate"\n',
        "own6": ", ".join(f"0x{address:032x}" for address in sorted(guard.addresses6)),
    }
    return (
        remove(tap)
        + f"table {TABLE} {{\n"
        + f"  set {ip4} {{ type ipv4_addr; {_elements(IPv4Address(one) for one in guard.addresses)} }}\n"
        + f"  set {ip6} {{ type ipv6_addr; {_elements(IPv6Address(one) for one in guard.addresses6)} }}\n"
        + "".join(
            f"  chain {tap}.{name} {{\n{rules.format_map(words)}  }}\n" for name, rules in _CHAINS.items()
        )
        + f'  chain {tap} {{\n    type filter hook ingress device "{tap}" priority 0; policy drop;\n'
        + f"{_RULES.format_map(words)}  }}\n}}\n"
    )


def bind(tap: str, addresses: Iterable[int]) -> str:
    """The script that sets the IPv4 addresses of `tap`: after an ACK of ours, or none after release or
    expiry.
    """
    present = ", ".join(str(IPv4Address(one)) for one in sorted(addresses))
    script = f"flush set {TABLE} {tap}.ip4\n"
    return script + (f"add element {TABLE} {tap}.ip4 {{ {present} }}\n" if present else "")


def remove(tap: str) -> str:
    """The script that removes the guard of `tap`, whether there is one or not."""
    names = [("chain", tap), *(("chain", f"{tap}.{which}") for which in reversed(_CHAINS))]
    script = f"add table {TABLE}\n"
    for kind, name in names:
        script += f"add {kind} {TABLE} {name}\n"
    for name in (f"{tap}.ip4", f"{tap}.ip6"):
        script += f"add set {TABLE} {name} {{ type ipv{name[-1]}_addr; }}\n"
    script += "".join(f"flush chain {TABLE} {name}\n" for _, name in names)
    script += "".join(f"delete {kind} {TABLE} {name}\n" for kind, name in names)
    return script + "".join(f"delete set {TABLE} {tap}.{which}\n" for which in ("ip4", "ip6"))


def _elements(addresses: Iterable[object]) -> str:
    present = ", ".join(sorted(str(one) for one in addresses))
    return f"elements = {{ {present} }}" if present else ""
