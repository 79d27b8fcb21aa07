"""The record's signatures: who can write the file, but has not the key, cannot make another record of it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from rayos_vmm.errors import Invalid
from rayos_vmm.policy.audit import CHECKPOINT_EVERY, Anchor, Chain, Damage, Entry, Operation, verify
from rayos_vmm.policy.audit_key import load_private, public_text, read_public
from rayos_vmm.policy.audit_log import open_audit
from rayos_vmm.policy.audit_segments import read_lines
from rayos_vmm.policy.authority import read_clocks
from tests.unit.policy.lab import open_shell


async def signed(directory: Path, count: int) -> list[bytes]:
    """The lines of a record of so many entries, by the key in `directory`."""
    key = load_private(directory / "audit.key")
    async with open_audit(directory / "audit.log", read_clocks, key.sign) as audit:
        for number in range(count):
            audit.note(Operation.STATE, "a", n=number)
            if number % 100 == 0:
                await audit.sync()
    return list(read_lines(directory / "audit.log"))


def forged(lines: list[bytes], keep: int, *, with_checkpoints: bool) -> list[bytes]:
    """The first records as they were, the others told anew with a right chain and without the key."""
    chain, found = Chain(), []
    for number, line in enumerate(lines):
        entry = msgspec.json.decode(line[65:], type=Entry)
        if number >= keep:
            if entry.op is Operation.CHECKPOINT and not with_checkpoints:
                continue
            entry = msgspec.structs.replace(entry, vm="innocent", seq=chain.anchor.seq + 1)
        found.append(chain.add(entry))
    return found


async def test_a_record_is_signed_as_it_goes_and_at_its_end(tmp_path: Path) -> None:
    lines = await signed(tmp_path, 600)
    key = load_private(tmp_path / "audit.key").public_key()
    found = verify(lines, key=key)
    checkpoints = [number for number, line in enumerate(lines, 1) if b"CHECKPOINT" in line]
    assert checkpoints == [CHECKPOINT_EVERY + 1, 2 * CHECKPOINT_EVERY + 2, 603] and found.signed == 602
    assert (tmp_path / "audit.key").stat().st_mode & 0o777 == 0o600
    lines = await signed(tmp_path, 1)  # another service goes on
    assert verify(lines, key=key).signed == 604 and len(lines) == 605


async def test_a_record_that_was_told_anew_is_found_by_the_key_alone(tmp_path: Path) -> None:
    """The chain of a forgery is whole; its signatures are another's, or missing."""
    lines = await signed(tmp_path, 600)
    key = load_private(tmp_path / "audit.key").public_key()
    for with_checkpoints, seq in ((True, CHECKPOINT_EVERY + 1), (False, 1)):
        other = forged(lines, 100, with_checkpoints=with_checkpoints)
        verify(other)  # as far as the chain can tell
        with pytest.raises(Damage) as caught:
            verify(other, key=key)
        assert caught.value.seq == seq
    other = forged(lines, 300, with_checkpoints=False)
    with pytest.raises(Damage, match="from here on nothing is signed") as caught:
        verify(other, key=key)
    assert caught.value.seq == CHECKPOINT_EVERY + 1
    stranger = load_private(tmp_path / "other.key").public_key()
    with pytest.raises(Damage, match="not by this key"):
        verify(lines, key=stranger)


def test_a_key_is_whole_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "audit.key.new").write_bytes(b"half a k")  # of a service that was killed
    key = load_private(tmp_path / "audit.key")
    assert public_text(load_private(tmp_path / "audit.key").public_key()) == public_text(key.public_key())
    assert not (tmp_path / "audit.key.new").exists()
    (tmp_path / "audit.key").write_bytes(b"rubbish")
    with pytest.raises(Invalid, match="no key"):
        load_private(tmp_path / "audit.key")
    with pytest.raises(Invalid, match="no public key"):
        read_public(b"rubbish")


def test_a_signature_is_of_a_number_and_a_digest() -> None:
    one = Anchor(1, "00" * 32).signed_bytes()
    assert len({one, Anchor(2, "00" * 32).signed_bytes(), Anchor(1, "01" * 32).signed_bytes()}) == 3


async def test_audit_by_commands(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`verify --key` needs nobody's word: it checks what was exported, and finds a byte that was changed."""
    async with open_shell(tmp_path, capfd, monkeypatch) as shell:
        rayos = shell.rayos
        await shell.service.policy.define("a", ["all"])
        public, export = tmp_path / "audit.pub", tmp_path / "export"
        public.write_text(await rayos("audit", "key"))
        assert "BEGIN PUBLIC KEY" in public.read_text()
        assert "unbroken" in await rayos("audit", "verify")
        assert "unbroken" in await rayos("audit", "verify", "--key", str(public))
        data = await rayos("audit", "export")
        export.write_text(data)
        assert "unbroken" in await rayos("audit", "verify", "--key", str(public), "--file", str(export))
        export.write_text(data.replace('"vm":"a"', '"vm":"b"', 1))
        assert "record 1, at byte 0" in await rayos("audit", "verify", "--file", str(export), status=1)
        assert "no public key" in await rayos("audit", "verify", "--key", str(export), status=2)
        assert "DEFINE" in await rayos("audit", "list")
