"""Attestation on a running guest, with tpm2-tools as foreign judges, and what a hostile guest can do about it."""

from __future__ import annotations

import datetime
import subprocess
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
import trio
from cryptography import x509

from rayos_tpm import appraisal, authority, command, files, key, nv, pcr, signature
from rayos_tpm.command import RH_ENDORSEMENT, RH_OWNER, RH_PLATFORM, Code
from rayos_tpm.errors import Unavailable
from rayos_tpm.policy import Policy
from rayos_tpm.protocol import Sealed, TpmState
from rayos_tpm.verify import main
from tests.integration.tpm.machine import APPEND, UUID, Bench, Machine

pytestmark = pytest.mark.guest
OpenBench = Callable[..., AbstractAsyncContextManager[Bench]]
NONCE = bytes.fromhex("00112233445566778899aabbccddeeff")
SECRET = b"only for this launch"


async def tool(*argv: object) -> subprocess.CompletedProcess[bytes]:
    """Run a tpm2 tool that needs no TPM."""
    return await trio.run_process(
        [str(word) for word in argv], check=False, capture_stdout=True, capture_stderr=True
    )


async def check_quote(
    directory: Path, *, nonce: bytes = NONCE, pcrs: str = "pcrs.tpm2", message: str = "quote.msg"
) -> int:
    """tpm2_checkquote's exit status for the files in a directory."""
    result = await tool(
        "tpm2_checkquote", "-u", directory / "ak.pem", "-m", directory / message, "-s", directory / "quote.sig",
        "-q", nonce.hex(), "-f", directory / pcrs,
    )  # fmt: skip
    return result.returncode


def flip(path: Path, at: int) -> Path:
    """A copy of a file with one byte changed."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    copy = path.with_name(f"{path.name}.flipped")
    copy.write_bytes(data)
    return copy


async def test_foreign_judges_agree(open_bench: OpenBench, capsys: pytest.CaptureFixture[str]) -> None:
    """tpm2_checkquote and our verifier accept the quote and both reject a wrong nonce, quote and value. The registers
    that tpm2_eventlog computes from our log are the quoted ones.
    """
    async with open_bench() as bench:
        tpm = await bench.start_tpm()
        async with bench.boot(tpm) as machine:
            await machine.ready()
            taken = await tpm.client.attest(NONCE)
        out = bench.directory / "out"
        files.write_quote(out, taken)
        (out / "policy.json").write_bytes(Policy.from_measurements(bench.measurements()).to_json())

        assert await check_quote(out) == 0
        assert await check_quote(out, nonce=bytes(16)) == 1
        assert await check_quote(out, pcrs=flip(out / "pcrs.tpm2", 4 + 16 * 8 + 4 + 4 + 2).name) == 1
        assert await check_quote(out, message=flip(out / "quote.msg", -1).name) == 1

        flip(out / "pcrs.bin", 8 * 32)

        def ours(nonce: bytes = NONCE, pcrs: str = "pcrs.bin", message: str = "quote.msg") -> int:
            return main([
                "verify", "--log", str(out / "log.json"), "--quote", str(out / message),
                "--sig", str(out / "quote.sig"), "--pcrs", str(out / pcrs), "--nonce", nonce.hex(),
                "--ak", str(out / "ak.pem"), "--policy", str(out / "policy.json"),
            ])  # fmt: skip

        assert ours() == 0
        assert ours(nonce=bytes(16)) == 1
        assert ours(pcrs="pcrs.bin.flipped") == 1
        assert ours(message="quote.msg.flipped") == 1
        said = capsys.readouterr().out.splitlines()
        assert [line.split(":")[0] for line in said] == ["verified", "nonce", "values", "signature"]

        parsed = await tool("tpm2_eventlog", out / "log.bin")
        assert parsed.returncode == 0, parsed.stderr.decode()
        text = parsed.stdout.decode()
        for index, value in taken.bundle.values.items():
            assert f"{index:<2} : 0x{value.hex().upper()}".lower() in text.lower() or value == pcr.ZERO
        assert "kernel vmlinux" in text and APPEND[:20] in text


async def test_changed_artefacts_are_named(open_bench: OpenBench) -> None:
    """A flipped byte in kernel, initrd or command line is reported by name by a verifier who has the files."""
    async with open_bench() as bench:
        expected = Policy.from_measurements(bench.measurements())
        tpm = await bench.start_tpm()
        async with bench.boot(tpm):
            await tpm.client.wait_change(TpmState.WAITING)
            taken = await tpm.client.baseline()
        bundle, log = taken.bundle, taken.log
        signer = signature.public_key(bundle.ak_public)

        def judge(policy: Policy) -> list[str]:
            findings = appraisal.appraise(
                log,
                policy,
                bundle.message,
                bundle.signature,
                signer,
                nonce=bundle.nonce,
                values=bundle.values,
            )
            return [finding.text for finding in findings]

        assert judge(expected) == []
        for at, event in enumerate(expected.events):
            changed = expected.events.copy()
            changed[at] = type(event)(event.phase, event.description, ["00" * 32])
            (found,) = judge(Policy(expected.profile, changed, expected.exclusive))
            assert found.startswith(f"{event.description} ({event.phase}) has SHA-256 {event.digests[0]}")


async def test_endorsement(open_bench: OpenBench) -> None:
    """The EK certificate carries the VM's UUID and verifies with OpenSSL; a credential for AK and EK opens."""
    async with open_bench() as bench:
        tpm = await bench.start_tpm()
        async with bench.boot(tpm) as machine:
            await tpm.client.wait_change(TpmState.WAITING)
            identity = await tpm.client.identity()
            blob, secret = signature.make_credential(
                identity.ek_public, key.name_of(identity.ak_public), NONCE
            )
            assert await tpm.client.activate(blob, secret) == NONCE
            other = signature.make_credential(identity.ek_public, key.name_of(identity.ek_public), NONCE)
            with pytest.raises(Unavailable, match="credential activation"):
                await tpm.client.activate(*other)
            await machine.ready()
            size = len(identity.ek_certificate)
            frame = nv.read(nv.CERTIFICATE_INDEX, size)
            answer = command.checked("NV_Read", await machine.command(frame)).reader().sized()
            assert answer == identity.ek_certificate
        root = bench.directory / "authority" / authority.CERTIFICATE
        authority.check_certificate(
            identity.ek_certificate,
            x509.load_pem_x509_certificate(root.read_bytes()),
            UUID,
            identity.ek_public,
        )
        with pytest.raises(Exception, match="not for VM other"):
            authority.check_certificate(
                identity.ek_certificate, bench.authority.certificate, "other", identity.ek_public
            )
        leaf = bench.directory / "ek.der"
        leaf.write_bytes(identity.ek_certificate)
        pem = await tool("openssl", "x509", "-inform", "der", "-in", leaf, "-out", bench.directory / "ek.pem")
        assert pem.returncode == 0
        verified = await tool("openssl", "verify", "-CAfile", root, bench.directory / "ek.pem")
        assert verified.returncode == 0, verified.stderr.decode()


