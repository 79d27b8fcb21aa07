"""Bridges and taps by netlink (pyroute2's synchronous IPRoute; no ``ip`` subprocess). Shell: every call
blocks 1 to 3 ms.

Invariant: a link is changed or removed only when it carries our mark in IFLA_IFALIAS; whatever else has the
name is reported and left alone. Taps are not persistent, so a crash leaves no tap once its last descriptor
is closed; ``sweep`` removes what can be left (bridges without ports, persistent taps without a holder). IPv6
is off on our links: the host must not take an address or a route from a guest's router advertisement.
"""

import errno
import ipaddress
import os
import socket
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from rayos_net import naming, tap

MARK: Final = "rayos"  # the beginning of IFLA_IFALIAS of every link that is ours
_NTF_MASTER: Final = 0x04  # linux/neighbour.h: the entry is the bridge's, not the link's own
_NUD_NOARP: Final = 0x40  # static: never ages
_IFALIAS_MAX: Final = 255  # IFALIASZ less the terminating zero


T = TypeVar("T")


class LinkError(RuntimeError):
    """A link can't be made, changed or removed; the message says which one, who is in the way, and what to
    do.
    """


class OverlapError(LinkError):
    """The subnet is in use on another link; another one may do."""


class Links:
    """Bridges and taps in the network namespace it was opened in. Use as a context manager, or call close().

    Calls may come from several threads; each is one short netlink exchange or a few.
    """

    def __init__(self) -> None:
        try:
            self._ipr = IPRoute()
        except OSError as error:
            raise LinkError(f"no netlink socket: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the netlink socket. Links stay."""
        self._ipr.close()

    def ensure_bridge(self, name: str, address: ipaddress.IPv4Interface) -> bool:
        """Make the bridge `name`, up and with exactly `address`; return whether it was made now.

        A bridge of ours that exists already is brought to that state. A bridge that is not ours is used only
        when it has `address` already, and is never changed. Raises LinkError otherwise, when another link
        has an overlapping network, and without CAP_NET_ADMIN.
        """
        check_name(name)
        link = self._find(name)
        if link is not None and not _is_ours(link):
            if _kind(link) == "bridge" and address in self.addresses(name):
                return False
            what = _kind(link) or "physical link"
            raise LinkError(f"{name} exists and is not ours (a {what}); choose another name for the bridge")
        self._check_overlap(name, address)
        made = link is None
        if made:
            self._do(
                f"bridge {name}",
                lambda: self._ipr.link(
                    "add",
                    ifname=name,
                    kind="bridge",
                    address=naming.mac(
                        name
                    ),  # fixed: else it becomes the lowest MAC of its ports and changes
                    br_stp_state=0,
                    br_forward_delay=0,
                    br_mcast_snooping=0,
                ),
            )
        elif _kind(link) != "bridge":
            raise LinkError(f"{name} is a {_kind(link)} of ours, not a bridge; remove it first")
        index = self._index(name)
        _switch_off_ipv6(name)
        self._do(
            f"bridge {name}", lambda: self._ipr.link("set", index=index, ifalias=f"{MARK} bridge", state="up")
        )
        present = self.addresses(name)
        for old in present:
            if old != address:
                self._address("del", index, name, old)
        if address not in present:
            self._address("add", index, name, address)
        return made

    def remove_bridge(self, name: str) -> bool:
        """Remove the bridge `name` if it is ours and has no port; return whether it was removed."""
        link = self._find(name)
        if link is None or not _is_ours(link) or _kind(link) != "bridge" or self.ports(name):
            return False
        return self._delete(link)

    def open_tap(
        self,
        name: str,
        *,
        bridge: str,
        vnet_hdr: bool = True,
        owner: str = "",
        mtu: int | None = None,
        isolated: bool = False,
        mac: str | None = None,
        multi_queue: bool = False,
    ) -> int:
        """Make the tap `name`, enslave it to `bridge`, bring it up; return its descriptor (virtio-net header
        12 bytes).

        The tap lives as long as the descriptor, which is the caller's to close. `owner` (a VM's name) is shown
        in the link's alias. An `isolated` port reaches the host, not other isolated ports. With `mac` the bridge
        takes frames from that address only, and learns none (a locked port, Linux 5.18). A `multi_queue` tap takes
        further queues by `tap.add_queue`. Raises LinkError when
        the name is taken (and says by whom), when there is no such bridge, or without CAP_NET_ADMIN; nothing is
        left then.
        """
        check_name(name)
        bridge_index = self._index(bridge)
        fd = self._create_tap(name, vnet_hdr, multi_queue)
        try:
            index = self._index(name)
            _switch_off_ipv6(name)
            alias = f"{MARK} tap {owner}".rstrip()[:_IFALIAS_MAX]
            extra = {} if mtu is None else {"mtu": mtu}
            what = f"tap {name}"
            self._do(
                what,
                lambda: self._ipr.link("set", index=index, ifalias=alias, master=bridge_index, **extra),
            )
            if isolated:
                self._do(what, lambda: self._ipr.brport("set", index=index, isolated=1))
            if mac is not None:
                self._do(what, lambda: self._ipr.brport("set", index=index, locked=1, learning=0))
                self._do(
                    what,
                    lambda: self._ipr.fdb(
                        "add", ifindex=index, lladdr=mac, flags=_NTF_MASTER, state=_NUD_NOARP
                    ),
                )
            self._do(what, lambda: self._ipr.link("set", index=index, state="up"))
        except BaseException:
            os.close(fd)
            raise
        return fd

    def delete(self, name: str) -> bool:
        """Remove the link `name`; return False when there is none. Raises LinkError when it is not ours."""
        link = self._find(name)
        if link is None:
            return False
        if not _is_ours(link):
            raise LinkError(f"{name} is not ours (alias {link.get('ifalias') or ''!r}); it stays")
        return self._delete(link)

    def sweep(self, prefix: str = naming.PREFIX) -> list[str]:
        """Remove what a crash left: links of ours named `prefix`… that nobody holds; return their names.

        A tap that a process still holds (a guest that outlived its daemon) and the bridge it is in stay.
        """
        swept = []
        links = [one for one in self._all() if _name(one).startswith(prefix) and _is_ours(one)]
        for link in links:
            if _kind(link) == "tun" and not link.get("carrier") and self._delete(link):  # carrier = attached
                swept.append(_name(link))
        for link in links:
            if _kind(link) == "bridge" and self.remove_bridge(_name(link)):
                swept.append(_name(link))
        return swept

    def addresses(self, name: str) -> list[ipaddress.IPv4Interface]:
        """The IPv4 addresses of the link `name`. Raises LinkError when there is no such link."""
        index = self._index(name)
        found = self._do(name, lambda: list(self._ipr.get_addr(family=socket.AF_INET, index=index)))
        return [_interface(one) for one in found]

    def ports(self, bridge: str) -> list[str]:
        """The names of the links enslaved to `bridge`. Raises LinkError when there is no such link."""
        index = self._index(bridge)
        return [_name(link) for link in self._all() if link.get("master") == index]

    def exists(self, name: str) -> bool:
        """Whether a link of that name exists, ours or not."""
        return self._find(name) is not None

    def _create_tap(self, name: str, vnet_hdr: bool, multi_queue: bool) -> int:
        try:
            return tap.create(name, vnet_hdr=vnet_hdr, multi_queue=multi_queue)
        except tap.TapBusy as busy:
            link = self._find(name)
            if link is not None and _is_ours(link) and not link.get("carrier"):
                self._delete(link)  # a leftover of ours that nobody holds
            else:
                raise LinkError(self._who_is_in_the_way(name, link, busy)) from busy
        except OSError as error:
            raise LinkError(f"tap {name}: {_reason(error.errno, str(error.strerror))}") from error
        try:
            return tap.create(name, vnet_hdr=vnet_hdr, multi_queue=multi_queue)
        except OSError as error:
            raise LinkError(f"tap {name}: {_reason(error.errno, str(error.strerror))}") from error

    def _who_is_in_the_way(self, name: str, link: Any, busy: OSError) -> str:
        if link is None:
            return f"tap {name}: {busy.strerror}"
        if _kind(link) != "tun":
            return f"tap {name}: a {_kind(link) or 'physical link'} has this name; remove or rename it"
        users = ", ".join(f"process {pid} ({command})" for pid, command in tap.holders(name))
        if users:
            return f"tap {name} is in use by {users}; stop it or choose another name"
        return f"tap {name} exists and is not ours (alias {link.get('ifalias') or ''!r}); remove it first"

    def _check_overlap(self, name: str, address: ipaddress.IPv4Interface) -> None:
        for one in self._do(name, lambda: list(self._ipr.get_addr(family=socket.AF_INET))):
            other = _interface(one)
            if not other.network.overlaps(address.network):
                continue
            try:
                holder = socket.if_indextoname(one["index"])
            except OSError:
                continue  # gone meanwhile
            if holder != name:
                raise OverlapError(
                    f"{address} for {name} overlaps {other} on {holder}; choose another subnet"
                )

    def _address(self, action: str, index: int, name: str, address: ipaddress.IPv4Interface) -> None:
        self._do(
            f"{name} {address}",
            lambda: self._ipr.addr(
                action,
                index=index,
                address=str(address.ip),
                prefixlen=address.network.prefixlen,
                broadcast=str(address.network.broadcast_address),
            ),
        )

    def _delete(self, link: Any) -> bool:
        try:
            self._ipr.link("del", index=link["index"])
        except NetlinkError as error:
            if error.code in (errno.ENODEV, errno.ENXIO):
                return False
            raise LinkError(f"{_name(link)}: {_reason(error.code, str(error))}") from error
        return True

    def _find(self, name: str) -> Any:
        try:
            index = socket.if_nametoindex(name)
        except OSError:
            return None
        try:
            return next(iter(self._ipr.get_links(index)), None)
        except NetlinkError as error:
            if error.code == errno.ENODEV:
                return None
            raise LinkError(f"{name}: {_reason(error.code, str(error))}") from error

    def _all(self) -> list[Any]:
        return self._do("links", lambda: list(self._ipr.get_links()))

    def _index(self, name: str) -> int:
        try:
            return socket.if_nametoindex(name)
        except OSError as error:
            raise LinkError(f"there is no link {name}") from error

    def _do(self, what: str, call: Callable[[], T]) -> T:
        try:
            return call()
        except NetlinkError as error:
            raise LinkError(f"{what}: {_reason(error.code, str(error))}") from error


def check_name(name: str) -> None:
    """Raise LinkError unless the kernel takes `name` for a link (1 to 15 bytes, no space, slash or colon)."""
    size = len(name.encode())
    if not 1 <= size <= naming.NAME_MAX or name in (".", "..") or any(c in "/:" or c.isspace() for c in name):
        raise LinkError(
            f"{name!r} is no link name: {size} bytes of 1..{naming.NAME_MAX}, without space, / and :"
        )


def _is_ours(link: Any) -> bool:
    return str(link.get("ifalias") or "").split(" ", 1)[0] == MARK


def _kind(link: Any) -> str:
    info = link.get_attr("IFLA_LINKINFO")
    return str(info.get_attr("IFLA_INFO_KIND") or "") if info else ""


def _name(link: Any) -> str:
    return str(link.get_attr("IFLA_IFNAME"))


def _interface(answer: Any) -> ipaddress.IPv4Interface:
    local = answer.get_attr("IFA_LOCAL") or answer.get_attr("IFA_ADDRESS")
    return ipaddress.IPv4Interface(f"{local}/{answer['prefixlen']}")


def _reason(code: int | None, text: str) -> str:
    if code in (errno.EPERM, errno.EACCES):
        return "not permitted; CAP_NET_ADMIN (or root) is needed"
    return text


def _switch_off_ipv6(name: str) -> None:
    # Absent when the kernel has no IPv6: then there is nothing to switch off.
    switch = Path("/proc/sys/net/ipv6/conf") / name / "disable_ipv6"
    if switch.exists():
        switch.write_text("1")
