"""The spoof guards in the kernel, one on each guest's tap: what a worker that was taken over cannot get past.

The same verdicts as the worker's own guard (`rayos_net.firewall.nftables`). Changes are collected and applied by
`commit`, all in one nft transaction; without nft, or where the kernel refuses, the worker's guard stands alone, which
is said once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Final

import trio

from rayos_net import nft
from rayos_net.firewall import nftables
from rayos_net.guard import Guard

log: Final = logging.getLogger(__name__)


class TapGuards:
    """`trouble` says why the kernel does not guard, if it does not."""

    def __init__(self) -> None:
        self.trouble = ""
        self._wanted: dict[str, Guard] = {}
        self._present: dict[str, Guard] = {}
        self._changed: set[str] = set()
        self._lock = trio.Lock()

    def set(self, tap: str, mac: bytes, addresses: Iterable[int]) -> None:
        """From the next `commit` on, the guest behind `tap` is `mac` and has these addresses."""
        self._wanted[tap] = Guard(mac, addresses=addresses)
        self._changed.add(tap)

    def remove(self, tap: str) -> None:
        """From the next `commit` on, the tap has no guard; it may be gone."""
        self._wanted.pop(tap, None)
        self._changed.add(tap)

    async def commit(self) -> None:
        """Returns when the kernel guards as was said, or cannot."""
        while self._changed:
            async with self._lock:
                changed, self._changed = sorted(self._changed), set()
                scripts = {tap: script for tap in changed if (script := self._script(tap))}
                if not scripts:
                    continue
                done = await trio.to_thread.run_sync(_apply, scripts)
                for tap in changed:
                    guard = self._wanted.get(tap)
                    if guard is not None and not done.get(tap):
                        self._present[tap] = guard
                    else:
                        self._present.pop(tap, None)
                self._complain(next((why for why in done.values() if why), ""))

    def _script(self, tap: str) -> str:
        wanted, present = self._wanted.get(tap), self._present.get(tap)
        if wanted is None:
            return nftables.remove(tap)
        if present is not None and present.mac == wanted.mac:
            is_same = present.addresses == wanted.addresses
            return "" if is_same else nftables.bind(tap, wanted.addresses)
        return nftables.install(tap, wanted)

    def _complain(self, why: str) -> None:
        if why and why != self.trouble:
            log.warning("the kernel guards no tap; the device workers do", extra={"why": why})
        self.trouble = why


def _apply(scripts: Mapping[str, str]) -> dict[str, str]:
    """Why a tap's script was refused, for those that were. Blocking."""
    try:
        nft.run("".join(scripts.values()))
    except nft.NftError as error:
        if len(scripts) == 1:
            return dict.fromkeys(scripts, str(error))
        return {tap: why for tap in scripts for why in _apply({tap: scripts[tap]}).values()}
    return {}