async def _hurt(machine: Machine) -> dict[str, int]:
    """Tries what a guest's root could against our keys and storage; returns the response codes."""
    attempts = {
        "evict the attestation key": key.evict_control(RH_PLATFORM, key.AK_HANDLE, key.AK_HANDLE),
        "evict it as owner": key.evict_control(RH_OWNER, key.AK_HANDLE, key.AK_HANDLE),
        "undefine the policy": nv.undefine(nv.POLICY_INDEX),
        "overwrite the policy": nv.write(nv.POLICY_INDEX, b"mine"),
        "clear": command.command(Code.Clear, handles=[command.RH_LOCKOUT], auths=[command.password()]),
        "own the endorsement": key.change_auth(RH_ENDORSEMENT, b"mine"),
        "own the storage": key.change_auth(RH_OWNER, b"mine"),
        "extend the kernel's register": command.pcr_extend(8, bytes(32)),
    }
    codes = {}
    for name, frame in attempts.items():
        codes[name] = command.parse_response(await machine.command(frame)).code
    return codes


@pytest.mark.parametrize("firmware", ["qboot", "seabios"])
async def test_hostile_guest_cannot_take_attestation_away(open_bench: OpenBench, firmware: str) -> None:
    """A guest that clears and owns what it can still gets quoted; its extends show; what it broke says so."""
    async with open_bench(firmware) as bench:
        tpm = await bench.start_tpm(nv_policy=b"allow", sealed=Sealed(SECRET, [8, 11]))
        async with bench.boot(tpm) as machine:
            await machine.ready()
            client = tpm.client
            assert await client.unseal([8, 11]) == SECRET
            answer = await machine.command(nv.read(nv.POLICY_INDEX, nv.POLICY_SIZE, authority=RH_OWNER))
            assert command.checked("NV_Read", answer).reader().sized() == nv.pad_policy(b"allow")

            codes = await _hurt(machine)
            for name in (
                "evict the attestation key",
                "evict it as owner",
                "undefine the policy",
                "overwrite the policy",
            ):
                assert codes[name] != 0, name
            assert codes["extend the kernel's register"] == codes["own the endorsement"] == 0

            taken = await client.attest(NONCE)
            bundle, log = taken.bundle, taken.log
            findings = appraisal.appraise(
                log, Policy.from_measurements(bench.measurements()), bundle.message, bundle.signature,
                signature.public_key(bundle.ak_public), nonce=NONCE, values=bundle.values,
            )  # fmt: skip
            assert [finding.code for finding in findings] == [appraisal.Code.EXCLUSIVE]
            assert await client.read_policy() == nv.pad_policy(b"allow")
            with pytest.raises(Unavailable, match="stays sealed"):
                await client.unseal([8, 11])
            identity = await client.identity()
            with pytest.raises(Unavailable, match="credential activation unavailable"):
                blob = signature.make_credential(identity.ek_public, key.name_of(identity.ak_public), NONCE)
                await client.activate(*blob)
            await machine.execute("system_reset")
            await machine.ready()
            assert (await client.status()).state is TpmState.MEASURED
            assert await client.unseal([8, 11]) == SECRET


