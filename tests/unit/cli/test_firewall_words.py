"""`rayos firewall` as a process, over the service in memory with its real firewall."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rayos_vmm.config.firewall import FirewallConfig
from tests.unit.api.serving import open_api
from tests.unit.cli.test_measurements import rayos
from tests.unit.vmm.test_firewall import GUEST, HOST, MAC, Worker, start

RULES = """
[[rules]]
name = "web"
action = "allow"
direction = "in"
protocol = "tcp"
ports = [80, "8000-8100"]

[[rules]]
name = "quiet"
action = "deny"
to = "vm:other"
priority = 7
audit_only = true
"""


async def test_rules_are_read_changed_and_explained(tmp_path: Path) -> None:
    """Every verb, in words and with --json, each change in force when the command ends."""
    async with open_api(tmp_path) as (_, service):
        service.firewall.define("dev", FirewallConfig(), MAC)
        service.firewall.bind(MAC, GUEST)
        worker = Worker(await start(service.firewall, "dev", tmp_path / "dev"))
        await service.firewall.attach("dev", tmp_path / "dev", worker)
        service.firewall.bind(MAC, GUEST)

        words = ("firewall", "add", "dev", "ssh", "deny", "--protocol", "tcp", "--ports", "22", "--to", HOST)
        added = await rayos(tmp_path, *words, "--json")
        assert json.loads(added.stdout)["revision"] == worker.judge.settings.revision, added.stderr
        again = await rayos(tmp_path, *words)
        assert (again.returncode, "has a rule ssh already" in again.stderr) == (4, True)

        packet = ("out", "tcp", f"{GUEST}:1", "to", f"{HOST}:22")
        explained = await rayos(tmp_path, "firewall", "explain", "dev", *packet)
        assert explained.stdout == "deny: rule ssh of vm:dev [exact]\n"

        (tmp_path / "rules.toml").write_text(RULES)
        assert (
            "in force as revision" in (await rayos(tmp_path, "firewall", "set", "dev", "rules.toml")).stdout
        )
        listed = await rayos(tmp_path, "firewall", "list", "dev")
        lines = listed.stdout.splitlines()
        names = [line.split()[1] for line in lines[1:]]
        assert names[:4] == ["quiet", "web", "host-in", "host-dhcp"] and names[-1] == "isolation"
        assert "deny (audit only)" in lines[1] and "any port 80,8000-8100" in lines[2]
        as_json = json.loads((await rayos(tmp_path, "firewall", "list", "dev", "--json")).stdout)
        assert [(one["origin"], one["hits"]) for one in as_json][:2] == [("vm:dev", 0)] * 2

        assert (await rayos(tmp_path, "firewall", "remove", "dev", "web", "quiet")).returncode == 0
        assert service.firewall.own("dev") == []
        gone = await rayos(tmp_path, "firewall", "remove", "dev", "web")
        assert (gone.returncode, "no rule 'web' of its own" in gone.stderr) == (3, True)

        traced = await rayos(tmp_path, "firewall", "trace", "dev")
        assert traced.stdout == "out tcp 10.0.0.2:1 > 10.0.0.1:22  reject: rule host of default [ranges]\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rules = 3", "rules.toml: rules = 3: expected `array`"),
        ('[[rules]]\nname = "x"\naction = "permit"', "rules.toml: rules[0].action = 'permit'"),
        (
            '[[rules]]\nname = "x"\naction = "deny"\nport = 3',
            "rules.toml: rules[0].port: there is no such key",
        ),
        ("[[", "rules.toml: not TOML"),
    ],
)
async def test_a_wrong_file_is_refused_with_its_key(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "rules.toml").write_text(text)
    refused = await rayos(tmp_path, "firewall", "set", "dev", "rules.toml")
    assert (refused.returncode, words in refused.stderr) == (2, True), refused.stderr
