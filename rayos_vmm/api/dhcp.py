"""Operations on our DHCP: what the server does, whom it gave addresses, what was said; taking back, renewing."""

from __future__ import annotations

from rayos_vmm.api.endpoint import Call, serves
from rayos_vmm.contract import operations
from rayos_vmm.contract.answers import Leases
from rayos_vmm.network.view import DhcpLogs, DhcpStatus


@serves(operations.DHCP_STATUS)
async def _status(call: Call) -> DhcpStatus:
    return await call.service.dhcp.status()


@serves(operations.DHCP_LEASES)
async def _leases(call: Call) -> Leases:
    return Leases(leases=await call.service.dhcp.leases())


@serves(operations.DHCP_RELEASE)
async def _release(call: Call) -> None:
    await call.service.dhcp.release(call.path["address"])


@serves(operations.DHCP_LOGS)
async def _logs(call: Call) -> DhcpLogs:
    return await call.service.dhcp.logs(call.query.vm)


@serves(operations.DHCP_RENEW)
async def _renew(call: Call) -> None:
    await call.service.dhcp.renew(call.name)
