"""Operations on a machine's TPM: what it measured, and quotes that prove it."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from rayos_vmm.api.endpoint import Call, Endpoint
from tpm.event_log import Log
from tpm.protocol import Attestation, Status

_Registers = Annotated[str, Meta(max_length=200, examples=["0,4,8-11"])]
_NONCE_HEX: Final = r"^([0-9a-fA-F]{2}){0,64}$"


class PcrQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which registers, such as `0,4,8-11`; absent means those of the machine's profile."""

    pcrs: _Registers | None = None


class AskQuote(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to quote: the caller's nonce (hexadecimal, up to 64 bytes), and which registers."""

    nonce: Annotated[str, Meta(pattern=_NONCE_HEX)]
    pcrs: _Registers | None = None


class Pcrs(msgspec.Struct, frozen=True, kw_only=True):
    """SHA-256 registers by number, in hexadecimal."""

    pcrs: dict[str, str]


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """One line for each change of a register, then the values that these lead to."""

    lines: list[str]


async def _status(call: Call) -> Status:
    return await call.service.tpm(call.name).status()


async def _pcrs(call: Call) -> Pcrs:
    values = await call.service.tpm(call.name).pcrs(call.query.pcrs)
    return Pcrs(pcrs={str(index): values[index].hex() for index in sorted(values)})


async def _log(call: Call) -> Log:
    return await call.service.tpm(call.name).log()


async def _explain(call: Call) -> Explanation:
    return Explanation(lines=await call.service.tpm(call.name).explain(call.query.pcrs))


async def _quote(call: Call) -> Attestation:
    return await call.service.tpm(call.name).attest(bytes.fromhex(call.body.nonce), call.body.pcrs)


ENDPOINTS: Final = (
    Endpoint(
        "GET", "/v1/vms/{name}/tpm", _status, "A machine's TPM at a glance", answers=Status, is_long=True
    ),
    Endpoint(
        "GET",
        "/v1/vms/{name}/tpm/pcrs",
        _pcrs,
        "The registers as they are now",
        query=PcrQuery,
        answers=Pcrs,
        is_long=True,
    ),
    Endpoint(
        "GET",
        "/v1/vms/{name}/tpm/log",
        _log,
        "What changed the registers since the last reset",
        answers=Log,
        is_long=True,
    ),
    Endpoint(
        "GET",
        "/v1/vms/{name}/tpm/explain",
        _explain,
        "Each change of a register and who caused it",
        query=PcrQuery,
        answers=Explanation,
        is_long=True,
    ),
    Endpoint(
        "POST",
        "/v1/vms/{name}/tpm/quote",
        _quote,
        "A quote, and the log of the same moment",
        body=AskQuote,
        answers=Attestation,
        is_long=True,
    ),
)
