"""Operations on our DHCP: what the server does, whom it gave addresses, what was said; taking back, renewing."""

from __future__ import annotations

from typing import Any, Final

from rayos_vmm.api.endpoint import Call, Endpoint
from rayos_vmm.contract.types import GrantsQuery, Leases


async def _status(call: Call) -> dict[str, Any]:
    return await call.service.dhcp_status()


async def _leases(call: Call) -> Leases:
    return Leases(leases=await call.service.leases())


async def _release(call: Call) -> None:
    await call.service.release_lease(call.request.path_params["address"])


async def _logs(call: Call) -> dict[str, Any]:
    return await call.service.dhcp_logs(call.query.vm)


async def _renew(call: Call) -> None:
    await call.service.renew_lease(call.name)


ENDPOINTS: Final = (
    Endpoint(
        "GET", "/v1/dhcp", _status, "The server, its leases by state, its counters", answers=dict[str, Any]
    ),
    Endpoint("GET", "/v1/dhcp/leases", _leases, "Addresses given out", answers=Leases),
    Endpoint("DELETE", "/v1/dhcp/leases/{address}", _release, "Take a lease back"),
    Endpoint(
        "GET",
        "/v1/dhcp/logs",
        _logs,
        "The server's last exchanges, and the last transactions of machines' upstream clients",
        query=GrantsQuery,
        answers=dict[str, Any],
    ),
    Endpoint("POST", "/v1/vms/{name}/dhcp/renew", _renew, "Renew a machine's upstream lease now"),
)
