"""Operations on a machine's firewall: its rules, what would happen to a packet, what happens to each."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import msgspec

from rayos_vmm.api.endpoint import Call, serves
from rayos_vmm.api.stream import Stream
from rayos_vmm.contract import operations
from rayos_vmm.contract.answers import Applied, CountedRule, FirewallRules
from rayos_vmm.contract.operation import NDJSON
from rayos_vmm.errors import Conflict, NotFound
from rayos_vmm.shared.view import Verdict


@serves(operations.FIREWALL_RULES)
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


@serves(operations.FIREWALL_SET)
async def _set(call: Call) -> Applied:
    return Applied(revision=await call.service.firewall.set_own(call.name, call.body.rules))


@serves(operations.FIREWALL_ADD)
async def _add(call: Call) -> Applied:
    firewall, rule = call.service.firewall, call.body
    own = firewall.own(call.name)
    if any(one.name == rule.name for one in own):
        raise Conflict(
            f"{call.name} has a rule {rule.name} already",
            hint=f"rayos firewall remove {call.name} {rule.name}",
        )
    return Applied(revision=await firewall.set_own(call.name, [*own, rule]))


@serves(operations.FIREWALL_REMOVE)
async def _remove(call: Call) -> Applied:
    firewall, name = call.service.firewall, call.path["rule"]
    own = firewall.own(call.name)
    rest = [one for one in own if one.name != name]
    if len(rest) == len(own):
        raise NotFound(
            f"{call.name} has no rule {name[:63]!r} of its own", hint=f"rayos firewall list {call.name}"
        )
    return Applied(revision=await firewall.set_own(call.name, rest))


@serves(operations.FIREWALL_EXPLAIN)
async def _explain(call: Call) -> Verdict:
    return await call.service.firewall.explain(call.name, call.body.packet)


@serves(operations.FIREWALL_TRACE)
async def _trace(call: Call) -> Stream:
    trace = call.service.firewall.trace(call.name)

    async def lines() -> AsyncGenerator[bytes, None]:
        async with trace as verdicts:
            async for verdict in verdicts:
                yield msgspec.json.encode(verdict) + b"\n"

    return Stream(lines(), media_type=NDJSON)
