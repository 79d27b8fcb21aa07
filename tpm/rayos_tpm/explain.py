"""Each extend joined with its source: a log as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rayos_tpm import event_log, pcr
from rayos_tpm.event_log import Log, TcgEvent


def explain(log: Log, firmware: Sequence[TcgEvent] = (), pcrs: Iterable[int] | None = None) -> list[str]:
    """One line for each change of a register, and then the registers it leads to.

    firmware: the guest firmware's log, decoded; it names what the guest extended.
    pcrs: only these registers; None for all that changed.
    """
    chosen = set(range(pcr.PCR_COUNT)) if pcrs is None else set(pcrs)
    names = event_log.describe_guest(log.entries, firmware)
    lines = [f"VM {log.vm_uuid}, PCR profile {log.profile}"]
    for number, (entry, name) in enumerate(zip(log.entries, names, strict=True)):
        if entry.pcr in chosen:
            what = entry.digest.hex() if entry.digest else "reset to zero".ljust(64)
            who = f"{entry.source}/{entry.phase}" if entry.phase else str(entry.source)
            lines.append(f"{number:4} PCR {entry.pcr:2} {what} {who:18} {_printable(name)}")
    if log.missing:
        lines.append(f"     and {log.missing} more extends by the guest, which were not kept")
    for index, value in event_log.replay(log.entries).items():
        if index in chosen and any(entry.pcr == index for entry in log.entries):
            lines.append(f"   = PCR {index:2} {value.hex()}")
    return lines


def _printable(text: str) -> str:
    """The text without characters that would move a terminal's cursor."""
    return "".join(char if char.isprintable() else "?" for char in text)
