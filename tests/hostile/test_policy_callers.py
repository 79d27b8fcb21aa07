"""Many callers at once, and clocks that jump: rights, pages and record stay one story."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from rayos_devices.gate import Op
from rayos_vmm.client.client import Client
from rayos_vmm.errors import Conflict, NotFound
from rayos_vmm.policy.audit import Entry, Operation
from rayos_vmm.policy.authority import Authority, open_authority
from rayos_vmm.policy.capability import NONE
from rayos_vmm.policy.gatekeeper import NotAllowed, Peer, open_gatekeeper
from rayos_vmm.policy.grant import Moment
from rayos_vmm.policy.token import Ask
from rayos_vmm.service.store import open_store
from tests.unit.policy.lab import open_shell
from tests.unit.policy.test_authority import gate

CALLERS = 64
ROUNDS = 2
MACHINES = [f"m{number}" for number in range(8)]
YEAR_S = 365 * 86400.0


class Caller:
    """One of many: grants, passes on, looks, changes the document, revokes; remembers what was acknowledged."""

    def __init__(self, client: Client, number: int) -> None:
        self._client = client
        self.number = number
        self.vm, self.next = MACHINES[number % 8], MACHINES[(number + 1) % 8]
        self.granted: list[int] = []
        self.revoked: list[int] = []
        self.kept: list[int] = []
        self.conflicts = 0

    async def ask(self, method: str, path: str, body: Any = None) -> Any:
        answer = await self._client.request(method, path, body=body)
        return msgspec.json.decode(answer) if answer else None

    async def run(self) -> None:
        for turn in range(ROUNDS):
            what = {"capabilities": ["CAP_INPUT"], "ttl_s": 3600.0, "reason": f"{self.number}.{turn}"}
            grant = await self.ask("POST", f"/vms/{self.vm}/grants", what)
            self.granted.append(grant["id"])
            shown = (await self.ask("GET", "/grants"))["grants"]
            assert grant["id"] in [one["id"] for one in shown]  # what was acknowledged is seen by everybody
            passed = {"capabilities": ["CAP_INPUT"], "to": self.next}
            try:
                await self.ask("POST", f"/vms/{self.vm}/delegations", passed)
            except Conflict:
                self.conflicts += 1  # the chain would be a circle, or too long, or there are 128
            await self._change_the_document(turn)
            if turn % 2:
                self.kept.append(grant["id"])
            else:
                gone = (await self.ask("DELETE", f"/grants/{grant['id']}"))["grants"]
                self.revoked.append(grant["id"])
                assert grant["id"] in [one["id"] for one in gone]
                with pytest.raises(NotFound):
                    await self.ask("DELETE", f"/grants/{grant['id']}")

    async def _change_the_document(self, turn: int) -> None:
        if self.number % 8:
            return
        base = (await self.ask("GET", "/policy"))["revision"]
        rule = {"kind": "resource", "input_queue": 100 + self.number + turn}
        body = {"document": {"host": {"rules": {"less": rule}}}, "base": base, "reason": str(self.number)}
        try:
            await self.ask("PUT", "/policy", body)
        except Conflict:
            self.conflicts += 1  # somebody was faster


async def test_64_callers_change_the_policy_at_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each sees what it was told; table, record and the next service agree with what all were told."""
    async with open_shell(tmp_path, capfd, monkeypatch) as shell:
        authority = shell.service.policy
        for vm in MACHINES:
            await authority.define(vm, ["net"])
        callers = [Caller(Client(tmp_path / "api.sock"), number) for number in range(CALLERS)]
        with trio.fail_after(120):
            async with trio.open_nursery() as nursery:
                for caller in callers:
                    nursery.start_soon(caller.run)
        granted = sorted(number for caller in callers for number in caller.granted)
        assert len(granted) == len(set(granted)) == CALLERS * ROUNDS
        holding = {one.id for one in authority.grants() if one.kind == "grant"}
        assert holding == {number for caller in callers for number in caller.kept}
        assert (await authority.verify()).ok and shell.service.connections.failed == 0
        entries = [msgspec.json.decode(line[65:], type=Entry) for line in authority.audit.lines()]
        recorded = Counter(entry.op for entry in entries if entry.allowed)
        assert recorded[Operation.GRANT] == CALLERS * ROUNDS and recorded[Operation.DELEGATE] > CALLERS
        told = {number for entry in entries if entry.op is Operation.REVOKE for number in entry.data["lost"]}
        assert told >= {number for caller in callers for number in caller.revoked}
        revisions = [entry.data["revision"] for entry in entries if entry.op is Operation.POLICY]
        assert revisions == list(range(1, shell.service.revisions.book.revision + 1))
        before = authority.grants()
    async with open_store(tmp_path / "db") as store:
        async with open_authority(
            store, tmp_path / "audit.log", key_path=tmp_path / "audit.key"
        ) as authority:
            same = [(one.id, one.vm, one.parent) for one in authority.grants()]
            assert same == [(one.id, one.vm, one.parent) for one in before]


