"""Tokens that were forged, cut off, widened, expired or revoked, and callers that nobody knows: all are refused."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import msgspec
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from rayos_vmm.errors import Conflict, Invalid, NotFound, RateLimited
from rayos_vmm.policy.audit import Operation
from rayos_vmm.policy.audit_log import AuditFailed
from rayos_vmm.policy.authority import Authority, open_authority
from rayos_vmm.policy.capability import NONE, Capability
from rayos_vmm.policy.gatekeeper import (
    BURST,
    SHARE_BURST,
    TOKENS_MAXIMUM,
    Gatekeeper,
    NotAllowed,
    Peer,
    load_key,
    open_gatekeeper,
)
from rayos_vmm.policy.grant import Moment
from rayos_vmm.policy.hierarchy import Place
from rayos_vmm.policy.token import Ask, BadToken, Circumstances, Token, is_genuine, mint, parse, violated
from rayos_vmm.service.store import open_store
from tests.unit.policy.lab import open_shell

KEY = b"k" * 32
STRANGER = Peer(1, 1000, 1000)
CONSOLE = Ask("console.log", Capability.CAP_CONSOLE_R, "a", is_within_vm=True)
GIVEN = Circumstances(1000.0, 1000, "lab")


class Clock:
    """A moment that a test moves."""

    def __init__(self) -> None:
        self.wall, self.steady = 1000.0, 10.0

    def __call__(self) -> Moment:
        return Moment(self.wall, self.steady, "boot")


@asynccontextmanager
async def gatekeeper(directory: Path) -> AsyncIterator[tuple[Gatekeeper, Authority, Clock]]:
    """Of machine `a` in zone `lab` and `b` in none; the owner is user 0."""
    clock = Clock()
    async with (
        open_store(directory / "db") as store,
        open_authority(store, directory / "audit.log", now=clock) as authority,
    ):
        keeper = await open_gatekeeper(
            store, directory / "token.key", authority.audit, zone_of={"a": "lab"}.get, now=clock
        )
        yield keeper, authority, clock


# -- the chain ------------------------------------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=300)
def test_no_change_of_a_text_is_accepted(data: st.DataObject) -> None:
    """Whatever is flipped, cut or put in: no token, or not genuine, or the very same."""
    text = mint(KEY, "id", ["vm=a", "expires=5"]).text()
    position = data.draw(st.integers(0, len(text)))
    removed = data.draw(st.integers(0, 8))
    changed = text[:position] + data.draw(st.text(max_size=8)) + text[position + removed :]
    try:
        token = parse(changed)
    except BadToken:
        return
    assert changed.strip() == text or not is_genuine(token, KEY)


@given(
    caveats=st.lists(st.sampled_from(["vm=a", "vm=b", "zone=lab", "command=console", "uid=7"]), max_size=6),
    cut=st.integers(0, 6),
)
def test_a_holder_can_add_caveats_and_never_take_one_away(caveats: list[str], cut: int) -> None:
    token = mint(KEY, "id").narrowed(caveats)
    assert is_genuine(parse(token.text()), KEY)
    fewer = Token("id", token.caveats[:cut], token.signature)
    assert is_genuine(fewer, KEY) is (fewer.caveats == token.caveats)
    other = Token("id", token.caveats[::-1], token.signature)
    assert is_genuine(other, KEY) is (other.caveats == token.caveats)
    if violated(token, CONSOLE, GIVEN) is not None:
        assert violated(token.narrowed(["vm=a"]), CONSOLE, GIVEN) is not None


@pytest.mark.parametrize(
    ("caveat", "holds"),
    [
        ("vm=a", True),
        ("vm=b", False),
        ("vm=b,a", True),
        ("zone=lab", True),
        ("zone=other", False),
        ("capability=CAP_CONSOLE_R", True),
        ("capability=CAP_CONSOLE_W,CAP_GPU", False),
        ("capability=CAP_ADMIN", True),
        ("command=console", True),
        ("command=console.log,ps", True),
        ("command=consol", False),
        ("command=console.attach", False),
        ("expires=1000.1", True),
        ("expires=1000", False),
        ("expires=nan", False),
        ("uid=1000", True),
        ("uid=0", False),
        ("moon=full", False),
        ("vm", False),
        ("expires=soon", False),
        ("", False),
    ],
)
def test_what_a_caveat_means(caveat: str, holds: bool) -> None:
    """Also those that no minting would take: what is not known does not hold."""
    assert (violated(Token("id", (caveat,), b""), CONSOLE, GIVEN) is None) is holds


@pytest.mark.parametrize(
    "caveat",
    ["moon=full", "vm=A b", "capability=CAP_FLY", "expires=soon", "uid=me", "command=a b", "vm=" + "a" * 999],
)
def test_a_caveat_that_nobody_would_understand_is_refused_when_it_is_added(caveat: str) -> None:
    with pytest.raises(BadToken, match="caveat"):
        mint(KEY, "id", [caveat])
    with pytest.raises(BadToken, match="33 caveats"):
        mint(KEY, "id", ["vm=a"] * 33)


def test_a_token_for_a_machine_does_nothing_beyond_it() -> None:
    token = mint(KEY, "id", ["vm=a"])
    for ask in (
        Ask("machines.list", NONE),
        Ask("policy.delegate", Capability.CAP_ADMIN, "a"),
        Ask("machines.get", NONE, "b", is_within_vm=True),
    ):
        assert violated(token, ask, GIVEN) == "vm=a"


# -- the gatekeeper -------------------------------------------------------------------------------------------------


async def test_only_the_owner_needs_no_token(tmp_path: Path) -> None:
    async with gatekeeper(tmp_path) as (keeper, authority, _):
        await keeper.admit(CONSOLE, Peer(1, 0, 0), "", is_change=True)
        with pytest.raises(NotAllowed, match="neither root nor the owner"):
            await keeper.admit(CONSOLE, STRANGER, "", is_change=False)
        frequent = Ask("input.mouse", Capability.CAP_INPUT, "a", is_within_vm=True, is_frequent=True)
        for _ in range(50):
            await keeper.admit(frequent, Peer(1, 0, 0), "", is_change=True)
        await authority.audit.sync()
        passed, failed, often = authority.records(3)
        assert often.data["command"] == "input.mouse"  # the others are counted, and told later
        assert (passed.op, passed.allowed) == (Operation.CHECK_PASS, True)
        assert passed.data["chain"] == ["uid 0 owns the service"] and passed.vm == "a"
        assert (failed.op, failed.allowed, failed.data["caller"]) == (Operation.CHECK_FAIL, False, "uid 1000")


async def test_tokens_that_are_no_good(tmp_path: Path) -> None:
    """Forged, cut off, of another key, expired, with the clock set back, revoked and replayed: each says why."""
    async with gatekeeper(tmp_path) as (keeper, authority, clock):
        text, issued = await keeper.create(0, ["vm=a"], label="ci", ttl_s=60)

        async def ask(token: str, what: Ask = CONSOLE) -> None:
            await keeper.admit(what, STRANGER, token, is_change=True)

        await ask(text)
        assert authority.records(1)[0].data["chain"] == [
            f"uid 0 issued token {issued.identifier} (ci)",
            "vm=a",
            "expires=1060.000",
        ]
        forged = mint(b"x" * 32, issued.identifier)
        for token, why in (
            ("rubbish", "begins with rayos1"),
            (text[:-3], "signature has|cannot be read"),
            (text[:20], "three parts"),
            (forged.text(), "forged"),
            (Token(issued.identifier, (), parse(text).signature).text(), "forged"),
            (mint(load_key(tmp_path / "token.key"), "0" * 16).text(), "never issued"),
            ("rayos1." + "A" * 9000 + ".A", "at most 8192"),
        ):
            with pytest.raises(NotAllowed, match=why):
                await ask(token)
        with pytest.raises(NotAllowed, match=r"allows vm=a, and this is console\.log on b"):
            await ask(text, Ask("console.log", Capability.CAP_CONSOLE_R, "b", is_within_vm=True))
        with pytest.raises(NotAllowed, match="the owner has to ask"):
            await ask(
                (await keeper.create(0, []))[0], Ask("token.create", Capability.CAP_ADMIN, is_for_owner=True)
            )
        narrowed = parse(text).narrowed(["expires=1010"]).text()
        await ask(narrowed)
        clock.wall = 1011.0
        with pytest.raises(NotAllowed, match="expires=1010"):
            await ask(narrowed)
        clock.wall = 900.0  # set back: nothing comes to life
        with pytest.raises(NotAllowed, match="expires=1010"):
            await ask(narrowed)
        await ask(text)
        clock.steady = 70.0
        with pytest.raises(NotAllowed, match="expired"):
            await ask(text)
        again, issued = await keeper.create(0, [])
        await ask(again)
        await keeper.revoke(issued.identifier)
        for token in (again, parse(again).narrowed(["vm=a"]).text()):
            with pytest.raises(NotAllowed, match="revoked"):
                await ask(token)
        with pytest.raises(NotFound):
            await keeper.revoke(issued.identifier)
        assert (await authority.verify()).ok


async def test_a_next_service_knows_the_tokens_and_the_revocations(tmp_path: Path) -> None:
    async with gatekeeper(tmp_path) as (keeper, _, _):
        kept, _ = await keeper.create(0, [])
        gone, issued = await keeper.create(0, [])
        await keeper.revoke(issued.identifier)
    async with gatekeeper(tmp_path) as (keeper, _, _):
        await keeper.admit(CONSOLE, STRANGER, kept, is_change=False)
        with pytest.raises(NotAllowed, match="revoked"):
            await keeper.admit(CONSOLE, STRANGER, gone, is_change=False)
    assert (tmp_path / "token.key").stat().st_mode & 0o777 == 0o600


async def test_a_caller_has_a_rate_and_the_record_a_bound(tmp_path: Path) -> None:
    """A flood costs one record and a counter; another caller is not hurt; nobody spends another's rate by a forgery."""
    async with gatekeeper(tmp_path) as (keeper, authority, _):
        text, issued = await keeper.create(0, [])
        forged = mint(b"x" * 32, issued.identifier).text()
        refused = 0
        for _ in range(int(BURST) * 5):
            try:
                await keeper.admit(CONSOLE, STRANGER, forged, is_change=True)
            except NotAllowed:
                refused += 1
            except RateLimited:
                break
        assert BURST <= refused < BURST * 5
        await keeper.admit(CONSOLE, STRANGER, text, is_change=False)
        await authority.audit.sync()
        assert sum(entry.op is Operation.CHECK_FAIL for entry in authority.records(1000)) == 1
        for _ in range(TOKENS_MAXIMUM - 1):
            await keeper.create(0, [])
        with pytest.raises(Conflict, match="there are 256 tokens; at most 256"):
            await keeper.create(0, [])


