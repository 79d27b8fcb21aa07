"""A verifier's expectation of a launch: events in order, not golden register values.

A policy is made from the files that a VM boots, by anybody who has them. It names, for each phase, the
digests that are accepted; the log of a launch has to show these events in this order and no others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import msgspec

from rayos_tpm import pcr
from rayos_tpm.errors import MalformedMessage
from rayos_tpm.event_log import Log, Source
from rayos_tpm.measurement import Measurement, in_order
from rayos_tpm.phase import ORDER, PROFILES, Phase, profile_named

_EXCLUSIVE = {"seed": [8, 11], "host-reserved": [17]}


class Expected(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One event. digests: the accepted SHA-256 values in hexadecimal. is_optional: the event may be absent."""

    phase: str
    description: str
    digests: list[str]
    is_optional: bool = False


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """profile: the PCR profile. events: in phase order. exclusive: registers that the guest must not change."""

    profile: str
    events: list[Expected]
    exclusive: list[int]

    @classmethod
    def from_measurements(cls, measurements: Sequence[Measurement], *, profile: str = "seed") -> Self:
        """The policy that accepts exactly these measurements."""
        events = [
            Expected(str(item.phase), item.description, [item.digest.hex()])
            for item in in_order(measurements)
        ]
        return cls(profile_named(profile).name, events, _EXCLUSIVE[profile])

    @classmethod
    def from_log(cls, log: Log) -> Self:
        """The policy that accepts exactly the host's events of this log."""
        events = [entry for entry in log.entries if entry.source is Source.HOST]
        if PROFILES[log.profile].is_dynamic:
            events = events[1:]  # the D-RTM sequence itself
        measured = [Measurement(Phase(one.phase), one.description, one.digest) for one in events]
        return cls.from_measurements(measured, profile=log.profile)

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """MalformedMessage: not a policy; the message names the field."""
        try:
            policy = msgspec.json.decode(data, type=cls)
        except (msgspec.DecodeError, ValueError) as error:
            raise MalformedMessage(f"not a policy: {error}") from None
        if policy.profile not in PROFILES:
            raise MalformedMessage(
                f"the policy's profile {policy.profile!r} is unknown: {', '.join(PROFILES)}"
            )
        for event in policy.events:
            if event.phase not in ORDER:
                raise MalformedMessage(
                    f"the policy's phase {event.phase!r} is unknown; known are {', '.join(ORDER)}"
                )
            for digest in event.digests:
                if len(digest) != 2 * pcr.DIGEST_SIZE or not set(digest) <= set("0123456789abcdef"):
                    raise MalformedMessage(
                        f"the policy's digest {digest[:80]!r} of {event.description} is not SHA-256 in hexadecimal"
                    )
        if any(not 0 <= index < pcr.PCR_COUNT for index in policy.exclusive):
            raise MalformedMessage(f"the policy's exclusive registers {policy.exclusive} are not all 0 to 23")
        return policy

    def to_json(self) -> bytes:
        """The policy for a file."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n"

    def allowed(self) -> dict[Phase, list[bytes]]:
        """The digests by phase, as start_tpm refuses all others."""
        found: dict[Phase, list[bytes]] = {phase: [] for phase in ORDER}
        for event in self.events:
            found[Phase(event.phase)] += [bytes.fromhex(digest) for digest in event.digests]
        return found
