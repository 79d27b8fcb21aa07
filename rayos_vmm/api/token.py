"""Tokens for callers that are not the owner: give out, list, revoke."""

from __future__ import annotations

from rayos_vmm.api.endpoint import Call, serves
from rayos_vmm.api.guard import PEER
from rayos_vmm.contract import operations
from rayos_vmm.contract.answers import NewToken, Tokens
from rayos_vmm.policy.gatekeeper import Issued


@serves(operations.TOKEN_CREATE)
async def _create(call: Call) -> NewToken:
    ask = call.body
    token, issued = await call.service.gatekeeper.create(
        call.request.scope[PEER].uid, ask.caveats, label=ask.label, ttl_s=ask.ttl_s
    )
    return NewToken(token=token, issued=issued)


@serves(operations.TOKEN_LIST)
async def _list(call: Call) -> Tokens:
    return Tokens(tokens=call.service.gatekeeper.tokens())


@serves(operations.TOKEN_REVOKE)
async def _revoke(call: Call) -> Issued:
    return await call.service.gatekeeper.revoke(call.path["id"])