async def test_a_caller_has_a_share_of_the_record(tmp_path: Path) -> None:
    """F6: whatever he names is one refusal a command; beyond his records he is counted; others are not hurt."""
    async with gatekeeper(tmp_path) as (keeper, authority, _):

        async def ask(command: str, vm: str, peer: Peer) -> None:
            with suppress(NotAllowed, RateLimited):
                await keeper.admit(Ask(command, Capability.CAP_ADMIN, vm), peer, "", is_change=False)

        for number in range(90):
            await ask("machines.get", f"name{number}", STRANGER)
        await authority.audit.sync()
        assert [entry.data["command"] for entry in authority.records(100)] == ["machines.get"]
        for uid in range(2000, 2003):
            for number in range(100):
                await ask(f"command.{number}", "", Peer(1, uid, uid))
        for number in range(100):
            await ask(f"command.{number}", "", Peer(1, 0, 0))
        await authority.audit.sync()
        callers = Counter(entry.data["caller"] for entry in authority.records(1000))
        assert callers.pop("uid 1000") == 1 and callers.pop("uid 0") == 100
        assert (
            all(SHARE_BURST <= count <= SHARE_BURST + 6 for count in callers.values()) and len(callers) == 3
        )
        assert keeper.denied == 390


async def test_what_a_token_allows_does_not_happen_without_a_record(tmp_path: Path) -> None:
    async with gatekeeper(tmp_path) as (keeper, authority, _):
        text, _ = await keeper.create(0, [])
        authority.audit.fail("of a test")
        for is_change in (True, False):
            with pytest.raises(AuditFailed):
                await keeper.admit(CONSOLE, STRANGER, text, is_change=is_change)
        with pytest.raises(AuditFailed):
            await keeper.create(0, [])
        await keeper.admit(CONSOLE, Peer(1, 0, 0), "", is_change=True)  # the owner can still stop a machine
        assert len(keeper.tokens()) == 1
        with pytest.raises(Invalid, match="CAP_FLY"):
            await keeper.create(0, ["capability=CAP_FLY"])


