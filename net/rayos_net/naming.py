"""Names and hardware addresses derived from a VM's name: the same VM always gets the same tap and the same
MAC.

Invariant: two different (vm, nic) pairs give different tap names as long as a 40-bit hash does not collide,
every name is a valid Linux interface name of at most 15 bytes, and every one starts with ``PREFIX``, so that
a sweep after a crash finds ours by name before it looks closer. MACs are locally administered unicast (IEEE
802, 8.2.2) and start with the letters ``RY`` so that a capture shows at once which frames are a guest's.
"""

import base64
import hashlib
import re
from typing import Final

PREFIX: Final = "ray"
NAME_MAX: Final = 15  # IFNAMSIZ 16 less the terminating zero
NIC_MAX: Final = 99  # two digits: what the hashed form has room for
_PLAIN: Final = re.compile(r"[a-z0-9][a-z0-9_-]*\Z")


def tap_name(vm: str, nic: int = 0) -> str:
    """The tap of network card `nic` of the VM named `vm`.

    Readable (``ray-web-0``) where the name fits, else hashed (``ray.k3v0q2ma.0``); the dot keeps the two
    apart. Raises ValueError when `vm` is empty or `nic` is outside 0..99.
    """
    _check(vm, nic)
    plain = f"{PREFIX}-{vm}-{nic}"
    if len(plain) <= NAME_MAX and _PLAIN.match(vm):
        return plain
    digest = hashlib.blake2b(vm.encode(), digest_size=5, person=b"rayos-tap").digest()
    return f"{PREFIX}.{base64.b32hexencode(digest).decode().lower()}.{nic}"


def mac(vm: str, nic: int = 0) -> str:
    """The hardware address of network card `nic` of the VM named `vm`, as ``52:59:xx:xx:xx:xx``.

    Raises ValueError when `vm` is empty or `nic` is outside 0..99.
    """
    _check(vm, nic)
    digest = hashlib.blake2b(f"{vm}\0{nic}".encode(), digest_size=4, person=b"rayos-mac").digest()
    return ":".join(f"{octet:02x}" for octet in b"RY" + digest)  # 0x52: local bit set, group bit clear


def _check(vm: str, nic: int) -> None:
    if not vm:
        raise ValueError("a VM name is empty; one character or more is needed")
    if not 0 <= nic <= NIC_MAX:
        raise ValueError(f"network card {nic} is outside 0..{NIC_MAX}")
