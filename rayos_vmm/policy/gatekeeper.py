"""Who may ask for what: the owner everything, anybody else what a token says; each decision recorded with its reason.

Invariant: nothing that a token allows happens while the record cannot be written. Refusals, and the peers that cause
them, are bounded: each caller has a rate, repeated refusals of a command are recorded once with their count whatever
they name, and a caller that is not the owner has a share of the record: the rest is counted and told with the next.
"""

from __future__ import annotations

import os
import secrets
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Protocol

import msgspec
import trio
from msgspec import Meta

from rayos_devices.bucket import TokenBucket
from rayos_vmm.errors import Conflict, Forbidden, Invalid, NotFound, RateLimited
from rayos_vmm.policy.audit import Operation
from rayos_vmm.policy.audit_key import load_secret
from rayos_vmm.policy.audit_log import AuditFailed, AuditLog
from rayos_vmm.policy.grant import TTL_MAXIMUM, End, Moment
from rayos_vmm.policy.token import (
    KEY_BYTES,
    Ask,
    BadToken,
    Circumstances,
    Token,
    is_genuine,
    mint,
    parse,
    violated,
)
from rayos_vmm.policy.view import CallerStatus, Decisions, Usage

TOKENS_MAXIMUM: Final = 256
#: Requests a second of one caller that is not the owner, and how many at once.
RATE: Final = 50.0
BURST: Final = 100.0
#: Records of one caller that is not the owner, beside the changes that a token allowed it: a second, and at once.
SHARE_RATE: Final = 0.1
SHARE_BURST: Final = 64.0
_CALLERS_MAXIMUM: Final = 1024
_REPEATS_MAXIMUM: Final = 1024
#: The same decision is recorded once in so many seconds, with how often it was made.
REPEAT_S: Final = 10.0


class NotAllowed(Forbidden):
    """The caller may not do that."""

    code = "not_allowed"


@dataclass(frozen=True, slots=True)
class Peer:
    """The process at the other end of the socket, by the kernel's word (unix(7), SO_PEERCRED)."""

    pid: int
    uid: int
    gid: int


class Issued(msgspec.Struct, frozen=True, kw_only=True):
    """A token that was given out: by which user, when, until when, why."""

    identifier: str
    by: int
    time: float
    label: Annotated[str, Meta(max_length=64)] = ""
    end: End | None = None
    caveats: tuple[str, ...] = ()


class TokenStore(Protocol):
    """Where the list of tokens is kept."""

    async def load_tokens(self) -> bytes | None: ...
    async def save_tokens(self, data: bytes) -> None: ...


def load_key(path: Path) -> bytes:
    """The key that all tokens are minted with; made when there is none.

    Raises:
        OSError: it cannot be read or written.
        Invalid: the file is not ours.
    """
    key = load_secret(path, lambda: secrets.token_bytes(KEY_BYTES))
    if len(key) != KEY_BYTES:
        raise Invalid(f"{path} has {len(key)} bytes, not {KEY_BYTES}", hint="move it away to make another")
    return key


