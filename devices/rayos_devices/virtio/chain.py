"""A descriptor chain as the device sees it: readable buffers first, then writable ones (VIRTIO 1.3, 2.7.4.2).

The buffers are views into guest memory: another vCPU may rewrite them at any time, so whatever decides something
is copied out once (`read`) and only the copy is looked at.
"""

from __future__ import annotations


class Chain:
    """One popped chain. `head` names it when it is pushed back."""

    __slots__ = ("head", "readable", "readable_bytes", "writable", "writable_bytes")

    def __init__(
        self,
        head: int,
        readable: list[memoryview],
        readable_bytes: int,
        writable: list[memoryview],
        writable_bytes: int,
    ) -> None:
        self.head = head
        self.readable = readable
        self.readable_bytes = readable_bytes
        self.writable = writable
        self.writable_bytes = writable_bytes

    def read(self, length: int, offset: int = 0) -> bytes:
        """A private copy of up to `length` readable bytes from `offset`; shorter when the chain is."""
        return gather(self.readable, offset, length)

    def write(self, data: bytes | bytearray | memoryview, offset: int = 0) -> int:
        """Copy `data` into the writable buffers from `offset`; returns how many bytes had room."""
        return scatter(self.writable, offset, data)


def gather(views: list[memoryview], offset: int, length: int) -> bytes:
    """Copy `length` bytes, skipping `offset`, out of a list of buffers; shorter when they hold less."""
    if views and offset + length <= len(views[0]):
        return bytes(views[0][offset : offset + length])
    return b"".join(slice_views(views, offset, length))


def scatter(views: list[memoryview], offset: int, data: bytes | bytearray | memoryview) -> int:
    """Copy `data` over a list of buffers, skipping `offset` bytes of them; returns the bytes that had room."""
    done = 0
    total = len(data)
    for view in views:
        size = len(view)
        if offset >= size:
            offset -= size
            continue
        take = min(size - offset, total - done)
        view[offset : offset + take] = data[done : done + take]
        done += take
        offset = 0
        if done == total:
            break
    return done


def slice_views(views: list[memoryview], offset: int, length: int) -> list[memoryview]:
    """The sub-views that cover `length` bytes from `offset`, without copying: what preadv and pwritev take."""
    out: list[memoryview] = []
    for view in views:
        size = len(view)
        if offset >= size:
            offset -= size
            continue
        if length <= 0:
            break
        piece = view[offset : offset + length]
        length -= len(piece)
        offset = 0
        out.append(piece)
    return out
