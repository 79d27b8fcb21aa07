"""Bearer grants that their holder can narrow: an HMAC chain, as macaroons are (Birgisson et al., NDSS 2014).

    signature 0 = HMAC-SHA256(root key, identifier)      signature n = HMAC-SHA256(signature n-1, caveat n)

A holder adds caveats without asking anybody, and cannot take one away: that would need a signature that only the
caveat's own HMAC hides. All caveats have to hold, and one that is not known does not. As text:
`rayos1.<base64url of [identifier, [caveats]]>.<base64url of the last signature>`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

import msgspec

from rayos_vmm.config.spec import is_name
from rayos_vmm.policy.capability import NONE, Capability

KEY_BYTES: Final = 32
CAVEATS_MAXIMUM: Final = 32
CAVEAT_MAXIMUM: Final = 512
TEXT_MAXIMUM: Final = 8192
_PREFIX: Final = "rayos1"
_DOMAIN: Final = b"rayos token 1\0"


class BadToken(ValueError):
    """It is no token, or a caveat makes no sense; the text says why."""


@dataclass(frozen=True, slots=True)
class Ask:
    """The request of a caller: a command such as `policy.grant`, the right that it needs, on which machine.

    `is_within_vm`: it touches nothing but `vm`; `is_for_owner`: no token will do; `is_frequent`: many times a second.
    """

    command: str
    needs: Capability
    vm: str = ""
    is_within_vm: bool = False
    is_for_owner: bool = False
    is_frequent: bool = False


@dataclass(frozen=True, slots=True)
class Circumstances:
    """The circumstances that caveats are judged by: the time (seconds since the epoch), the peer's user, the
    machine's zone.
    """

    wall: float
    uid: int
    zone: str | None


@dataclass(frozen=True, slots=True)
class Token:
    """An identifier, caveats, and the signature over both."""

    identifier: str
    caveats: tuple[str, ...]
    signature: bytes

    def narrowed(self, caveats: Iterable[str]) -> Token:
        """A token that may less. Raises BadToken."""
        signature, added = self.signature, tuple(caveats)
        for caveat in added:
            check_caveat(caveat)
            signature = _mac(signature, caveat.encode())
        if len(self.caveats) + len(added) > CAVEATS_MAXIMUM:
            raise BadToken(f"{len(self.caveats) + len(added)} caveats; at most {CAVEATS_MAXIMUM} are allowed")
        return Token(self.identifier, self.caveats + added, signature)

    def text(self) -> str:
        """As it is handed on."""
        body = msgspec.json.encode([self.identifier, self.caveats])
        return f"{_PREFIX}.{_encode(body)}.{_encode(self.signature)}"


def mint(key: bytes, identifier: str, caveats: Iterable[str] = ()) -> Token:
    """A new token. Raises BadToken."""
    return Token(identifier, (), _mac(key, _DOMAIN + identifier.encode())).narrowed(caveats)


def is_genuine(token: Token, key: bytes) -> bool:
    """Whether it was minted with this key, and narrowed since at most."""
    signature = _mac(key, _DOMAIN + token.identifier.encode())
    for caveat in token.caveats:
        signature = _mac(signature, caveat.encode())
    return hmac.compare_digest(signature, token.signature)


def parse(text: str) -> Token:
    """The token in a text, genuine or not.

    Raises:
        BadToken: it is cut off, or no token at all.
    """
    if len(text) > TEXT_MAXIMUM:
        raise BadToken(f"a token of {len(text)} characters; at most {TEXT_MAXIMUM} are allowed")
    parts = text.strip().split(".")
    if len(parts) != 3 or parts[0] != _PREFIX:
        raise BadToken(f"a token begins with {_PREFIX}. and has three parts")
    try:
        identifier, caveats = msgspec.json.decode(_decode(parts[1]), type=tuple[str, list[str]])
        signature = _decode(parts[2])
    except (ValueError, msgspec.DecodeError) as error:
        raise BadToken(f"it cannot be read: {error}") from None
    if len(signature) != hashlib.sha256().digest_size:
        raise BadToken(f"its signature has {len(signature)} bytes, not {hashlib.sha256().digest_size}")
    if len(caveats) > CAVEATS_MAXIMUM or any(len(caveat) > CAVEAT_MAXIMUM for caveat in caveats):
        raise BadToken(f"more than {CAVEATS_MAXIMUM} caveats, or one longer than {CAVEAT_MAXIMUM} characters")
    return Token(identifier, tuple(caveats), signature)


def check_caveat(caveat: str) -> None:
    """Raises BadToken for one that nobody would understand."""
    key, separator, value = caveat.partition("=")
    if len(caveat) > CAVEAT_MAXIMUM:
        raise BadToken(f"a caveat of {len(caveat)} characters; at most {CAVEAT_MAXIMUM} are allowed")
    if not separator or key not in _JUDGES:
        raise BadToken(f"caveat {caveat[:80]!r}; known are {', '.join(f'{name}=' for name in _JUDGES)}")
    try:
        _CHECKS[key](value)
    except ValueError as error:
        raise BadToken(f"caveat {caveat[:80]!r}: {error}") from None


def violated(token: Token, ask: Ask, given: Circumstances) -> str | None:
    """The first caveat that does not hold; None when all do."""
    for caveat in token.caveats:
        key, _, value = caveat.partition("=")
        try:
            if not _JUDGES[key](value, ask, given):
                return caveat
        except (KeyError, ValueError):
            return caveat  # not known, or nonsense: it does not hold
    return None


def rights(value: str) -> Capability:
    """The rights in `CAP_NET,CAP_AUDIT`; CAP_ADMIN has all. Raises ValueError."""
    found = NONE
    for word in value.split(","):
        if word not in Capability.__members__:
            raise ValueError(f"there is no capability {word!r}; known: {', '.join(Capability.__members__)}")
        found |= Capability[word]
    return Capability(sum(Capability)) if Capability.CAP_ADMIN in found else found


def _in_vm(value: str, ask: Ask, _given: Circumstances) -> bool:
    return ask.is_within_vm and ask.vm in value.split(",")


def _in_zone(value: str, ask: Ask, given: Circumstances) -> bool:
    return ask.is_within_vm and given.zone is not None and given.zone in value.split(",")


def _has_right(value: str, ask: Ask, _given: Circumstances) -> bool:
    return ask.needs in rights(value)


def _is_command(value: str, ask: Ask, _given: Circumstances) -> bool:
    """`policy.grant` names one command, `policy` all of them."""
    return ask.command in value.split(",") or ask.command.split(".")[0] in value.split(",")


def _in_time(value: str, _ask: Ask, given: Circumstances) -> bool:
    return given.wall < float(value)


def _is_user(value: str, _ask: Ask, given: Circumstances) -> bool:
    return given.uid == int(value)


_JUDGES: Final[dict[str, Callable[[str, Ask, Circumstances], bool]]] = {
    "vm": _in_vm,
    "zone": _in_zone,
    "capability": _has_right,
    "command": _is_command,
    "expires": _in_time,
    "uid": _is_user,
}


def _check_names(value: str) -> None:
    for name in value.split(","):
        if not is_name(name):
            raise ValueError(f"{name[:40]!r} is no name")


def _check_commands(value: str) -> None:
    if not all(word.replace(".", "").replace("_", "").isalnum() for word in value.split(",")):
        raise ValueError("commands are written like console,policy.grant")


_CHECKS: Final[dict[str, Callable[[str], object]]] = {
    "vm": _check_names,
    "zone": _check_names,
    "capability": rights,
    "command": _check_commands,
    "expires": float,
    "uid": int,
}


def _mac(key: bytes, data: bytes) -> bytes:
    return hmac.digest(key, data, "sha256")


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    """Raises ValueError also for what `_encode` would have written otherwise: one token has one text."""
    try:
        data = base64.b64decode(text.encode("ascii") + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (UnicodeEncodeError, binascii.Error):
        raise ValueError("a part is not base64url") from None
    if _encode(data) != text:
        raise ValueError("a part is not base64url as it is written")
    return data