class Gatekeeper:
    """Use `open_gatekeeper`. Every method may be called from any task of the same run."""

    def __init__(
        self,
        key: bytes,
        issued: list[Issued],
        store: TokenStore,
        audit: AuditLog,
        *,
        zone_of: Callable[[str], str | None],
        now: Callable[[], Moment],
        owner: int | None = None,
    ) -> None:
        self._key = key
        self._issued = {token.identifier: token for token in issued}
        self._store = store
        self._audit = audit
        self._zone_of = zone_of
        self._now = now
        self._owner = os.geteuid() if owner is None else owner
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()
        self._repeats: OrderedDict[tuple[str, ...], list[float]] = OrderedDict()
        self._shares: OrderedDict[str, TokenBucket] = OrderedDict()
        self._beyond: OrderedDict[str, int] = OrderedDict()  # decisions that had no share left, by caller
        self._latest = 0.0  # of the wall clock: setting it back revives no token
        self._lock = trio.Lock()
        self.allowed = 0
        self.denied = 0

    # -- decisions -----------------------------------------------------------------------------------------------

    async def admit(self, ask: Ask, peer: Peer, text: str, *, is_change: bool) -> None:
        """Returns when `peer`, with the token `text` or none (empty), may do what it asks.

        Raises:
            NotAllowed: it may not, and why.
            RateLimited: it asked too often.
            AuditFailed: the decision cannot be recorded, so it does not hold.
        """
        is_owner = peer.uid in (0, self._owner)
        if is_owner and not text:
            self._admit_owner(ask, f"uid {peer.uid}", is_change=is_change)
            return
        caller = f"uid {peer.uid}"
        try:
            token = parse(text) if text else None
        except BadToken as error:
            self._check_rate(caller)
            raise self._refuse(ask, caller, (), f"the token is none: {error}") from None
        if token is None:
            self._check_rate(caller)
            why = f"uid {peer.uid} is neither root nor the owner ({self._owner}), and shows no token"
            raise self._refuse(ask, caller, (), why)
        genuine = is_genuine(token, self._key)
        if genuine:  # else anybody could use up somebody's rate, or name whom he likes in the record
            caller = f"token {token.identifier}"
        self._check_rate(caller)
        issued = self._issued.get(token.identifier) if genuine else None
        if issued is None:
            why = "the token was revoked, or never issued here" if genuine else "the token is forged"
            raise self._refuse(ask, caller, (), why)
        chain = (f"uid {issued.by} issued token {issued.identifier} ({issued.label})", *token.caveats)
        self._check_caveats(ask, peer, token, issued, chain)
        if self._audit.trouble:
            raise AuditFailed(f"no decision can be recorded: {self._audit.trouble}")
        if is_change:
            self.allowed += 1
            await self._audit.append(
                Operation.CHECK_PASS, ask.vm, command=ask.command, caller=caller, chain=list(chain)
            )
        else:
            self._record(ask, caller, chain, "")

    def _admit_owner(self, ask: Ask, caller: str, *, is_change: bool) -> None:
        chain = (f"{caller} owns the service",)
        if is_change and not ask.is_frequent:
            self.allowed += 1
            self._tell(ask.command, ask.vm, caller, chain, "", 0)
        else:
            self._record(ask, caller, chain, "", has_share=False)

    def _check_caveats(
        self, ask: Ask, peer: Peer, token: Token, issued: Issued, chain: tuple[str, ...]
    ) -> None:
        now = self._now()
        self._latest = max(self._latest, now.wall)
        if ask.is_for_owner:
            raise self._refuse(
                ask, f"token {token.identifier}", chain, "no token will do, the owner has to ask"
            )
        if issued.end is not None and issued.end.has_come(now):
            raise self._refuse(ask, f"token {token.identifier}", chain, "the token has expired")
        given = Circumstances(self._latest, peer.uid, self._zone_of(ask.vm) if ask.vm else None)
        caveat = violated(token, ask, given)
        if caveat is not None:
            why = f"the token allows {caveat}, and this is {_words(ask, given)}"
            if now.wall < self._latest and caveat.startswith("expires="):
                why += f"; the clock was set back by {self._latest - now.wall:.0f} s, which revives no token"
            raise self._refuse(ask, f"token {token.identifier}", chain, why)

    def _check_rate(self, caller: str) -> None:
        now = trio.current_time()
        bucket = _bucket(self._buckets, caller, RATE, BURST, now)
        if wait := bucket.wait(now):
            raise RateLimited(f"{caller} asks more than {RATE:g} times a second; wait {wait:.2f} s")
        bucket.take(1.0)

    def _refuse(self, ask: Ask, caller: str, chain: tuple[str, ...], why: str) -> NotAllowed:
        self._record(ask, caller, chain, why)
        return NotAllowed(f"{ask.command}: {why}", hint="ask the owner for a token: rayos token create")

    def _record(
        self, ask: Ask, caller: str, chain: tuple[str, ...], why: str, *, has_share: bool = True
    ) -> None:
        """Notes a decision; one that was noted a moment ago is counted, and told with the next of its kind.

        Refusals are of one kind when caller and command are the same: what else they name the caller made up.
        """
        if why:
            self.denied += 1
        else:
            self.allowed += 1
        key = (caller, ask.command, "refused") if why else (caller, ask.command, "", ask.vm)
        now = trio.current_time()
        seen = self._repeats.get(key)
        if seen is not None and now < seen[0] + REPEAT_S:
            seen[1] += 1
            return
        if has_share and not self._take_share(caller, now):
            return
        self._tell(ask.command, ask.vm, caller, chain, why, int(seen[1]) if seen else 0)
        self._repeats[key] = [now, 0]
        self._repeats.move_to_end(key)
        while len(self._repeats) > _REPEATS_MAXIMUM:
            (who, *_), (_, count) = self._repeats.popitem(last=False)
            self._count_beyond(who, int(count))

    def _take_share(self, caller: str, now: float) -> bool:
        bucket = _bucket(self._shares, caller, SHARE_RATE, SHARE_BURST, now)
        if not bucket.wait(now):
            bucket.take(1.0)
            return True
        self._count_beyond(caller, 1)
        return False

    def _count_beyond(self, caller: str, count: int) -> None:
        if count:
            self._beyond[caller] = self._beyond.pop(caller, 0) + count
        while len(self._beyond) > _CALLERS_MAXIMUM:
            self._beyond.popitem(last=False)

    def _tell(
        self, command: str, vm: str, caller: str, chain: tuple[str, ...], why: str, repeated: int
    ) -> None:
        data: dict[str, Any] = {"command": command, "caller": caller, "chain": list(chain)}
        if why:
            data["why"] = why
        if repeated:
            data["repeated"] = repeated
        if beyond := self._beyond.pop(caller, 0):
            data["beyond_share"] = beyond
        operation = Operation.CHECK_FAIL if why else Operation.CHECK_PASS
        self._audit.note(operation, vm, allowed=not why, **data)

    # -- tokens --------------------------------------------------------------------------------------------------

    async def create(
        self, by: int, caveats: list[str], *, label: str = "", ttl_s: float | None = None
    ) -> tuple[str, Issued]:
        """A new token, as text, and what is remembered of it.

        Raises:
            Invalid: a caveat makes no sense, or the time is out of bounds.
            Conflict: there are too many.
            AuditFailed: it could not be recorded, and does not exist.
        """
        if ttl_s is not None and not 0 < ttl_s <= TTL_MAXIMUM:
            raise Invalid(f"a time of {ttl_s:g} s: more than 0 and at most {TTL_MAXIMUM:g} s are allowed")
        now = self._now()
        end = End.after(ttl_s, now) if ttl_s is not None else None
        caveats = caveats + ([f"expires={end.wall:.3f}"] if end else [])
        identifier = secrets.token_hex(8)
        try:
            token = mint(self._key, identifier, caveats)
        except BadToken as error:
            raise Invalid(str(error)) from None
        issued = Issued(
            identifier=identifier, by=by, time=now.wall, label=label, end=end, caveats=token.caveats
        )
        async with self._lock:
            live = {
                name: old for name, old in self._issued.items() if not (old.end and old.end.has_come(now))
            }
            if len(live) >= TOKENS_MAXIMUM:
                raise Conflict(f"there are {len(live)} tokens; at most {TOKENS_MAXIMUM} are allowed")
            await self._audit.append(
                Operation.GRANT, token=identifier, by=by, label=label, caveats=list(token.caveats)
            )
            await self._save({**live, identifier: issued})
        return token.text(), issued

    async def revoke(self, identifier: str) -> Issued:
        """Ends a token and all that were narrowed from it.

        Raises:
            NotFound: there is none of that identifier.
            AuditFailed: it has ended, and that could not be recorded.
        """
        async with self._lock:
            if identifier not in self._issued:
                raise NotFound(f"there is no token {identifier[:40]!r}")
            gone = self._issued.pop(identifier)
            await self._save(self._issued)
            await self._audit.append(Operation.REVOKE, token=identifier, label=gone.label)
        return gone

    def status(self) -> CallerStatus:
        """The tokens that hold, and what was decided since the service started."""
        return CallerStatus(
            tokens=Usage(used=len(self.tokens()), limit=TOKENS_MAXIMUM),
            decisions=Decisions(allowed=self.allowed, denied=self.denied),
        )

    def tokens(self) -> list[Issued]:
        """Those that hold, oldest first."""
        now = self._now()
        return [issued for issued in self._issued.values() if not (issued.end and issued.end.has_come(now))]

    async def _save(self, issued: dict[str, Issued]) -> None:
        await self._store.save_tokens(msgspec.json.encode(list(issued.values())))
        self._issued = issued


