"""Operations on a machine's TPM: what it measured, and quotes that prove it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from rayos_tpm.event_log import Log
from rayos_tpm.nv import POLICY_SIZE
from rayos_tpm.policy import Policy
from rayos_tpm.protocol import Attestation, DeviceInfo, Status
from rayos_vmm.api.endpoint import Call, Endpoint

_Registers = Annotated[str, Meta(max_length=200, examples=["0,4,8-11"])]
_NONCE_HEX: Final = r"^([0-9a-fA-F]{2}){0,64}$"


class PcrQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which registers, such as `0,4,8-11`; absent means those of the machine's profile."""

    pcrs: _Registers | None = None


class AskQuote(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The request for a quote: the caller's nonce (hexadecimal, up to 64 bytes), and the registers."""

    nonce: Annotated[str, Meta(pattern=_NONCE_HEX)]
    pcrs: _Registers | None = None


class Event(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One more event of the host's: what it was, and its SHA-256."""

    description: Annotated[str, Meta(min_length=1, max_length=256)]
    digest: Annotated[bytes, Meta(min_length=32, max_length=32)]


class Extended(msgspec.Struct, frozen=True, kw_only=True):
    """The register that an event went into."""

    pcr: int


class Storage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The policy storage; filled with zeroes to its 256 bytes."""

    data: Annotated[bytes, Meta(max_length=POLICY_SIZE)]


class Secret(msgspec.Struct, frozen=True, kw_only=True):
    """The secret that the TPM had sealed."""

    secret: bytes


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


async def _extend(call: Call) -> Extended:
    return Extended(pcr=await call.service.tpm(call.name).extend(call.body.description, call.body.digest))


async def _read_nv(call: Call) -> Storage:
    return Storage(data=await call.service.tpm(call.name).read_nv())


async def _write_nv(call: Call) -> None:
    await call.service.tpm(call.name).write_nv(call.body.data)


async def _unseal(call: Call) -> Secret:
    return Secret(secret=await call.service.tpm(call.name).unseal())


async def _device(call: Call) -> DeviceInfo:
    return await call.service.tpm(call.name).device()


async def _policy(call: Call) -> Policy:
    return await call.service.tpm(call.name).policy()


def _endpoint(
    method: str,
    path: str,
    handler: Callable[[Call], Awaitable[Any]],
    summary: str,
    *,
    body: type | None = None,
    answers: type | None = None,
) -> Endpoint:
    return Endpoint(
        method, f"/v1/vms/{{name}}/tpm/{path}", handler, summary, body=body, answers=answers, is_long=True
    )


ENDPOINTS: Final = (
    _endpoint(
        "POST", "extend", _extend, "Extend the register of launch events", body=Event, answers=Extended
    ),
    _endpoint("GET", "nv", _read_nv, "The policy storage, which the guest can only read", answers=Storage),
    _endpoint("PUT", "nv", _write_nv, "Write the policy storage", body=Storage),
    _endpoint("POST", "unseal", _unseal, "The secret of the machine's specification", answers=Secret),
    _endpoint("GET", "device", _device, "Vendor, firmware and limits", answers=DeviceInfo),
    _endpoint("GET", "policy", _policy, "The policy that accepts exactly this launch", answers=Policy),
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
