"""Operations on rights: grant, delegate, revoke, explain; and on the record of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from itertools import islice

import msgspec
import trio

from rayos_vmm.api.endpoint import Call, serves
from rayos_vmm.api.stream import Stream
from rayos_vmm.contract import operations
from rayos_vmm.contract.answers import AuditKey, AuditRecords, Grants, Security, SetAside
from rayos_vmm.contract.operation import NDJSON
from rayos_vmm.errors import NotFound
from rayos_vmm.policy.audit_key import public_text
from rayos_vmm.policy.view import GrantView, PolicyView, Verified


@serves(operations.POLICY_GRANTS)
async def _grants(call: Call) -> Grants:
    return Grants(grants=call.service.policy.grants(call.query.vm))


@serves(operations.POLICY_GRANT)
async def _grant(call: Call) -> GrantView:
    ask = call.body
    return await call.service.policy.grant(
        call.name, ask.capabilities, ask.ttl_s, ask.reason, ask.constraints.constraints()
    )


@serves(operations.POLICY_DELEGATE)
async def _delegate(call: Call) -> GrantView:
    ask = call.body
    return await call.service.policy.delegate(
        call.name, ask.to, ask.capabilities, ask.ttl_s, ask.constraints.constraints()
    )


@serves(operations.POLICY_REVOKE)
async def _revoke(call: Call) -> Grants:
    text = call.path["id"]
    if not text.isascii() or not text.isdecimal() or len(text) > 18:
        raise NotFound(
            f"there is no grant {text[:40]!r}: grants have numbers", hint="`rayos grants` lists them"
        )
    return Grants(grants=await call.service.policy.revoke(int(text)))


@serves(operations.POLICY_REVOKE_RIGHTS)
async def _revoke_rights(call: Call) -> Grants:
    return Grants(grants=await call.service.policy.revoke_rights(call.name, call.body.capabilities))


@serves(operations.POLICY_EXPLAIN)
async def _explain(call: Call) -> PolicyView:
    return call.service.revisions.explain(call.name)


@serves(operations.POLICY_SECURITY)
async def _security(call: Call) -> Security:
    asdict = msgspec.structs.asdict
    return Security(**asdict(call.service.policy.status()), **asdict(call.service.gatekeeper.status()))


@serves(operations.POLICY_AUDIT)
async def _audit(call: Call) -> AuditRecords:
    policy = call.service.policy
    return AuditRecords(records=policy.records(call.query.limit), lost=policy.audit.lost)


@serves(operations.POLICY_VERIFY)
async def _verify(call: Call) -> Verified:
    return await call.service.policy.verify()


@serves(operations.POLICY_RESTART)
async def _restart(call: Call) -> SetAside:
    folder = await call.service.policy.restart_audit(call.body.reason)
    return SetAside(folder=folder.name)


@serves(operations.POLICY_KEY)
async def _key(call: Call) -> AuditKey:
    key = call.service.policy.audit_key
    if key is None:
        raise NotFound("the record is not signed")
    return AuditKey(public=public_text(key))


@serves(operations.POLICY_EXPORT)
async def _export(call: Call) -> Stream:
    audit = call.service.policy.audit
    await audit.sync()
    lines = audit.lines()
    return Stream(_pieces(lines), media_type=NDJSON)


async def _pieces(lines: Iterator[bytes]) -> AsyncIterator[bytes]:
    """Records, many a piece."""
    while piece := await trio.to_thread.run_sync(lambda: b"".join(islice(lines, 512))):
        yield piece
