"""One operation of the API as data: server, guard, document, client and completion all read it.

Invariant: everything that a caller can rely on is a field here. The command is written out and never derived from a
name in the code, for tokens and audit records hold on to it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar
from urllib.parse import quote

from rayos_vmm.errors import (
    Forbidden,
    Invalid,
    Malformed,
    NotFound,
    RateLimited,
    RayosError,
    TooLarge,
    Unavailable,
)
from rayos_vmm.policy.capability import Capability

JSON: Final = "application/json"
BYTES: Final = "application/octet-stream"
PNG: Final = "image/png"
NDJSON: Final = "application/x-ndjson"
JSONL: Final = "application/jsonl"

A = TypeVar("A", covariant=True)
_PARAMETER: Final = re.compile(r"{([a-z]+)}")


@dataclass(
    frozen=True, eq=False
)  # a row is itself alone; a generic class with slots cannot be subscripted and called
class Operation(Generic[A]):
    """A row of the table.

    Args:
        command: the name in tokens, audit records and `rayos api`, such as `policy.grant`.
        method, path: where it is served; `{name}` stands for a machine below /v1/vms.
        right: what a token needs; NONE means that any valid token will do.
        summary: one line for people.
        query, body: the structs that are sent; a body that has defaults throughout may be left out.
        takes: the media type of the body; with BYTES the handler reads it itself.
        answer: the struct that comes back; for NDJSON the struct of each line; None means 204 without a body.
        media: the media type of the answer.
        status: of success.
        fails: the errors that it can end with beside those of `errors`.
        is_long: it may wait for the guest; a client that leaves cancels it.
        is_frequent: it comes many times a second, so the owner's use is recorded with a bound.
        reaches_beyond_vm: it has a machine in its path and touches others.
        is_for_owner: no token will do.
        makes: the path of what a success makes, and the OpenAPI expression that names it there.
        is_judged: its fields depend on each other, or are a language of their own, in a way that JSON Schema cannot
            say: a request of the right shape may be refused with 422. So may a start, for the machine's own fields:
            they name files of this host.
    """

    command: str
    method: str
    path: str
    right: Capability
    summary: str
    query: type[Any] | None = None
    body: type[Any] | None = None
    body_is_optional: bool = False
    takes: str = JSON
    answer: type[A] | None = None
    media: str = JSON
    status: int = 200
    fails: tuple[type[RayosError], ...] = ()
    is_long: bool = False
    is_frequent: bool = False
    reaches_beyond_vm: bool = False
    is_for_owner: bool = False
    is_judged: bool = False
    makes: tuple[str, str] | None = None

    @property
    def parameters(self) -> list[str]:
        """The names in the path, in order."""
        return _PARAMETER.findall(self.path)

    @property
    def is_change(self) -> bool:
        return self.method not in ("GET", "HEAD")

    @property
    def has_body(self) -> bool:
        return self.body is not None or self.takes == BYTES

    @property
    def success(self) -> int:
        """The status of an answer that is a success."""
        return 204 if self.answer is None else self.status

    @property
    def errors(self) -> tuple[type[RayosError], ...]:
        """Every class of error that can come back."""
        found: list[type[RayosError]] = [
            RayosError,
            Forbidden,
            RateLimited,
            Unavailable,
            Invalid,
            *self.fails,
        ]
        if self.parameters:
            found.append(NotFound)
        if self.has_body:
            found += [Malformed, TooLarge]
        return tuple(dict.fromkeys(found))

    def path_for(self, *values: str) -> str:
        """The path with `values` in the places of its parameters, quoted."""
        names = self.parameters
        if len(values) != len(names):
            raise TypeError(
                f"{self.command} takes {', '.join(names) or 'no names'}, not {len(values)} values"
            )
        rest = iter(values)
        return _PARAMETER.sub(lambda _match: quote(next(rest), safe=""), self.path)