class Clocks:
    """Both clocks, as a test sets them."""

    def __init__(self) -> None:
        self.wall, self.steady = 1.8e9, 5000.0

    def __call__(self) -> Moment:
        return Moment(self.wall, self.steady, "boot")

    def pass_(self, seconds: float) -> None:
        self.wall += seconds
        self.steady += seconds


@asynccontextmanager
async def opened(directory: Path, clocks: Clocks) -> AsyncIterator[Authority]:
    async with (
        open_store(directory / "db") as store,
        open_authority(
            store, directory / "audit.log", now=clocks, key_path=directory / "audit.key"
        ) as authority,
    ):
        yield authority


@pytest.mark.parametrize("step_s", [-YEAR_S, -3.0, 3.0, YEAR_S])
async def test_no_step_of_the_clock_gives_a_grant_more_time(tmp_path: Path, step_s: float) -> None:
    """By whichever clock it is over first; set back again, nothing comes to life, nor for the next service."""
    clocks = Clocks()
    async with opened(tmp_path, clocks) as authority:
        await authority.define("a", ["net"])
        authority.open("a", tmp_path, is_new=True)
        page = gate(tmp_path)
        await authority.grant("a", ["input"], 60, "for a minute")
        clocks.pass_(30)
        clocks.wall += step_s
        await authority.grant("a", ["gpu"], 60, "another")  # every change ends what is over
        assert page.allows(Op.INPUT_INJECT.index) is (step_s < 30)
        clocks.wall -= step_s
        clocks.pass_(30)
        await authority.grant("a", ["console_r"], None, "")
        assert not page.allows(Op.INPUT_INJECT.index)
        clocks.wall -= YEAR_S
        await authority.grant("a", ["console_w"], None, "")
        assert not page.allows(Op.INPUT_INJECT.index)
        clocks.wall += step_s
    async with opened(tmp_path, clocks) as authority:
        authority.open("a", tmp_path, is_new=False)
        assert not gate(tmp_path).allows(Op.INPUT_INJECT.index)
        steady = [entry.steady for entry in authority.records(1000)]
        assert steady == sorted(steady) and (await authority.verify()).ok


async def test_a_token_is_not_revived_by_any_step_and_says_why(tmp_path: Path) -> None:
    clocks, stranger = Clocks(), Peer(1, 1000, 1000)
    ask = Ask("machines.list", NONE)
    async with open_store(tmp_path / "db") as store, opened(tmp_path, clocks) as authority:
        keeper = await open_gatekeeper(
            store, tmp_path / "token.key", authority.audit, zone_of=lambda _: None, now=clocks
        )
        short, _ = await keeper.create(0, [], ttl_s=60)
        caveat, _ = await keeper.create(0, [f"expires={clocks.wall + 60:.0f}"])
        for token in (short, caveat):
            await keeper.admit(ask, stranger, token, is_change=False)
        clocks.wall += YEAR_S
        for token in (short, caveat):
            with pytest.raises(NotAllowed, match="expire"):
                await keeper.admit(ask, stranger, token, is_change=False)
        clocks.wall -= YEAR_S
        with pytest.raises(NotAllowed, match="the clock was set back by 31536000 s, which revives no token"):
            await keeper.admit(ask, stranger, caveat, is_change=False)
        clocks.wall -= YEAR_S
        clocks.steady += 61
        with pytest.raises(NotAllowed, match="expired"):
            await keeper.admit(ask, stranger, short, is_change=False)
        assert (await authority.verify()).ok
