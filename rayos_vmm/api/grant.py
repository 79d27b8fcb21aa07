"""Operations on rights: grant, delegate, revoke, explain; and on the record of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from itertools import islice
from typing import Any, Final

import trio
from starlette.responses import StreamingResponse

from rayos_vmm.api.endpoint import NDJSON, Call, Endpoint
from rayos_vmm.contract.types import (
    AskDelegation,
    AskGrant,
    AuditKey,
    AuditQuery,
    AuditRecords,
    Grants,
    GrantsQuery,
    Rights,
)
from rayos_vmm.errors import Invalid, NotFound
from rayos_vmm.policy.audit_key import public_text


async def _grants(call: Call) -> Grants:
    return Grants(grants=call.service.policy.grants(call.query.vm))


async def _grant(call: Call) -> dict[str, Any]:
    ask = call.body
    return await call.service.policy.grant(
        call.name, ask.capabilities, ask.ttl_s, ask.reason, ask.constraints.constraints()
    )


async def _delegate(call: Call) -> dict[str, Any]:
    ask = call.body
    return await call.service.policy.delegate(
        call.name, ask.to, ask.capabilities, ask.ttl_s, ask.constraints.constraints()
    )


async def _revoke(call: Call) -> Grants:
    text = call.request.path_params["id"]
    if not text.isascii() or not text.isdecimal() or len(text) > 18:
        raise Invalid(f"{text[:40]!r} is not the number of a grant")
    return Grants(grants=await call.service.policy.revoke(int(text)))


async def _revoke_rights(call: Call) -> Grants:
    return Grants(grants=await call.service.policy.revoke_rights(call.name, call.body.capabilities))


async def _explain(call: Call) -> dict[str, Any]:
    return call.service.revisions.explain(call.name)


async def _security(call: Call) -> dict[str, Any]:
    return {**call.service.policy.status(), **call.service.gatekeeper.status()}


async def _audit(call: Call) -> AuditRecords:
    policy = call.service.policy
    return AuditRecords(records=policy.records(call.query.limit), lost=policy.audit.lost)


async def _verify(call: Call) -> dict[str, Any]:
    return await call.service.policy.verify()


async def _key(call: Call) -> AuditKey:
    key = call.service.policy.audit_key
    if key is None:
        raise NotFound("the record is not signed")
    return AuditKey(public=public_text(key))


async def _export(call: Call) -> StreamingResponse:
    audit = call.service.policy.audit
    await audit.sync()
    lines = audit.lines()
    return StreamingResponse(_pieces(lines), media_type=NDJSON)


async def _pieces(lines: Iterator[bytes]) -> AsyncIterator[bytes]:
    """Records, many a piece."""
    while piece := await trio.to_thread.run_sync(lambda: b"".join(islice(lines, 512))):
        yield piece


ENDPOINTS: Final = (
    Endpoint("GET", "/v1/grants", _grants, "What is granted", query=GrantsQuery, answers=Grants),
    Endpoint("DELETE", "/v1/grants/{id}", _revoke, "Revoke a grant and what was passed on", answers=Grants),
    Endpoint(
        "POST",
        "/v1/vms/{name}/grants",
        _grant,
        "Grant rights, for a time or until they are revoked",
        body=AskGrant,
        answers=dict[str, Any],
        status=201,
    ),
    Endpoint(
        "POST",
        "/v1/vms/{name}/delegations",
        _delegate,
        "Let a machine pass rights on to another",
        body=AskDelegation,
        answers=dict[str, Any],
        status=201,
    ),
    Endpoint(
        "POST",
        "/v1/vms/{name}/revoke",
        _revoke_rights,
        "Take rights from a machine, wherever it has them from",
        body=Rights,
        answers=Grants,
    ),
    Endpoint(
        "GET",
        "/v1/vms/{name}/policy",
        _explain,
        "All that holds for a machine and where it comes from",
        answers=dict[str, Any],
    ),
    Endpoint(
        "GET",
        "/v1/security",
        _security,
        "How much there is of everything that has a limit, and the limit",
        answers=dict[str, Any],
    ),
    Endpoint("GET", "/v1/audit", _audit, "The last audit records", query=AuditQuery, answers=AuditRecords),
    Endpoint("GET", "/v1/audit/verify", _verify, "Check the audit file", answers=dict[str, Any]),
    Endpoint("GET", "/v1/audit/key", _key, "What the record is signed by", answers=AuditKey),
    Endpoint("GET", "/v1/audit/export", _export, "The audit file: a digest and JSON a line", media=NDJSON),
)
