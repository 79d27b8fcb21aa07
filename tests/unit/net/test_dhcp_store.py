"""rayos_net.dhcp.store: leases come back, and a damaged file does not stop the server."""

import stat
from pathlib import Path

import pytest

from rayos_net.dhcp.binding import FOREVER, Binding, BindingState
from rayos_net.dhcp.store import LeaseStore, StoreError


def lease(ip: int = 0x0A050010, expires: float = 2e9) -> Binding:
    """A lease."""
    return Binding(
        ip, b"\1abcdef", b"abcdef", b"\1abcdef", "web", BindingState.BOUND, expires, 1e9, "ray-web-0"
    )


def test_bindings_come_back_as_they_were(tmp_path: Path) -> None:
    """Every field, also a lease without end and one without identifier or name."""
    written = [
        lease(),
        lease(2, FOREVER),
        Binding(3, b"k", b"abcdef", None, None, BindingState.DECLINED, 5.0, 4.0),
    ]
    with LeaseStore(tmp_path / "l.db") as store:
        store.write(written)
    with LeaseStore(tmp_path / "l.db") as store:
        assert sorted(store.read(), key=lambda one: one.ip) == sorted(written, key=lambda one: one.ip)


def test_the_file_is_private(tmp_path: Path) -> None:
    """Host names and addresses of guests are not for every user (hostile-inputs D8)."""
    with LeaseStore(tmp_path / "l.db"):
        assert stat.S_IMODE((tmp_path / "l.db").stat().st_mode) == 0o600
        assert stat.S_IMODE((tmp_path / "l.db-wal").stat().st_mode) == 0o600


def test_a_second_server_is_refused(tmp_path: Path) -> None:
    """Two servers on one file would give an address twice."""
    with LeaseStore(tmp_path / "l.db"), pytest.raises(StoreError, match="in use by another DHCP server"):
        LeaseStore(tmp_path / "l.db")


@pytest.mark.parametrize("damage", [b"not a database" * 100, b"SQLite format 3\0" + b"\xff" * 4080])
def test_a_damaged_file_is_set_aside(tmp_path: Path, damage: bytes) -> None:
    """The server starts with an empty file and keeps the damaged one for inspection (hostile-inputs D7)."""
    path = tmp_path / "l.db"
    path.write_bytes(damage)
    with LeaseStore(path) as store:
        assert store.set_aside is not None
        assert store.set_aside.read_bytes() == damage
        assert store.read() == []
        store.write([lease()])


def test_a_bad_row_is_skipped_and_counted(tmp_path: Path) -> None:
    """One row that makes no sense costs one lease, not all."""
    with LeaseStore(tmp_path / "l.db") as store:
        store.write([lease(), lease(2)])
        store._connection.execute("UPDATE binding SET state = 'nonsense' WHERE ip = 2")
        assert [one.ip for one in store.read()] == [0x0A050010]
        assert store.skipped == 1


def test_a_directory_that_is_missing_is_one_sentence(tmp_path: Path) -> None:
    """The path and the reason, no traceback of SQLite."""
    with pytest.raises(StoreError, match=r"nowhere/l\.db: No such file or directory"):
        LeaseStore(tmp_path / "nowhere" / "l.db")
