"""TPM and DHCP over the API: what the service says arrives, and wrong questions are refused by name."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from rayos_tpm.event_log import Log
from rayos_tpm.protocol import Attestation, Status, TpmState
from rayos_vmm.config.spec import VmSpec
from rayos_vmm.errors import GuestGone, Invalid, NotFound
from tests.unit.api.serving import open_api


async def test_a_tpm_is_asked_through_the_api(tmp_path: Path) -> None:
    """Status, registers, log, explanation and quote come back as they were, bytes and all."""
    async with open_api(tmp_path) as (client, _):
        await client.create(VmSpec(name="dev"))
        status = msgspec.json.decode(await client.request("GET", "/vms/dev/tpm"), type=Status)
        assert status.state is TpmState.MEASURED
        pcrs = await client.request("GET", "/vms/dev/tpm/pcrs", query={"pcrs": "0,8-9"})
        assert list(msgspec.json.decode(pcrs)["pcrs"]) == ["0", "8", "9"]
        log = msgspec.json.decode(await client.request("GET", "/vms/dev/tpm/log"), type=Log)
        assert log.entries[0].digest == b"k" * 32
        lines = msgspec.json.decode(await client.request("GET", "/vms/dev/tpm/explain"))["lines"]
        assert "kernel vmlinux" in lines[1]
        answer = await client.request("POST", "/vms/dev/tpm/quote", body={"nonce": "0aFF"})
        taken = msgspec.json.decode(answer, type=Attestation)
        assert (taken.bundle.nonce, taken.log) == (b"\x0a\xff", log)


@pytest.mark.parametrize("nonce", ["0", "0g", "00" * 65, "00 00"])
async def test_a_wrong_nonce_is_refused(tmp_path: Path, nonce: str) -> None:
    async with open_api(tmp_path) as (client, _):
        await client.create(VmSpec(name="dev"))
        with pytest.raises(Invalid, match="nonce"):
            await client.request("POST", "/vms/dev/tpm/quote", body={"nonce": nonce})


async def test_errors_of_a_tpm_have_their_own_words(tmp_path: Path) -> None:
    async with open_api(tmp_path) as (client, _):
        await client.create(VmSpec(name="dev"))
        with pytest.raises(NotFound):
            await client.request("GET", "/vms/x/tpm")
        with pytest.raises(Invalid, match="'x' is not a PCR"):
            await client.request("GET", "/vms/dev/tpm/pcrs", query={"pcrs": "0,x"})
        with pytest.raises(GuestGone, match="attestation unavailable") as failed:
            await client.request("POST", "/vms/dev/tpm/quote", body={"nonce": "00"})
        assert failed.value.code == "attestation_unavailable"


async def test_a_lease_is_taken_back(tmp_path: Path) -> None:
    async with open_api(tmp_path) as (client, _):
        assert msgspec.json.decode(await client.request("GET", "/dhcp"))["leases"] == {"bound": 1}
        await client.request("DELETE", "/dhcp/leases/10.86.0.2")
        assert await client.leases() == []
        with pytest.raises(NotFound, match="nobody has a lease"):
            await client.request("DELETE", "/dhcp/leases/10.86.0.2")


async def test_a_lease_is_renewed_and_what_was_said_is_shown(tmp_path: Path) -> None:
    async with open_api(tmp_path) as (client, service):
        await client.create(VmSpec(name="dev"))
        await client.request("POST", "/vms/dev/dhcp/renew")
        assert service.renewed == ["dev"]
        logs = msgspec.json.decode(await client.request("GET", "/dhcp/logs", query={"vm": "dev"}))
        assert [one["why"] for one in logs["server"]] == ["port_full"]
        for method, path, query in (
            ("POST", "/vms/none/dhcp/renew", None),
            ("GET", "/dhcp/logs", {"vm": "none"}),
        ):
            with pytest.raises(NotFound, match="none"):
                await client.request(method, path, query=query)
