"""rayos_net.firewall and rayos_net.guard: what one port lets through, and that it says why."""

from ipaddress import ip_address
from typing import Any

import pytest
from scapy.layers.dhcp import BOOTP, DHCP  # type: ignore[import-untyped,unused-ignore]
from scapy.layers.inet import ICMP, IP, TCP, UDP  # type: ignore[import-untyped,unused-ignore]
from scapy.layers.inet6 import (  # type: ignore[import-untyped,unused-ignore]
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6ND_Redirect,
    IPv6,
)
from scapy.layers.l2 import Ether  # type: ignore[import-untyped,unused-ignore]

from rayos_net.firewall import reject
from rayos_net.firewall.flow import FlowTable
from rayos_net.firewall.rule import Action, Rule, RuleError, parse
from rayos_net.firewall.table import Table
from rayos_net.firewall.verdict import ALLOW, DENY, REJECT, GuestPort, reason_name
from rayos_net.guard import Guard
from rayos_net.packet import Packet
from rayos_net.packet import parse as parse_frame
from tests.unit.net.frames import (
    GATEWAY,
    GUEST,
    GUEST6,
    GUEST_MAC,
    OTHER_MAC,
    arp,
    ether,
    ping,
    tcp,
    udp,
    udp6,
)

MAC = bytes.fromhex(GUEST_MAC.replace(":", ""))
OUTSIDE = "93.184.216.34"


def port(*rules: Rule, **defaults: Any) -> GuestPort:
    """A port whose guest has GUEST, with these rules."""
    guard = Guard(MAC, addresses=[int(ip_address(GUEST))], server=int(ip_address(GATEWAY)))
    return GuestPort(guard, FlowTable(Table(rules, **defaults)))


def rule(name: str, **table: Any) -> Rule:
    """A rule from its words."""
    return parse(name, {"action": "allow", **table}, origin="test")


def inbound(payload: Any) -> bytes:
    """A frame to the guest."""
    return ether(payload, source=OTHER_MAC, destination=GUEST_MAC)


def why(one: GuestPort) -> dict[str, int]:
    """The port's counters by name."""
    return {reason_name(reason): count for reason, count in one.counters.items()}


def test_the_default_lets_a_guest_out_and_nobody_in() -> None:
    """Without rules a guest reaches others, its replies come back, and nothing else does."""
    one = port()
    assert one.check(inbound(tcp(OUTSIDE, 80, GUEST, 4000, flags="SA")), False, 0.0) == DENY
    assert one.check(ether(tcp(GUEST, 4000, OUTSIDE, 80)), True, 1.0) == ALLOW
    assert one.check(inbound(tcp(OUTSIDE, 80, GUEST, 4001)), False, 1.0) == DENY
    fresh = port()
    fresh.check(ether(tcp(GUEST, 4000, OUTSIDE, 80)), True, 1.0)
    assert fresh.check(inbound(tcp(OUTSIDE, 80, GUEST, 4000, flags="SA")), False, 1.1) == ALLOW


def test_a_reply_is_let_through_only_while_its_flow_lives() -> None:
    """After three minutes of silence an unanswered UDP flow is over; traffic keeps it alive."""
    one = port()
    out, back = ether(udp(GUEST, 4000, OUTSIDE, 53)), inbound(udp(OUTSIDE, 53, GUEST, 4000))
    one.check(out, True, 0.0)
    assert one.check(back, False, 100.0) == ALLOW
    assert one.check(out, True, 250.0) == ALLOW
    assert one.check(back, False, 400.0) == ALLOW
    assert one.check(back, False, 600.0) == DENY


def test_a_new_table_ends_what_it_forbids_and_keeps_what_it_allows() -> None:
    """A replaced table counts from the next packet on, for replies too."""
    one = port()
    web, dns = ether(tcp(GUEST, 4000, OUTSIDE, 80)), ether(udp(GUEST, 4000, OUTSIDE, 53))
    one.check(web, True, 0.0)
    one.check(dns, True, 0.0)
    one.flows.replace(Table([rule("no-web", protocol="tcp", ports=80, action="deny")]))
    assert one.check(inbound(tcp(OUTSIDE, 80, GUEST, 4000, flags="SA")), False, 1.0) == DENY
    assert one.check(inbound(udp(OUTSIDE, 53, GUEST, 4000)), False, 1.0) == ALLOW
    assert one.check(web, True, 1.0) == DENY


