"""`rayos tpm` and `rayos dhcp` as processes, over the service in memory and without one."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import trio

from rayos_tpm.policy import Policy
from rayos_vmm.cli.main import main
from rayos_vmm.config.spec import VmSpec
from tests.unit.api.serving import open_api


async def rayos(directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command as a process whose daemon, if any, is in `directory`."""
    command = [sys.executable, "-P", "-m", "rayos_vmm.cli", *words]
    run = partial(subprocess.run, command, capture_output=True, text=True, timeout=60, check=False)
    environment = {**os.environ, "RAYOS_RUNTIME_DIR": str(directory), "RAYOS_STATE_DIR": str(directory)}
    return await trio.to_thread.run_sync(partial(run, env=environment, cwd=directory))


async def test_a_tpm_in_words_and_in_json(tmp_path: Path) -> None:
    """Each verb prints for people and, with --json, one JSON value."""
    async with open_api(tmp_path) as (client, _):
        await client.create(VmSpec(name="dev"))
        assert "measured" in (await rayos(tmp_path, "tpm", "status", "dev")).stdout
        assert json.loads((await rayos(tmp_path, "tpm", "status", "dev", "--json")).stdout)["inits"] == 1
        pcrs = await rayos(tmp_path, "--json", "tpm", "pcr", "dev", "--pcr", "8-9")
        assert json.loads(pcrs.stdout) == {"8": "00" * 32, "9": "00" * 32}
        assert (b"k" * 32).hex() in (await rayos(tmp_path, "tpm", "log", "dev")).stdout
        assert "host/kernel" in (await rayos(tmp_path, "tpm", "explain", "dev")).stdout
        (tmp_path / "note").write_bytes(b"policy 7")
        written = await rayos(tmp_path, "tpm", "nv", "dev", "--write", "note", "--json")
        assert bytes.fromhex(json.loads(written.stdout)["data"]).rstrip(b"\0") == b"policy 7"
        (tmp_path / "note").write_bytes(bytes(257))
        long = await rayos(tmp_path, "tpm", "nv", "dev", "--write", "note")
        assert (long.returncode, "longer than the 256 bytes" in long.stderr) == (2, True)
        extended = json.loads((await rayos(tmp_path, "tpm", "extend", "dev", "hello", "--json")).stdout)
        assert extended == {"pcr": 11, "sha256": hashlib.sha256(b"hello").hexdigest()}
        assert "IBM" in (await rayos(tmp_path, "tpm", "device", "dev")).stdout
        assert (await rayos(tmp_path, "tpm", "unseal", "dev", "--out", "secret")).returncode == 0
        assert (tmp_path / "secret").read_bytes() == b"secret"
        again = await rayos(tmp_path, "tpm", "unseal", "dev", "--out", "secret")
        assert (again.returncode, "File exists" in again.stderr) == (2, True)
        await rayos(tmp_path, "tpm", "policy", "dev", "--out", "policy.json")
        expected = Policy.from_json((tmp_path / "policy.json").read_bytes()).events
        assert [(event.phase, event.digests) for event in expected] == [("kernel", [(b"k" * 32).hex()])]
        wrong = await rayos(tmp_path, "tpm", "pcr", "dev", "--pcr", "99")
        assert (wrong.returncode, "99" in wrong.stderr) == (2, True)
        damaged = await rayos(tmp_path, "tpm", "quote", "dev", "--nonce", "00", "--json")
        assert damaged.returncode == 5
        assert json.loads(damaged.stderr)["error"]["code"] == "attestation_unavailable"
        assert (await rayos(tmp_path, "tpm", "status", "x")).returncode == 3


async def test_leases_are_shown_and_taken_back(tmp_path: Path) -> None:
    async with open_api(tmp_path) as (client, service):
        assert "leases.bound" in (await rayos(tmp_path, "dhcp", "status")).stdout
        await client.create(VmSpec(name="dev"))
        assert "renewed" in (await rayos(tmp_path, "dhcp", "renew", "dev")).stdout
        lines = (await rayos(tmp_path, "dhcp", "logs")).stdout.splitlines()
        assert [line.split()[1:] for line in lines[1:]] == [
            ["dev", "upstream", "REQUEST", "x2", "answered", "-"],
            ["ray-dev-0", "52:59:00:00:00:01", "DISCOVER", "none:", "port_full", "10.86.0.2"],
        ]
        logs = json.loads((await rayos(tmp_path, "dhcp", "logs", "dev", "--json")).stdout)
        assert logs["clients"]["dev"][0]["xid"] == 8
        assert (await rayos(tmp_path, "dhcp", "logs", "none")).returncode == 3
        released = await rayos(tmp_path, "dhcp", "release", "10.86.0.2", "--json")
        assert json.loads(released.stdout) == {"released": "10.86.0.2"}
        assert service.addresses == []
        assert (await rayos(tmp_path, "dhcp", "release", "10.86.0.2")).returncode == 3
        assert json.loads((await rayos(tmp_path, "dhcp", "leases", "--json")).stdout) == []


async def test_files_that_are_no_quote_are_told(tmp_path: Path) -> None:
    done = await rayos(tmp_path, "tpm", "verify", str(tmp_path / "none"), "--nonce", "00")
    assert (done.returncode, "cannot read" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["tpm", "quote", "dev", "--nonce", "xy"], "is not hexadecimal"),
        (["tpm", "quote", "dev", "--nonce", "00" * 65], "65 bytes; a nonce has up to 64"),
        (["tpm", "verify", "dir"], "--nonce"),
        (["dhcp", "release"], "ADDRESS"),
        (["dhcp", "serve", "--link", "lo"], "--subnet"),
    ],
)
def test_wrong_usage_says_what_is_allowed(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err


def test_serve_is_the_server_of_the_library(capsys: pytest.CaptureFixture[str]) -> None:
    """A link that is not there: its words, its status."""
    status = main(
        ["dhcp", "serve", "--link", "no-such-link", "--subnet", "10.9.0.1/24", "--store", "/dev/null/x"]
    )
    assert status == 1
    assert "rayos dhcp serve:" in capsys.readouterr().err
