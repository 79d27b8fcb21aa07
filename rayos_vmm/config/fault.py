"""Faults as people and programs write them: `read:error,sector=128,count=1`, or the same as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from rayos_devices.faults import Fault
from rayos_vmm.config.units import Duration, parse_duration
from rayos_vmm.errors import Invalid

EXAMPLE: Final = "read:error,sector=128 or tx:drop,every=3 or write:delay,delay=200ms,probability=0.1"


_Count = Annotated[int, Meta(ge=0)]


class FaultRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """See `rayos_devices.faults.Fault` for what each means."""

    op: Literal["read", "write", "flush", "tx", "rx"]
    action: Literal["error", "delay", "drop", "full"]
    sector: _Count | None = None
    sectors: Annotated[int, Meta(ge=1)] = 1
    nth: _Count = 0
    every: _Count = 0
    probability: Annotated[float, Meta(gt=0, le=1)] = 1.0
    count: _Count = 0
    delay: Duration = "0s"

    def fault(self) -> Fault:
        """The rule, checked.

        Raises:
            Invalid: fields that do not go together, or a value outside of its limits.
        """
        plain = {name: getattr(self, name) for name in self.__struct_fields__ if name != "delay"}
        try:
            return Fault(**plain, delay_s=parse_duration(self.delay))
        except ValueError as error:
            raise Invalid(f"fault {self.op}:{self.action}: {error}", hint=EXAMPLE) from None


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """The rules of one device, as its worker takes them."""

    rules: tuple[dict[str, Any], ...]
    seed: int


def parse_fault(text: str) -> FaultRule:
    """A rule from `OP:ACTION,KEY=VALUE,…`.

    Raises:
        Invalid: it is none; the message says which part.
    """
    head, *pairs = text.split(",")
    op, colon, action = head.partition(":")
    fields: dict[str, str] = {"op": op, "action": action}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or key in fields:
            raise Invalid(f"{pair!r} in fault {text!r} is not KEY=VALUE, once each", hint=EXAMPLE)
        fields[key] = value
    if not colon:
        raise Invalid(f"fault {text!r} does not start with OP:ACTION", hint=EXAMPLE)
    try:
        rule = msgspec.convert(fields, FaultRule, strict=False)
    except msgspec.ValidationError as error:
        raise Invalid(f"fault {text!r}: {error}", hint=EXAMPLE) from None
    rule.fault()
    return rule
