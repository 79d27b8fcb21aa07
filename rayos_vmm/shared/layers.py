"""How many frames each layer of a guest's firewall decided: what a hit rate is of.

A frame is decided by the first that knows: the device's `cache` of verdicts, the judge's `flow` table, as a `reply` to
an allowed flow, then the compiled rules (`deny_list`, `exact`, `ranges`, else `default`). `guard` is all else: what the
spoof guard or the parser refused or let through without a rule, such as ARP.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

_JUDGED: Final = ("flow", "reply", "deny_list", "exact", "ranges", "default")
LAYERS: Final = ("cache", *_JUDGED, "guard")


def layers(firewall: Mapping[str, Any]) -> dict[str, int]:
    """Of LAYERS, from what a card's snapshot says of its firewall."""
    cache, judged = firewall["cache"], {layer: firewall["layers"][layer] for layer in _JUDGED}
    rest = cache["asked"] + cache["offload"] - sum(judged.values())
    return {"cache": cache["remembered"], **judged, "guard": max(0, rest)}


def hit_ratio(counts: Mapping[str, int]) -> dict[str, float]:
    """Each layer's share of all frames, 0 to 1; 0 when there were none."""
    frames = sum(counts.values())
    return {layer: count / frames if frames else 0.0 for layer, count in counts.items()}
