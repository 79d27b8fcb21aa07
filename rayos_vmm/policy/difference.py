"""The differences of two policy documents, by path."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from rayos_vmm.policy.document import Document


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One path, such as `zone.lab.rules.slow`: added, removed, or with another value."""

    path: str
    what: Literal["added", "removed", "changed"]
    before: Any = None
    after: Any = None


def _parts(document: Document) -> dict[str, Any]:
    parts: dict[str, Any] = {f"host.rules.{name}": rule for name, rule in document.host.rules.items()}
    for zone, level in document.zone.items():
        parts[f"zone.{zone}"] = {}
        parts |= {f"zone.{zone}.rules.{name}": rule for name, rule in level.rules.items()}
    for vm, member in document.vm.items():
        parts[f"vm.{vm}"] = {"zone": member.zone, "parent": member.parent}
        parts |= {f"vm.{vm}.rules.{name}": rule for name, rule in member.rules.items()}
    return {path: msgspec.to_builtins(part) for path, part in parts.items()}


def difference(before: Document, after: Document) -> list[Change]:
    """Every path that differs, in the order of the paths."""
    old, new = _parts(before), _parts(after)
    return [
        Change(
            path=path,
            what="added" if path not in old else "removed" if path not in new else "changed",
            before=old.get(path),
            after=new.get(path),
        )
        for path in sorted({*old, *new})
        if path not in old or path not in new or old[path] != new[path]
    ]
