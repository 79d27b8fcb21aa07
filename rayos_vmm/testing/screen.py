"""Waiting for a picture on a guest's display, by its damage: nothing is looked at that has not changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import trio

from rayos_vmm.client.client import Client
from rayos_vmm.errors import Timeout_
from rayos_vmm.testing.picture import Picture, decode_png

#: A picture (a PNG of ours, or decoded), the SHA-256 of one, or a question that one answers.
Wanted = Picture | Path | str | Callable[[Picture], bool]
#: x, y, width and height in pixels.
Region = tuple[int, int, int, int]

#: A guest that draws on QEMU's plain VGA screen tells nobody when it does.
_PLAIN_VGA_S: Final = 1.0


class PictureNotSeen(AssertionError):
    """The display did not show what was wanted; `last` is what it showed (of the region) in the end."""

    def __init__(self, text: str, last: Picture) -> None:
        super().__init__(text)
        self.last = last


def _question(wanted: Wanted) -> Callable[[Picture], bool]:
    if isinstance(wanted, Path):
        wanted = decode_png(wanted.read_bytes())
    if isinstance(wanted, Picture):
        return lambda seen: seen == wanted
    if isinstance(wanted, str):
        return lambda seen: seen.sha256 == wanted
    return wanted


def _touches(damage: Region, region: Region) -> bool:
    (left, top, width, height), (x, y, columns, rows) = damage, region
    return left < x + columns and x < left + width and top < y + rows and y < top + height


async def wait_for_picture(
    client: Client, name: str, wanted: Wanted, *, region: Region | None, scanout: int, timeout: float
) -> Picture:
    """The picture (of `region`) as soon as it is the wanted one.

    Raises:
        PictureNotSeen: it was not within `timeout` seconds.
        ValueError: the region is not on the display, or `wanted` is a file that is no PNG of ours.
    """
    is_wanted = _question(wanted)
    deadline = trio.current_time() + timeout
    while True:
        serial = int((await client.display(name)).serial)
        shown = decode_png(await client.screenshot(name, scanout=scanout))
        seen = shown.crop(*region) if region is not None else shown
        if is_wanted(seen):
            return seen
        if not await _changed(client, name, serial, region, scanout, deadline):
            where = f"region {region}" if region is not None else f"{shown.width}x{shown.height} pixels"
            raise PictureNotSeen(
                f"{name}: the display did not show what was wanted within {timeout:g} s; "
                f"its {where} has SHA-256 {seen.sha256}",
                seen,
            )


async def _changed(
    client: Client, name: str, serial: int, region: Region | None, scanout: int, deadline: float
) -> bool:
    """Whether the display (where it matters) changed after `serial` and before `deadline`."""
    while (left := deadline - trio.current_time()) > 0:
        try:
            limit = left if serial else min(left, _PLAIN_VGA_S)
            damage = await client.wait_damage(name, serial, scanout, timeout_s=limit)
        except Timeout_:
            if not serial:
                return True
            continue
        changed = (damage.x, damage.y, damage.width, damage.height)
        if region is None or _touches(changed, region):
            return True
        serial = damage.serial
    return False