def _bucket(
    buckets: OrderedDict[str, TokenBucket], caller: str, rate: float, burst: float, now: float
) -> TokenBucket:
    """The caller's bucket among those of the callers that came last."""
    bucket = buckets.pop(caller, None) or TokenBucket(rate, burst, now=now)
    buckets[caller] = bucket
    while len(buckets) > _CALLERS_MAXIMUM:
        buckets.popitem(last=False)
    return bucket


def _words(ask: Ask, given: Circumstances) -> str:
    where = f" on {ask.vm}" if ask.vm else ""
    zone = f" in zone {given.zone}" if given.zone else ""
    needs = str(ask.needs.name) if ask.needs else "no right"
    return f"{ask.command}{where}{zone} by uid {given.uid}, which needs {needs}"


async def open_gatekeeper(
    store: TokenStore,
    key_path: Path,
    audit: AuditLog,
    *,
    zone_of: Callable[[str], str | None],
    now: Callable[[], Moment],
) -> Gatekeeper:
    """The gatekeeper with the tokens that a former service gave out.

    Raises:
        OSError, Invalid: as `load_key`.
    """
    raw = await store.load_tokens()
    issued = msgspec.json.decode(raw, type=list[Issued]) if raw else []
    key = await trio.to_thread.run_sync(load_key, key_path)
    return Gatekeeper(key, issued, store, audit, zone_of=zone_of, now=now)
