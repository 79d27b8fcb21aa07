"""Refusals and failures of the service, in words a caller can act on.

Every error that leaves the service is one of these. It carries a stable `code` (snake case, for
programs), a `message` (what was seen and what was allowed), a `hint` (what to do; may be empty) and
the HTTP `status` that the API answers with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class RayosError(Exception):
    """Base of everything the service raises on purpose.

    Args:
        message: one sentence: what was seen and what was allowed.
        hint: one sentence: what to do about it; empty when there is nothing to do.
        code: replaces the class's code where a finer one helps programs.
    """

    code: str = "failed"
    status: int = 500

    def __init__(self, message: str, *, hint: str = "", code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if code is not None:
            self.code = code


class NotFound(RayosError):
    """No virtual machine, file, port or device of that name."""

    code = "not_found"
    status = 404


class Forbidden(RayosError):
    """The caller, or the machine, does not have the right that this needs; the message names it."""

    code = "forbidden"
    status = 403


class Conflict(RayosError):
    """The name is taken, or the machine's state does not allow the operation."""

    code = "conflict"
    status = 409


class Invalid(RayosError):
    """The request or configuration is wrong: the message names the key and what it allows."""

    code = "invalid"
    status = 422


class Malformed(RayosError):
    """The body is not JSON that could be understood in one way."""

    code = "malformed"
    status = 400


class TooLarge(RayosError):
    """The body exceeds what the operation takes."""

    code = "too_large"
    status = 413


class RateLimited(RayosError):
    """The caller asks more often than it may."""

    code = "rate_limited"
    status = 429


class Unavailable(RayosError):
    """The service cannot do it now: the record cannot be written, or somebody does not keep up."""

    code = "unavailable"
    status = 503


class GuestGone(RayosError):
    """The guest, its QEMU or its agent went away, or could not be started."""

    code = "guest_gone"
    status = 502


class Timeout_(RayosError):
    """The time limit of the caller passed first."""

    code = "timeout"
    status = 504


class Busy(RayosError):
    """A resource on the host is held by somebody else (a tap, a subnet, a lock, a disk image)."""

    code = "busy"
    status = 409


@contextmanager
def one_error() -> Iterator[None]:
    """Around nurseries: lets a single error out as itself instead of as a group of one (of one, …)."""
    try:
        yield
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        if error is group:
            raise
        raise error from error.__cause__