# -- the API --------------------------------------------------------------------------------------------------------


ASK = """
import socket, sys
path, request = sys.argv[1], sys.stdin.buffer.read()
with socket.socket(socket.AF_UNIX) as sock:
    sock.connect(path); sock.sendall(request); data = b""
    while chunk := sock.recv(65536): data += chunk
sys.stdout.buffer.write(data)
"""


def as_nobody(path: Path, method: str, target: str, token: str = "", body: bytes = b"") -> tuple[int, str]:
    """(status, body) of a request by another user's process."""
    head = f"{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
    head += f"Authorization: Bearer {token}\r\n" if token else ""
    done = subprocess.run(
        ["/usr/bin/python3", "-I", "-c", ASK, str(path)],
        input=head.encode() + b"\r\n" + body,
        capture_output=True,
        user=65534,
        group=65534,
        check=True,
        cwd="/",
    )
    answer, _, content = done.stdout.partition(b"\r\n\r\n")
    return int(answer.split()[1]), content.decode()


@pytest.mark.root
async def test_another_user_of_the_host_gets_as_far_as_his_token(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By real processes and sockets: without a token nothing, with one what it says, until it is revoked."""
    async with open_shell(tmp_path, capfd, monkeypatch, is_shared=True) as shell:
        await shell.service.policy.define("a", ["all"], Place())

        async def nobody(*words: str, token: str = "", body: bytes = b"") -> tuple[int, str]:
            method, target = words
            return await trio.to_thread.run_sync(as_nobody, shell.shared, method, target, token, body)

        status, said = await nobody("GET", "/v1/grants")
        assert status == 403 and "uid 65534 is neither root nor the owner" in said
        assert (await nobody("GET", "/v1/nothing"))[0] == 403
        with pytest.raises(subprocess.CalledProcessError):
            await trio.to_thread.run_sync(as_nobody, tmp_path / "api.sock", "GET", "/v1/grants")
        text = (
            await shell.rayos("token", "create", "--cap", "audit", "--label", "ci", "--ttl", "1h")
        ).strip()
        status, said = await nobody("GET", "/v1/grants", token=text)
        assert status == 200 and '"vm":"a"' in said
        revoke = msgspec.json.encode({"capabilities": ["all"]})
        status, said = await nobody("POST", "/v1/vms/a/revoke", token=text, body=revoke)
        assert status == 403 and "capability=CAP_AUDIT" in said
        narrow = (await shell.rayos("token", "attenuate", text, "--vm", "a")).strip()
        assert (await nobody("GET", "/v1/vms/a/policy", token=narrow))[0] == 200
        assert (await nobody("GET", "/v1/grants", token=narrow))[0] == 403
        assert "  vm=a" in await shell.rayos("token", "inspect", narrow)
        full = (await shell.rayos("token", "create")).strip()
        assert (await nobody("POST", "/v1/vms/a/revoke", token=full, body=revoke))[0] == 200
        assert (await nobody("POST", "/v1/tokens", token=full, body=b"{}"))[0] == 403
        listed = await shell.json("token", "list")
        assert [entry["label"] for entry in listed] == ["ci", ""]
        await shell.rayos("token", "revoke", listed[0]["identifier"])
        assert (await nobody("GET", "/v1/grants", token=text))[0] == 403
        monkeypatch.setenv("RAYOS_TOKEN", narrow)  # the owner asks by a token: it narrows him too
        assert "revoked" in await shell.rayos("grants", status=1)
        monkeypatch.setenv("RAYOS_TOKEN", full)
        assert "a" in await shell.rayos("grants")
        assert "not a token" in await shell.rayos("token", "inspect", "rayos1.x", status=2)
        assert os.geteuid() == 0
