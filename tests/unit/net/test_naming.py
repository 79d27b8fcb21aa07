"""rayos_net.naming: the names of a VM's tap and card are valid, its own, and always the same."""

import pytest

from rayos_net import naming


def test_a_short_vm_name_is_readable_in_the_tap_name() -> None:
    """Whoever looks at `ip link` sees which VM a tap belongs to."""
    assert naming.tap_name("web", 0) == "ray-web-0"


@pytest.mark.parametrize(
    "vm", ["a", "web", "a-very-long-machine-name", "Größe", "a/b", "UPPER", "x" * 300, "1-0"]
)
@pytest.mark.parametrize("nic", [0, 9, 99])
def test_every_tap_name_is_valid_and_has_the_prefix(vm: str, nic: int) -> None:
    """The kernel takes the name (15 bytes, no slash or space) and a sweep finds it."""
    name = naming.tap_name(vm, nic)
    assert name.startswith(naming.PREFIX)
    assert len(name.encode()) <= naming.NAME_MAX
    assert not set(name) & set("/: \t")


def test_different_cards_have_different_names_and_addresses() -> None:
    """No two cards share a tap or a MAC, not even where a VM's name ends like a card number."""
    cards = [
        (vm, nic) for vm in ("x", "x-1", "x-1-1", *(f"guest{n}" for n in range(500))) for nic in (0, 1, 11)
    ]
    assert len({naming.tap_name(*card) for card in cards}) == len(cards)
    assert len({naming.mac(*card) for card in cards}) == len(cards)


def test_names_do_not_change_between_versions() -> None:
    """A lease or reservation made by an older version still fits the VM."""
    assert naming.tap_name("a-rather-long-name", 3) == "ray.8ko5rd8c.3"
    assert naming.mac("web") == "52:59:93:e2:15:ca"


def test_a_mac_is_locally_administered_unicast() -> None:
    """Guests never carry a vendor's address, nor a group address."""
    first = int(naming.mac("web", 1).split(":")[0], 16)
    assert first & 0x03 == 0x02


@pytest.mark.parametrize(("vm", "nic"), [("", 0), ("web", -1), ("web", 100)])
def test_nonsense_is_refused(vm: str, nic: int) -> None:
    """An empty name or a card number that would not fit is an error, not a strange link."""
    with pytest.raises(ValueError, match=r"empty|outside"):
        naming.tap_name(vm, nic)
    with pytest.raises(ValueError, match=r"empty|outside"):
        naming.mac(vm, nic)
