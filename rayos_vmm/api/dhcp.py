"""Operations on our DHCP server: what it does, whom it gave addresses, and taking one back."""

from __future__ import annotations

from typing import Any, Final

from rayos_vmm.api.endpoint import Call, Endpoint
from rayos_vmm.api.types import Leases


async def _status(call: Call) -> dict[str, Any]:
    return await call.service.dhcp_status()


async def _leases(call: Call) -> Leases:
    return Leases(leases=await call.service.leases())


async def _release(call: Call) -> None:
    await call.service.release_lease(call.request.path_params["address"])


ENDPOINTS: Final = (
    Endpoint(
        "GET", "/v1/dhcp", _status, "The server, its leases by state, its counters", answers=dict[str, Any]
    ),
    Endpoint("GET", "/v1/dhcp/leases", _leases, "Addresses given out", answers=Leases),
    Endpoint("DELETE", "/v1/dhcp/leases/{address}", _release, "Take a lease back"),
)