def test_priority_then_order_decides() -> None:
    """The first match in the order of priority wins, whichever layer of the table it is in."""
    rules = [
        rule("late", to="10.0.0.0/8", action="deny", priority=50),
        rule("host", to=OUTSIDE, action="deny", priority=10),
        rule("early", to="93.0.0.0/8", protocol="tcp", ports="1-1024", priority=5),
    ]
    one = port(*rules)
    assert one.explain(ether(tcp(GUEST, 1, OUTSIDE, 80)), True, 0.0).rule == "early"
    assert one.explain(ether(tcp(GUEST, 1, OUTSIDE, 8080)), True, 0.0).rule == "host"
    assert one.explain(ether(tcp(GUEST, 1, "10.9.9.9", 80)), True, 0.0).rule == "late"


def test_explain_names_rule_origin_and_layer_and_changes_nothing() -> None:
    """`rayos firewall explain` says what would happen and from where that rule is inherited."""
    one = port(rule("web", direction="in", protocol="tcp", ports=["80", "443"]))
    seen = one.explain(inbound(tcp(OUTSIDE, 1, GUEST, 443)), False, 0.0)
    assert (seen.action, seen.reason, seen.rule, seen.origin) == (Action.ALLOW, "RULE", "web", "test")
    assert str(seen) == "allow: rule by rule web (from test)"
    assert str(one.explain(inbound(tcp(OUTSIDE, 1, GUEST, 22)), False, 0.0)) == "deny: default"
    assert one.flows.sizes() == 0
    assert one.counters == {}


def test_an_audit_only_rule_is_told_and_decides_nothing() -> None:
    """A rule can be tried out before it bites."""
    one = port(rule("try", protocol="tcp", ports=22, action="deny", audit_only=True, priority=1))
    ssh = ether(tcp(GUEST, 1, OUTSIDE, 22))
    assert one.check(ssh, True, 0.0) == ALLOW
    assert [(event.rule, event.audit_only) for event in one.flows.events] == [("try", True)]
    assert one.explain(ssh, True, 0.0).audit_rule == "try"


def test_a_logging_rule_tells_each_new_flow_once() -> None:
    """Not every packet."""
    one = port(rule("web", protocol="tcp", ports=80, log=True))
    for _ in range(5):
        one.check(ether(tcp(GUEST, 1, OUTSIDE, 80)), True, 0.0)
    assert [event.rule for event in one.flows.events] == ["web"]


def test_a_related_icmp_error_comes_back_and_an_unrelated_does_not() -> None:
    """Path MTU and port unreachable for the guest's own flows, nothing else."""
    one = port()
    sent = udp(GUEST, 4000, OUTSIDE, 53)
    other = udp(GUEST, 4999, OUTSIDE, 53)
    one.check(ether(sent), True, 0.0)
    router = "10.99.0.1"
    error = IP(src=router, dst=GUEST) / ICMP(type=3, code=4)
    assert one.check(inbound(error / bytes(sent)[:28]), False, 1.0) == ALLOW
    assert one.check(inbound(error / bytes(other)[:28]), False, 1.0) == DENY


def test_ping_out_is_answered_and_ping_in_is_not() -> None:
    """An echo reply belongs to a request with the same identifier; a request from outside is a new flow."""
    one = port()
    one.check(ether(ping(GUEST, OUTSIDE, 7)), True, 0.0)
    assert one.check(inbound(ping(OUTSIDE, GUEST, 7, kind=0)), False, 0.1) == ALLOW
    assert one.check(inbound(ping(OUTSIDE, GUEST, 8, kind=0)), False, 0.1) == DENY
    assert one.check(inbound(ping(OUTSIDE, GUEST, 7)), False, 0.1) == DENY


def test_fragments_go_the_way_of_their_first() -> None:
    """Allowed, denied, and without a first: dropped."""
    one = port(rule("no-dns", protocol="udp", ports=53, action="deny"))
    allowed = [ether(part) for part in udp(GUEST, 1, OUTSIDE, 54, bytes(1400)).fragment(800)]
    payload = udp(GUEST, 1, OUTSIDE, 53, bytes(1400))
    payload[IP].id = 7
    denied = [ether(part) for part in payload.fragment(800)]
    assert [one.check(part, True, 0.0) for part in allowed] == [ALLOW, ALLOW]
    assert [one.check(part, True, 0.0) for part in denied] == [DENY, DENY]
    payload[IP].id = 8
    assert one.check(ether(payload.fragment(800)[1]), True, 0.0) == DENY
    assert one.check(allowed[1], True, 31.0) == DENY
    assert why(one)["fragment_without_first"] == 2


