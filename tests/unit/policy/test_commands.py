"""`rayos policy` and `rayos zone` against a daemon's policy."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayos_vmm.policy.hierarchy import Place
from tests.unit.policy.lab import open_shell

DOCUMENT = """
[zone.lab.rules.no-mail]
kind = "firewall"
action = "deny"
protocol = "tcp"
ports = 25
[zone.lab.rules.slow]
kind = "resource"
net_rate = "10Mbit/s"
[zone.lab.rules.no-gpu]
kind = "capability"
deny = ["CAP_GPU"]
"""


async def test_a_policy_and_zones_by_commands(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each verb does what it says; what `show` prints is what `apply` takes."""
    file = tmp_path / "policy.toml"
    file.write_text(DOCUMENT)
    async with open_shell(tmp_path, capfd, monkeypatch) as shell:
        rayos = shell.rayos
        await shell.service.policy.define("a", ["all"], Place())
        await rayos("zone", "create", "lab")
        assert await rayos("zone", "assign", "a", "lab") == "+ vm.a\nrevision 2 is in force\n"
        assert (await rayos("policy", "diff", str(file))).splitlines()[0] == "- vm.a"
        file.write_text(DOCUMENT + '[vm.a]\nzone = "lab"\n')
        assert (await rayos("policy", "diff", str(file))).splitlines() == [
            f"+ zone.lab.rules.{name}" for name in ("no-gpu", "no-mail", "slow")
        ]
        assert "revision 3 is in force" in await rayos("policy", "apply", str(file), "--reason", "quiet")
        said = await rayos("policy", "explain", "a")
        assert "CAP_GPU        deny      denied by zone:lab/no-gpu" in said
        assert "net_rate  10Mbit/s  zone:lab/slow" in said
        assert "100       deny    no-mail        zone:lab" in said
        shown = await rayos("policy", "show")
        file.write_text(shown)
        assert await rayos("policy", "apply", str(file)) == "no change\nrevision 3 is in force\n"
        assert (await shell.json("zone", "list"))[0] == {"zone": "lab", "rules": 3, "vms": ["a"]}
        assert "vm.a.zone = 'lab'" in await rayos("zone", "rm", "lab", status=2)
        assert "- zone.lab.rules.slow" in await rayos("policy", "rollback", "1")
        assert [entry["number"] for entry in await shell.json("policy", "history")] == [1, 2, 3, 4]
        assert "quiet" in await rayos("policy", "history")
        await rayos("zone", "rm", "lab")
        file.write_text("[zone.lab]\nrule = 1\n")
        assert "zone.lab.rule: there is no such key" in await rayos("policy", "apply", str(file), status=2)
        file.write_text("[")
        assert f"{file}: not TOML" in await rayos("policy", "apply", str(file), status=2)
        assert "cannot be read" in await rayos("policy", "apply", str(tmp_path / "none"), status=2)
        assert "no machine 'b'" in await rayos("policy", "explain", "b", status=3)


async def test_scalability_shows_tree_zones_and_who_lags(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that cannot be reached lags, by name, in its zone."""
    monkeypatch.setattr("rayos_vmm.policy.revisions.APPLY_TIMEOUT_S", 0.1)
    async with open_shell(tmp_path, capfd, monkeypatch) as shell:
        policy, revisions = shell.service.policy, shell.service.revisions
        await revisions.create_zone("lab")
        await policy.define("a", ["all"], Place(zone="lab"))
        await policy.define("b", ["all"], Place(parent="a"))
        revisions.broadcaster.attach("b", tmp_path / "nowhere")
        await revisions.create_zone("other")
        status = await shell.json("scalability", "status")
        assert (status["revision"], status["vms"], status["zones"], status["lagging"]) == (2, 2, 2, ["b"])
        assert status["broadcasts"] == 2 and status["queue_maximum"] == 512
        assert not status["balance"]["automatic"]["on"] and status["balance"]["imbalance"] == 0
        assert "workers are moved" in await shell.rayos("scalability", "auto", "on")
        assert (await shell.json("scalability", "status"))["balance"]["automatic"]["on"]
        rows = (await shell.rayos("scalability", "vms")).splitlines()
        assert rows[1].split()[:2] == ["a", "lab"] and rows[2].startswith("  b      lab ")
        assert "cannot be reached" in rows[2] and "not running" in rows[1]
        assert (await shell.rayos("scalability", "zones")).splitlines()[1].split() == ["lab", "0", "2", "b"]


async def test_constraints_by_commands(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The words given to `grant` and `delegate` are those that `grants` shows."""
    async with open_shell(tmp_path, capfd, monkeypatch) as shell:
        rayos = shell.rayos
        for vm in "ab":
            await shell.service.policy.define(vm, [], Place())
        said = await rayos(
            "grant", "a", "net", "--ports", "80,8000-8100", "--bandwidth", "10Mbit/s", "--audit"
        )
        assert "ports=80,8000-8100 bandwidth=10Mbit/s audit" in said
        await rayos("delegate", "a", "b", "net", "--bandwidth", "1Mbit/s")
        assert "ports=80,8000-8100 bandwidth=1Mbit/s audit" in await rayos("grants", "b")
        assert "within these constraints" in await rayos(
            "delegate", "a", "b", "net", "--ports", "22", status=4
        )
        assert "ports limit CAP_NET" in await rayos("grant", "a", "gpu", "--ports", "80", status=4)
        assert "constraints.ports[0] = 'http'" in await rayos(
            "grant", "a", "net", "--ports", "http", status=2
        )


async def test_security_at_a_glance(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts beside their limits; grants, delegations and constraints apart; the last decisions."""
    async with open_shell(tmp_path, capfd, monkeypatch) as shell:
        rayos = shell.rayos
        for vm in "ab":
            await shell.service.policy.define(vm, [], Place())
        await rayos("grant", "a", "net", "gpu", "--reason", "plain")
        await rayos("grant", "a", "input", "--audit", "--reason", "watched")
        await rayos("delegate", "a", "b", "gpu")
        status = await shell.json("security", "status")
        assert [
            (status[what]["used"], status[what]["limit"]) for what in ("grants", "delegations", "constraints")
        ] == [
            (2, 256),
            (1, 128),
            (1, 512),
        ]
        assert (status["zones"]["limit"], status["machines"], status["tokens"]["limit"]) == (
            16,
            {"used": 2, "limit": 64},
            256,
        )
        assert status["firewall_rules"]["limit"] == 2048 and status["audit"]["trouble"] == ""
        assert status["decisions"]["allowed"] >= 4
        said = await rayos("security", "grants")
        assert "plain" in said and "watched" in said and "delegation" not in said
        assert "from a" in await rayos("security", "delegations")
        said = await rayos("security", "constraints")
        assert "watched" in said and "plain" not in said
        assert len(await shell.json("security", "audit", "-n", "3")) == 2  # records, and how many are lost
        assert "policy.delegate" in await rayos("security", "audit")
