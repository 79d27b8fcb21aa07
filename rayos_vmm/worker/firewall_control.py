"""The service's requests to a guest's firewall, beside its counters: new rules, an explanation, a trace."""

from __future__ import annotations

from array import array
from collections.abc import Callable

from rayos_devices.host import Refused
from rayos_devices.loop import Loop
from rayos_net.firewall.rule import RuleError
from rayos_net.firewall.text import BadText
from rayos_vmm.shared.packet import Head
from rayos_vmm.worker.firewall import BYTES_MAX, PortFirewall, decode

#: None: not yet; else the answer's fields, its bytes and its descriptors (as `control`).
Answer = tuple[Head, bytes, list[int]] | None


class FirewallControl:
    """Operations on the firewalls that `find(device)` gives; it raises Refused for none."""

    def __init__(self, find: Callable[[str], PortFirewall], loop: Loop) -> None:
        self._find = find
        self._loop = loop
        # Of rules that come in pieces: which, and what came.
        self._staged: tuple[str, int] = ("", 0)
        self._pieces = bytearray()
        self.operations: dict[str, Callable[[Head, bytes], Answer]] = {
            "firewall.set": self._set,
            "firewall.explain": self._explain,
            "firewall.trace": self._trace,
            "firewall.counts": self._counts,
        }

    def _set(self, head: Head, data: bytes) -> Answer:
        """Rules as `Settings`, in pieces at `offset` of `total`; the last one's answer says which revision holds."""
        device, token = str(head["device"]), int(head["token"])
        offset, total = int(head["offset"]), int(head["total"])
        if not 0 < total <= BYTES_MAX:
            raise Refused("too_large", f"{total} bytes of rules; at most {BYTES_MAX} are allowed")
        if offset == 0:
            self._staged, self._pieces = (device, token), bytearray()
        if self._staged != (device, token) or offset != len(self._pieces) or offset + len(data) > total:
            raise Refused("restart", f"{offset} does not follow what came before: begin again")
        self._pieces += data
        if len(self._pieces) < total:
            return {"received": len(self._pieces)}, b"", []
        pieces, self._pieces, self._staged = bytes(self._pieces), bytearray(), ("", 0)
        try:
            return {"revision": self._find(device).apply(decode(pieces))}, b"", []
        except RuleError as error:
            raise Refused("bad_rule", str(error)) from None

    def _explain(self, head: Head, _data: bytes) -> Answer:
        try:
            return {"explanation": self._find(head["device"]).explain(str(head["packet"]))}, b"", []
        except BadText as error:
            raise Refused("bad_packet", str(error)) from None

    def _trace(self, head: Head, _data: bytes) -> Answer:
        firewall = self._find(head["device"])
        after, verdicts = firewall.trace(head["after"], self._loop.now())
        if not verdicts and head["after"] is not None:
            return None
        return {"last": after, "verdicts": verdicts}, b"", []

    def _counts(self, head: Head, _data: bytes) -> Answer:
        firewall = self._find(head["device"])
        counts = array("Q", firewall.counts())
        return {"revision": firewall.settings.revision}, counts.tobytes(), []