def dhcp(kind: str, *, mac: bytes = MAC, sport: int = 68, dport: int = 67) -> bytes:
    """A DHCP frame of the guest's."""
    boot = BOOTP(op=1, chaddr=mac) / DHCP(options=[("message-type", kind), "end"])
    return ether(
        IP(src="0.0.0.0", dst="255.255.255.255") / UDP(sport=sport, dport=dport) / boot,
        destination="ff:ff:ff:ff:ff:ff",
    )


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (ether(tcp(GUEST, 1, OUTSIDE, 80), source=OTHER_MAC), "source_mac"),
        (ether(tcp("10.5.0.11", 1, OUTSIDE, 80)), "source_address"),
        (ether(tcp(GATEWAY, 1, OUTSIDE, 80)), "source_address"),
        (ether(tcp("127.0.0.1", 1, OUTSIDE, 80)), "source_address"),
        (ether(udp("0.0.0.0", 1, OUTSIDE, 80)), "source_address"),
        (arp(GATEWAY, GUEST, operation=2), "arp_sender"),
        (arp(GATEWAY, GATEWAY), "arp_sender"),
        (arp("0.0.0.0", GATEWAY, operation=2), "arp_sender"),
        (arp(GUEST, GATEWAY, mac=OTHER_MAC), "arp_sender"),
        (dhcp("offer", sport=67, dport=68), "dhcp_server"),
        (ether(udp(GUEST, 67, OUTSIDE, 9999)), "dhcp_server"),
        (dhcp("discover", mac=b"\2\0\0\0\0\1"), "dhcp_client"),
        (ether(IPv6(src=GUEST6, dst="ff02::1") / ICMPv6ND_RA()), "router"),
        (ether(IPv6(src=GUEST6, dst="ff02::1") / ICMPv6ND_Redirect()), "router"),
        (ether(IPv6(src=GUEST6, dst="ff02::1", nh=58) / bytes.fromhex("82000000" + "00" * 20)), "router"),
        (ether(IP(src=GUEST, dst="224.0.0.1", proto=2) / bytes.fromhex("11640000" + "00" * 8)), "router"),
        (ether(IP(src="0.0.0.0", dst="224.0.0.1", proto=2) / bytes.fromhex("1164000000000000")), "router"),
        (ether(IPv6(src=GUEST6, dst="ff02::1") / ICMPv6ND_NA(tgt="fe80::1")), "neighbour"),
        (ether(udp6("fe80::1", 1, "ff02::2", 2)), "source_address"),
        (ether(udp6(GUEST6, 547, "fe80::2", 546)), "dhcp_server"),
        (ether(udp(GUEST, 1, GATEWAY, 2), destination="01:80:c2:00:00:00"), "reserved_mac"),
    ],
)
def test_a_guest_speaks_only_for_itself(frame: bytes, reason: str) -> None:
    """Foreign addresses, ARP in another's name, DHCP answers, router advertisements: dropped and counted."""
    one = port()
    assert one.check(frame, True, 0.0) == DENY
    assert why(one) == {reason: 1}
    assert one.explain(frame, True, 0.0).reason.lower() == reason


@pytest.mark.parametrize(
    "frame",
    [
        dhcp("discover"),
        arp("0.0.0.0", GUEST),
        ether(IPv6(src="::", dst="ff02::1:ff00:1") / ICMPv6ND_NS(tgt=GUEST6)),
        ether(udp6(GUEST6, 1, "ff02::fb", 5353)),
    ],
)
def test_a_guest_without_an_address_can_get_one(frame: bytes) -> None:
    """DHCP, ARP probes and duplicate address detection pass before there is a lease."""
    one = port()
    one.guard.bind([])
    assert one.check(frame, True, 0.0) == ALLOW
    assert one.check(ether(udp(GUEST, 1, OUTSIDE, 9)), True, 0.0) == DENY


def test_the_guard_follows_the_lease() -> None:
    """With the ACK the address may be used, with the release no more."""
    one = port()
    frame = ether(udp("10.5.0.77", 1, OUTSIDE, 9))
    assert one.check(frame, True, 0.0) == DENY
    one.guard.bind([int(ip_address("10.5.0.77"))])
    assert one.check(frame, True, 0.0) == ALLOW
    one.guard.bind([])
    assert one.check(frame, True, 0.0) == DENY


