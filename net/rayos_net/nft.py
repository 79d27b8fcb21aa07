"""Scripts for nftables, applied by nft(8) as one transaction each. Shell: blocks about 5 ms.

Invariant: a script takes effect as a whole or not at all.
"""

import subprocess
from collections.abc import Iterable

from rayos_net.firewall import nftables
from rayos_net.guard import Guard

TIMEOUT_SECONDS = 10.0


class NftError(RuntimeError):
    """nft is missing, or the kernel refused a script; the text is its first line of complaint."""


def guard_tap(tap: str, guard: Guard, *, dhcp_per_second: int | None = 50) -> None:
    """Put the spoof guard on the ingress of `tap`. It outlives the tap: call unguard_tap when that is gone."""
    run(nftables.install(tap, guard, dhcp_per_second=dhcp_per_second))


def bind_tap(tap: str, addresses: Iterable[int]) -> None:
    """Let the guest behind `tap` use these IPv4 addresses and no other."""
    run(nftables.bind(tap, addresses))


def unguard_tap(tap: str) -> None:
    """Remove the guard of `tap`, if there is one."""
    run(nftables.remove(tap))


def run(script: str) -> None:
    """Apply a script in this network namespace. Raises NftError."""
    try:
        done = subprocess.run(
            ["nft", "-f", "-"], input=script, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
        )
    except FileNotFoundError as error:
        raise NftError("nft is not installed (Debian: nftables)") from error
    except subprocess.TimeoutExpired as error:
        raise NftError(f"nft did not answer within {TIMEOUT_SECONDS} s") from error
    if done.returncode != 0:
        raise NftError(f"nft: {(done.stderr.splitlines() or ['no reason given'])[0]}")
