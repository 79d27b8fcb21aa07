"""Input over the API: every device's verb arrives, a recording is what was sent, and a replay sends it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from rayos_vmm.config.spec import VmSpec
from rayos_vmm.errors import Invalid
from rayos_vmm.machine.recording import Step
from tests.unit.api.serving import open_api

PRESS = [(1, 30, 1), (0, 0, 0)]
RELEASE = [(1, 30, 0), (0, 0, 0)]


async def test_every_verb_reaches_its_device(tmp_path: Path) -> None:
    async with open_api(tmp_path) as (client, service):
        await client.create(VmSpec(name="dev"))
        assert await client.type_text("dev", "a", layout="fr") == "virtio"
        assert await client.send_key("dev", "ctrl-c") == "ps2"
        await client.pointer("dev", 0.5, 1, ("left",))
        await client.mouse("dev", -3, 4, wheel=1, buttons=("right",))
        await client.touch("dev", [(0, 1), (0.25, 0.5)])
        assert service.inputs["dev"].asked == [
            ("type", "a", "fr"),
            ("press", "ctrl-c"),
            ("point", 0.5, 1, ["left"]),
            ("move", -3, 4, 1, ["right"]),
            ("touch", [(0, 1), (0.25, 0.5)]),
        ]
        assert (await client.input_devices("dev"))[0].leds == ["caps"]
        wrong: list[tuple[Any, str]] = [
            (client.type_text("dev", "a", layout="xx"), "layout"),
            (client.touch("dev", [(0.0, 0.0)] * 9), "points"),
            (client.touch("dev", [(0.0, 1.5)]), "points"),
            (client.mouse("dev", 1 << 20, 0), "dx"),
            (client.input_events("dev", "keyboard", []), "events"),
        ]
        for call, where in wrong:
            with pytest.raises(Invalid, match=where):
                await call


async def test_a_recording_replays_as_it_was(tmp_path: Path) -> None:
    """From the block's beginning nothing is missed; a second recorder hears the replay of the first."""
    async with open_api(tmp_path) as (client, _):
        await client.create(VmSpec(name="dev"))
        with trio.fail_after(10):
            async with client.input_record("dev") as recorded:
                await client.input_events("dev", "keyboard", PRESS)
                await client.input_events("dev", "mouse", RELEASE)
                steps = [await anext(recorded), await anext(recorded)]
            assert [(step.device, step.events) for step in steps] == [("keyboard", PRESS), ("mouse", RELEASE)]
            assert steps[0].t == 0 <= steps[1].t
            async with client.input_record("dev") as again:
                await client.input_replay("dev", steps, speed=100)
                assert [(await anext(again)).device, (await anext(again)).device] == ["keyboard", "mouse"]
        with pytest.raises(Invalid, match="speed"):
            await client.input_replay("dev", [Step(t=0, device="keyboard", events=PRESS)], speed=0)