async def test_host_operations(open_bench: OpenBench) -> None:
    """Extend, policy storage, device information and periodic quotes work beside a running guest."""
    async with open_bench() as bench:
        tpm = await bench.start_tpm(quote_interval_s=0.05)
        async with bench.boot(tpm) as machine:
            await machine.ready()
            client = tpm.client
            assert await client.extend("late event", bytes(32)) == 11
            assert (await machine.pcrs())[11] == (await client.pcrs([11]))[11]
            assert (await client.log()).entries[-1].description == "late event"
            await client.write_policy(b"new")
            assert await client.read_policy() == nv.pad_policy(b"new")
            with pytest.raises(Exception, match="a policy of 257 bytes"):
                await client.write_policy(bytes(257))
            device = await client.device()
            assert (device.family, device.manufacturer) == ("2.0", "IBM")
            status = await client.status()
            assert status.last_quote_at > 0 and status.quote_error == ""
            assert (await client.pcrs()).keys() == set(range(16))


async def test_state_is_encrypted_at_rest(open_bench: OpenBench) -> None:
    """Neither a sealed secret nor policy text nor the state key can be found in files, arguments or environment."""
    async with open_bench() as bench:
        canary = b"CANARY-7b1f"
        tpm = await bench.start_tpm(nv_policy=canary, sealed=Sealed(canary, [8]))
        async with bench.boot(tpm):
            await tpm.client.wait_change(TpmState.WAITING)
            state_key = bench.authority.state_key(UUID)
            swtpm = (await tpm.client.status()).swtpm_pid
            for pid in (tpm.process.pid, swtpm):
                for name in ("cmdline", "environ"):
                    contents = await trio.Path(f"/proc/{pid}/{name}").read_bytes()
                    assert canary not in contents and state_key not in contents
        written = [
            path for path in bench.directory.rglob("*") if path.is_file() and path.stat().st_size < 1 << 20
        ]
        assert any(path.name == "tpm2-00.permall" for path in written)
        for path in written:
            assert canary not in path.read_bytes(), path
        assert (bench.directory / "state-a").stat().st_mode & 0o077 == 0


async def test_authority_refuses_half_and_open_directories(tmp_path: Path) -> None:
    """A lost key is not silently replaced, and keys that others can read are refused."""
    now = datetime.datetime.now(datetime.UTC)
    first = authority.Authority.open(tmp_path / "a", now=now)
    again = authority.Authority.open(tmp_path / "a", now=now)
    assert first.certificate == again.certificate
    assert first.state_key("x") == again.state_key("x") != again.state_key("y")
    (tmp_path / "a" / "master.key").chmod(0o644)
    with pytest.raises(Exception, match="must be private"):
        authority.Authority.open(tmp_path / "a", now=now)
    (tmp_path / "a" / "master.key").unlink()
    with pytest.raises(Exception, match=r"lacks master\.key"):
        authority.Authority.open(tmp_path / "a", now=now)
