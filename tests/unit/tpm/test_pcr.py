"""PCR arithmetic: replay, banks, selections, and text that names registers."""

from __future__ import annotations

import hashlib

import pytest

from rayos_tpm import pcr

DIGEST = hashlib.sha256(b"kernel").digest()


def test_extend_hashes_old_value_then_digest() -> None:
    """The register's new value is SHA-256(old || digest)."""
    assert pcr.extend(pcr.ZERO, DIGEST) == hashlib.sha256(bytes(32) + DIGEST).digest()


def test_extend_refuses_another_digest_size() -> None:
    """A SHA-1 digest cannot slip into a SHA-256 register."""
    with pytest.raises(ValueError, match="20"):
        pcr.extend(pcr.ZERO, bytes(20))


def test_replay_depends_on_order() -> None:
    """Two logs with the same events in another order are told apart."""
    other = hashlib.sha256(b"initrd").digest()
    assert pcr.replay([(8, DIGEST), (8, other)])[8] != pcr.replay([(8, other), (8, DIGEST)])[8]


def test_dynamic_registers_start_at_ones_and_zero_after_drtm() -> None:
    """17 to 22 are all ones until a D-RTM sequence; then 17 alone takes the digest."""
    bank = pcr.Bank()
    assert all(bank.values[index] == pcr.ONES for index in pcr.DYNAMIC)
    bank.start_dynamic(DIGEST)
    assert bank.values[17] == pcr.extend(pcr.ZERO, DIGEST)
    assert all(bank.values[index] == pcr.ZERO for index in range(18, 23))


def test_selection_bitmap_round_trip() -> None:
    """The reference's example, and back."""
    assert pcr.select_bitmap([0, 4, 8, 9, 10, 11]) == bytes.fromhex("110f00")
    assert pcr.selected(bytes.fromhex("110f00")) == (0, 4, 8, 9, 10, 11)


@pytest.mark.parametrize(("text", "chosen"), [("0", (0,)), ("11,0,8-9", (0, 8, 9, 11)), (" 4 , 4", (4,))])
def test_parse_list(text: str, chosen: tuple[int, ...]) -> None:
    """Lists and ranges are accepted, sorted, without repeats."""
    assert pcr.parse_list(text) == chosen


@pytest.mark.parametrize("text", ["", "x", "24", "9-8", "-1", "8-", "0,,1", "99999999999999999999", "²"])
def test_parse_list_refuses(text: str) -> None:
    """Whatever is no register is refused by ValueError."""
    with pytest.raises(ValueError, match="PCR"):
        pcr.parse_list(text)
