"""`rayos tpm`, `dhcp`, `device`, `optimize` and `top` on a real guest; tpm2-tools judge the quotes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.integration.cli_lab import open_lab

pytestmark = [pytest.mark.guest, pytest.mark.root]

NONCE = "00112233445566778899aabbccddeeff"


def check_quote(directory: Path, nonce: str) -> int:
    """The exit status of tpm2_checkquote, as `rayos tpm quote` tells to call it."""
    words = ["tpm2_checkquote", "-u", "ak.pem", "-m", "quote.msg", "-s", "quote.sig", "-f", "pcrs.tpm2", "-q"]
    return subprocess.run([*words, nonce], cwd=directory, capture_output=True, check=False).returncode


def test_a_guest_is_quoted_explained_and_verified_and_its_lease_taken_back(tmp_path: Path) -> None:
    """A quote of `rayos tpm quote` convinces tpm2_checkquote and `rayos tpm verify`; tampering convinces neither."""
    out, bad = tmp_path / "quote", tmp_path / "bad"
    with open_lab() as lab:
        machine = lab.json("run", "--config", lab.config, "--name", "one", "--detach")
        assert lab.json("tpm", "status", "one")["state"] == "measured"
        registers = lab.json("tpm", "pcr", "one")
        shown = lab.rayos("exec", "one", "--", "cat", "/sys/class/tpm/tpm0/pcr-sha256/8")
        assert registers["8"] == shown.strip().lower()
        assert "kernel vmlinux" in {
            entry["description"] for entry in lab.json("tpm", "log", "one")["entries"]
        }
        assert f"= PCR  8 {registers['8']}" in lab.rayos("tpm", "explain", "one", "--pcr", "8")

        told = lab.json("tpm", "quote", "one", "--nonce", NONCE, "--out", str(out))
        assert told["nonce"] == NONCE and all(Path(path).exists() for path in told["files"])
        assert check_quote(out, NONCE) == 0
        assert check_quote(out, "ff" + NONCE[2:]) != 0
        assert lab.rayos("tpm", "verify", str(out), "--nonce", NONCE) == "verified\n"
        lab.rayos("tpm", "verify", str(out), "--nonce", "00", status=1)
        shutil.copytree(out, bad)
        (bad / "pcrs.bin").write_bytes(bytes((out / "pcrs.bin").stat().st_size))
        lab.rayos("tpm", "verify", str(bad), "--nonce", NONCE, status=1)

        policy, secret = tmp_path / "policy.json", tmp_path / "secret"
        lab.rayos("tpm", "policy", "one", "--out", str(policy))
        checked = ("tpm", "verify", str(out), "--nonce", NONCE, "--policy", str(policy))
        assert lab.rayos(*checked) == "verified\n"
        assert lab.json("tpm", "extend", "one", "a test ran")["pcr"] == 11
        lab.json("tpm", "quote", "one", "--nonce", NONCE, "--out", str(out))
        lab.rayos("tpm", "verify", str(out), "--nonce", NONCE)
        assert "a test ran (launch)" in lab.finish(*checked).stderr
        (tmp_path / "note").write_bytes(b"zone 3, revision 7")
        stored = bytes.fromhex(lab.json("tpm", "nv", "one", "--write", str(tmp_path / "note"))["data"])
        assert stored == b"zone 3, revision 7".ljust(256, b"\0")
        assert lab.json("tpm", "device", "one")["family"] == "2.0"
        refused = lab.finish("tpm", "unseal", "one", "--out", str(secret))
        assert (refused.returncode, "one has no secret" in refused.stderr) == (4, True)

        (card,) = [one for one in lab.json("device", "list") if one["device"] == "net"]
        assert card["vm"] == "one" and card["operations"]["net.tx"]["allowed"] > 0
        assert "net.tx" in lab.rayos("device", "status", "one", "net")
        assert lab.json("device", "quota", "one", "net", "--rate", "10Mbit/s") == {"rate": 1_250_000}
        assert "10Mbit/s" in lab.rayos("device", "quota", "one", "net")
        lab.rayos("device", "quota", "one", "disk9", "--iops", "5", status=3)
        (kept,) = lab.json("device", "stats", "one", "net", "--last", "1")[0]["last"]
        assert kept["operation"].startswith("net.")
        assert lab.json("optimize", "level", "one", "0") == {"vm": "one", "level": 0}
        assert lab.json("optimize", "status", "one")["level"] == 0
        assert lab.json("optimize", "profile", "one")["devices"]["net"]["net.tx"]["firewall"]["p50"] > 0
        assert {one["device"] for one in lab.json("optimize", "stats", "one")} >= {"net", "gpu"}
        measured = lab.json("optimize", "bench")["measured"]
        assert {one["target_ns"] for one in measured} >= {100, 1000} and all(
            one["ns"] > 0 for one in measured
        )
        assert {one["vm"] for one in lab.json("top", "--once", "--interval", "0.2")} == {"one"}

        status = lab.json("dhcp", "status")
        assert (status["serving"], status["leases"]["bound"]) == (True, 1)
        assert machine["address"] in lab.rayos("dhcp", "leases")
        assert lab.json("dhcp", "release", machine["address"]) == {"released": machine["address"]}
        lab.rayos("dhcp", "release", machine["address"], status=3)

        lab.rayos("kill", "one")
        stopped = lab.finish("tpm", "quote", "one", "--out", str(out))
        assert (stopped.returncode, "its TPM runs while it does" in stopped.stderr) == (4, True)
