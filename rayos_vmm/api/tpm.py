"""Operations on a machine's TPM: what it measured, and quotes that prove it."""

from __future__ import annotations

from rayos_tpm.event_log import Log
from rayos_tpm.policy import Policy
from rayos_tpm.protocol import Attestation, DeviceInfo, Status
from rayos_vmm.api.endpoint import Call, serves
from rayos_vmm.contract import operations
from rayos_vmm.contract.answers import Explanation, Extended, Pcrs, Unsealed
from rayos_vmm.contract.asks import Storage


@serves(operations.TPM_STATUS)
async def _status(call: Call) -> Status:
    return await call.service.guests.tpm(call.name).status()


@serves(operations.TPM_PCRS)
async def _pcrs(call: Call) -> Pcrs:
    values = await call.service.guests.tpm(call.name).pcrs(call.query.pcrs)
    return Pcrs(pcrs={str(index): values[index].hex() for index in sorted(values)})


@serves(operations.TPM_LOG)
async def _log(call: Call) -> Log:
    return await call.service.guests.tpm(call.name).log()


@serves(operations.TPM_EXPLAIN)
async def _explain(call: Call) -> Explanation:
    return Explanation(lines=await call.service.guests.tpm(call.name).explain(call.query.pcrs))


@serves(operations.TPM_QUOTE)
async def _quote(call: Call) -> Attestation:
    return await call.service.guests.tpm(call.name).attest(bytes.fromhex(call.body.nonce), call.body.pcrs)


@serves(operations.TPM_EXTEND)
async def _extend(call: Call) -> Extended:
    return Extended(
        pcr=await call.service.guests.tpm(call.name).extend(call.body.description, call.body.digest)
    )


@serves(operations.TPM_READ_NV)
async def _read_nv(call: Call) -> Storage:
    return Storage(data=await call.service.guests.tpm(call.name).read_nv())


@serves(operations.TPM_WRITE_NV)
async def _write_nv(call: Call) -> None:
    await call.service.guests.tpm(call.name).write_nv(call.body.data)


@serves(operations.TPM_UNSEAL)
async def _unseal(call: Call) -> Unsealed:
    return Unsealed(secret=await call.service.guests.tpm(call.name).unseal())


@serves(operations.TPM_DEVICE)
async def _device(call: Call) -> DeviceInfo:
    return await call.service.guests.tpm(call.name).device()


@serves(operations.TPM_POLICY)
async def _policy(call: Call) -> Policy:
    return await call.service.guests.tpm(call.name).policy()
