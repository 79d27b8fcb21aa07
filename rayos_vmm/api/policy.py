"""Operations on the policy document: show, change, compare, go back; and on the zones in it."""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from rayos_vmm.api.endpoint import Call, Endpoint
from rayos_vmm.config.spec import Name
from rayos_vmm.policy.document import Change
from rayos_vmm.policy.revisions import Revision


class Apply(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole document, why, and of which revision it is a change (absent: of whichever is in force)."""

    document: dict[str, Any]
    reason: Annotated[str, Meta(max_length=200)] = ""
    base: Annotated[int, Meta(ge=0)] | None = None


class Compare(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A document to hold against the one in force."""

    document: dict[str, Any]


class Rollback(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The revision to go back to; 0 is the empty document."""

    revision: Annotated[int, Meta(ge=0)]


class Shown(msgspec.Struct, frozen=True, kw_only=True):
    """The document in force; revision 0 before the first."""

    revision: int
    document: dict[str, Any]


class Changes(msgspec.Struct, frozen=True, kw_only=True):
    """Changes by path, the revision in force now, and the machines whose workers have not applied it."""

    changes: list[Change]
    revision: int | None = None
    lagging: list[str] = []


class History(msgspec.Struct, frozen=True, kw_only=True):
    """The revisions that are kept, oldest first."""

    revisions: list[Revision]


class Zone(msgspec.Struct, frozen=True, kw_only=True):
    """A zone, the number of its rules, and its machines."""

    zone: str
    rules: int
    vms: list[str]


class Zones(msgspec.Struct, frozen=True, kw_only=True):
    """All zones, by name."""

    zones: list[Zone]


class NewZone(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A zone to make."""

    zone: Name


class Assign(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where to put a machine; absent leaves that as it is."""

    zone: Name | None = None
    parent: Name | None = None


def _changes(answer: dict[str, Any]) -> Changes:
    return msgspec.convert(answer, Changes)


async def _show(call: Call) -> Shown:
    return msgspec.convert(call.service.revisions.show(), Shown)


async def _apply(call: Call) -> Changes:
    ask = call.body
    return _changes(await call.service.revisions.apply(ask.document, ask.reason, ask.base))


async def _diff(call: Call) -> Changes:
    return Changes(changes=call.service.revisions.diff(call.body.document))


async def _history(call: Call) -> History:
    return History(revisions=call.service.revisions.history())


async def _rollback(call: Call) -> Changes:
    return _changes(await call.service.revisions.rollback(call.body.revision))


async def _zones(call: Call) -> Zones:
    return msgspec.convert({"zones": call.service.revisions.zones()}, Zones)


async def _create_zone(call: Call) -> Changes:
    return _changes(await call.service.revisions.create_zone(call.body.zone))


async def _remove_zone(call: Call) -> Changes:
    return _changes(await call.service.revisions.remove_zone(call.name))


async def _assign(call: Call) -> Changes:
    return _changes(await call.service.revisions.assign(call.name, call.body.zone, call.body.parent))


ENDPOINTS: Final = (
    Endpoint("GET", "/v1/policy", _show, "The policy document in force", answers=Shown),
    Endpoint(
        "PUT", "/v1/policy", _apply, "Put another document in force, whole", body=Apply, answers=Changes
    ),
    Endpoint(
        "POST",
        "/v1/policy/diff",
        _diff,
        "What another document would change",
        body=Compare,
        answers=Changes,
    ),
    Endpoint("GET", "/v1/policy/history", _history, "The revisions that are kept", answers=History),
    Endpoint(
        "POST",
        "/v1/policy/rollback",
        _rollback,
        "Put the document of a former revision in force again",
        body=Rollback,
        answers=Changes,
    ),
    Endpoint("GET", "/v1/zones", _zones, "The zones and who is in them", answers=Zones),
    Endpoint("POST", "/v1/zones", _create_zone, "Make a zone", body=NewZone, answers=Changes, status=201),
    Endpoint("DELETE", "/v1/zones/{name}", _remove_zone, "Remove an empty zone", answers=Changes),
    Endpoint(
        "PUT",
        "/v1/vms/{name}/place",
        _assign,
        "Put a machine into a zone or under a parent",
        body=Assign,
        answers=Changes,
    ),
)
