"""Operations on a machine's firewall: its rules, what would happen to a packet, what happens to each."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, Final

import msgspec
from starlette.responses import StreamingResponse

from rayos_vmm.api.endpoint import NDJSON, Call, Endpoint
from rayos_vmm.config.firewall import FirewallRule
from rayos_vmm.contract.types import Applied, AskPacket, AskRules, CountedRule, FirewallRules
from rayos_vmm.errors import Conflict, NotFound


async def _rules(call: Call) -> FirewallRules:
    firewall = call.service.firewall
    rules = firewall.rules(call.name)
    counts = await firewall.counts(call.name)
    return FirewallRules(
        rules=[
            CountedRule(origin=one.origin, rule=one.rule, hits=None if counts is None else counts[index])
            for index, one in enumerate(rules)
        ]
    )


async def _set(call: Call) -> Applied:
    return Applied(revision=await call.service.firewall.set_own(call.name, call.body.rules))


async def _add(call: Call) -> Applied:
    firewall, rule = call.service.firewall, call.body
    own = firewall.own(call.name)
    if any(one.name == rule.name for one in own):
        raise Conflict(
            f"{call.name} has a rule {rule.name} already",
            hint=f"rayos firewall remove {call.name} {rule.name}",
        )
    return Applied(revision=await firewall.set_own(call.name, [*own, rule]))


async def _remove(call: Call) -> Applied:
    firewall, name = call.service.firewall, call.request.path_params["rule"]
    own = firewall.own(call.name)
    rest = [one for one in own if one.name != name]
    if len(rest) == len(own):
        raise NotFound(
            f"{call.name} has no rule {name[:63]!r} of its own", hint=f"rayos firewall list {call.name}"
        )
    return Applied(revision=await firewall.set_own(call.name, rest))


async def _explain(call: Call) -> dict[str, Any]:
    return await call.service.firewall.explain(call.name, call.body.packet)


async def _trace(call: Call) -> StreamingResponse:
    trace = call.service.firewall.trace(call.name)

    async def lines() -> AsyncGenerator[bytes, None]:
        async with trace as verdicts:
            async for verdict in verdicts:
                yield msgspec.json.encode(verdict) + b"\n"

    return StreamingResponse(lines(), media_type=NDJSON)


ENDPOINTS: Final = (
    Endpoint(
        "GET",
        "/v1/vms/{name}/firewall",
        _rules,
        "All rules that hold for a machine, where each comes from, and how many frames it decided",
        answers=FirewallRules,
    ),
    Endpoint(
        "PUT",
        "/v1/vms/{name}/firewall",
        _set,
        "Replace the machine's own rules; in force when this answers",
        body=AskRules,
        answers=Applied,
    ),
    Endpoint(
        "POST",
        "/v1/vms/{name}/firewall/rules",
        _add,
        "Add a rule behind the machine's own",
        body=FirewallRule,
        answers=Applied,
        status=201,
    ),
    Endpoint(
        "DELETE",
        "/v1/vms/{name}/firewall/rules/{rule}",
        _remove,
        "Remove one of the machine's own rules",
        answers=Applied,
    ),
    Endpoint(
        "POST",
        "/v1/vms/{name}/firewall/explain",
        _explain,
        "What would happen to a packet, and which rule decides",
        body=AskPacket,
        answers=dict[str, Any],
    ),
    Endpoint(
        "GET",
        "/v1/vms/{name}/firewall/trace",
        _trace,
        "What happens to each packet from now on, one JSON object a line, without end",
        media=NDJSON,
    ),
)
