"""The progress of a start, and at its end where the time went."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Final

from rayos_vmm.cli.progress import Progress
from rayos_vmm.events import Event
from rayos_vmm.machine.view import VmView

# A stage that is done, in the service's words: (what it was, what comes next).
STAGES: Final[Mapping[str, tuple[str, str]]] = {
    "images": ("kernel, initramfs, QEMU", "plugging the devices"),
    "devices": ("device worker and tap", "starting the TPM"),
    "tpm": ("TPM", "starting QEMU"),
    "qemu": ("QEMU", "connecting the devices"),
    "running": ("devices connected", "booting the guest"),
    "ready": ("guest booted, address leased", ""),
}
BUILDING: Final[Mapping[str, str]] = {
    "qemu": "looking for a QEMU with all devices, or fetching one",
    "accelerator": "trying the accelerator",
    "guest": "building the guest's kernel and initramfs",
}


async def show_boot(
    events: AsyncIterator[Event], name: str, progress: Progress, *, has_tpm: bool = True
) -> None:
    """Turns the events of a start into stages, until the events end."""
    async for event in events:
        if event.type == "images.building":
            progress.stage(BUILDING.get(str(event.data.get("what")), "preparing"))
        elif event.type == "images.built":
            progress.stage(f"starting {name}")
        elif event.vm == name and event.type == "vm.boot":
            stage = str(event.data.get("stage"))
            _, following = STAGES.get("tpm" if stage == "devices" and not has_tpm else stage, ("", ""))
            if following:
                progress.stage(following)


def boot_table(view: VmView) -> str:
    """Each stage with the time it took and the time since the start; the guest's own figure at the end."""
    lines = [f"{'where the time went (s)':<30}   stage   total"]
    before = 0.0
    done = sorted((ms, key.removesuffix("_ms")) for key, ms in view.boot.items() if key != "guest_ms")
    for ms, stage in done:
        what, _ = STAGES.get(stage, (stage, ""))
        lines.append(f"  {what:<28} {(ms - before) / 1000:>7.2f} {ms / 1000:>7.2f}")
        before = ms
    if "guest_ms" in view.boot:
        lines.append(f"  the guest's own clock at its ready line: {view.boot['guest_ms'] / 1000:.2f}")
    return "\n".join(lines)
