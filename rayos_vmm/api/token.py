"""Tokens for callers that are not the owner: give out, list, revoke."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from rayos_vmm.api.endpoint import Call, Endpoint
from rayos_vmm.api.guard import PEER
from rayos_vmm.policy.gatekeeper import Issued
from rayos_vmm.policy.token import CAVEAT_MAXIMUM, CAVEATS_MAXIMUM


class AskToken(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Caveats: uses for which the token is not good (`vm=a,b`, `zone=lab`, `capability=CAP_NET`, `command=console`,
    …).
    """

    caveats: Annotated[
        list[Annotated[str, Meta(max_length=CAVEAT_MAXIMUM)]], Meta(max_length=CAVEATS_MAXIMUM - 1)
    ] = []
    label: Annotated[str, Meta(max_length=64)] = ""
    ttl_s: Annotated[float, Meta(gt=0, le=366 * 86400)] | None = None


class NewToken(msgspec.Struct, frozen=True, kw_only=True):
    """The token, which nobody can show again, and what is remembered of it."""

    token: str
    issued: Issued


class Tokens(msgspec.Struct, frozen=True, kw_only=True):
    """The tokens that hold."""

    tokens: list[Issued]


async def _create(call: Call) -> NewToken:
    ask = call.body
    token, issued = await call.service.gatekeeper.create(
        call.request.scope[PEER].uid, ask.caveats, label=ask.label, ttl_s=ask.ttl_s
    )
    return NewToken(token=token, issued=issued)


async def _list(call: Call) -> Tokens:
    return Tokens(tokens=call.service.gatekeeper.tokens())


async def _revoke(call: Call) -> Issued:
    return await call.service.gatekeeper.revoke(call.request.path_params["id"])


ENDPOINTS: Final = (
    Endpoint("GET", "/v1/tokens", _list, "The tokens that hold", answers=Tokens),
    Endpoint("POST", "/v1/tokens", _create, "Give out a token", body=AskToken, answers=NewToken, status=201),
    Endpoint("DELETE", "/v1/tokens/{id}", _revoke, "End a token and all that came of it", answers=Issued),
)