def test_a_guest_gets_its_lease_whatever_the_rules_say() -> None:
    """DHCP with our own server, ARP and neighbour discovery pass a table that denies everything; nothing
    else does.
    """
    one = port(rule("nothing", action="deny", priority=0), default_in=Action.DENY)
    offer = ether(udp(GATEWAY, 67, GUEST, 68), source=OTHER_MAC, destination=GUEST_MAC)
    assert one.check(dhcp("discover"), True, 0.0) == ALLOW
    assert one.check(offer, False, 0.0) == ALLOW
    assert one.check(arp(GUEST, GATEWAY), True, 0.0) == ALLOW
    assert one.check(inbound(IPv6(src="fe80::9", dst=GUEST6) / ICMPv6ND_NS(tgt=GUEST6)), False, 0.0) == ALLOW
    assert one.check(inbound(udp(GATEWAY, 53, GUEST, 68)), False, 0.0) == DENY
    assert one.check(ether(udp(GUEST, 68, OUTSIDE, 67, bytes(28) + MAC + bytes(40))), True, 0.0) == DENY
    assert str(one.explain(offer, False, 0.0)) == "allow: dhcp"


def test_a_frame_for_another_or_from_a_rogue_server_does_not_reach_the_guest() -> None:
    """Only frames for the guest, and DHCP only from our server."""
    one = port(default_in=Action.ALLOW)
    assert one.check(ether(udp(OUTSIDE, 1, GUEST, 2), destination=OTHER_MAC), False, 0.0) == DENY
    assert one.check(inbound(udp("10.5.0.66", 67, GUEST, 68)), False, 0.0) == DENY
    assert one.check(inbound(udp(GATEWAY, 67, GUEST, 68)), False, 0.0) == ALLOW


def test_memory_is_bounded_under_a_flood_and_live_flows_stay() -> None:
    """A million ports tried by a guest cost a bounded table, and a flow in use is not lost."""
    one = GuestPort(port().guard, FlowTable(Table(), flows_max=100))
    live = ether(tcp(GUEST, 1, OUTSIDE, 80))
    for sport in range(2000):
        one.check(ether(tcp(GUEST, 2000, OUTSIDE, 80))[:34] + sport.to_bytes(2, "big") + live[36:], True, 0.0)
        one.check(live, True, 0.0)
    assert one.flows.sizes() <= 400
    assert one.check(inbound(tcp(OUTSIDE, 80, GUEST, 1, flags="SA")), False, 0.0) == ALLOW


def rejected(payload: Any) -> Any:
    """Returns the answer to a rejected packet, as scapy reads it."""
    frame = ether(payload)
    one = port(rule("no", action="reject"))
    assert one.check(frame, True, 0.0) == REJECT
    packet = parse_frame(frame)
    assert isinstance(packet, Packet)
    back = reject.answer(frame, packet)
    return None if back is None else Ether(back)


def test_a_rejected_connection_is_reset_at_once() -> None:
    """The guest's connect fails without waiting; the checksums are what scapy computes."""
    back = rejected(tcp(GUEST, 4000, OUTSIDE, 80))
    assert (back.dst, back[IP].src, back[IP].dst) == (GUEST_MAC, OUTSIDE, GUEST)
    assert (back[TCP].sport, back[TCP].dport, str(back[TCP].flags), back[TCP].ack) == (80, 4000, "RA", 1)
    stated = back[IP].chksum, back[TCP].chksum
    del back[IP].chksum, back[TCP].chksum
    again = Ether(bytes(back))
    assert (again[IP].chksum, again[TCP].chksum) == stated


def test_a_rejected_datagram_is_prohibited_and_errors_are_never_answered() -> None:
    """ICMP code 13 with the packet inside; no answer to resets, errors and groups."""
    back = rejected(udp(GUEST, 1, OUTSIDE, 2))
    assert (back[ICMP].type, back[ICMP].code) == (3, 13)
    assert rejected(tcp(GUEST, 1, OUTSIDE, 2, flags="R")) is None
    assert rejected(IP(src=GUEST, dst=OUTSIDE) / ICMP(type=3, code=3) / bytes(28)) is None


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"action": "maybe"}, "allow, deny or reject"),
        ({"protocol": "tpc"}, "'tpc'"),
        ({"protocol": "tcp", "ports": "80-"}, "'80-'"),
        ({"protocol": "tcp", "ports": "90-80"}, "90-80"),
        ({"ports": 80}, "need a protocol"),
        ({"to": "10.0.0.1/8"}, "host bits"),
        ({"form": "10.0.0.0/8"}, "unknown key 'form'"),
        ({"from": "10.0.0.0/8", "to": "fd00::/8"}, "no IP version in common"),
    ],
)
def test_a_wrong_rule_is_one_clear_sentence(table: dict[str, Any], message: str) -> None:
    """The rule's name, what was given, what is allowed."""
    with pytest.raises(RuleError, match=f"rule web: .*{message}"):
        rule("web", **table)
