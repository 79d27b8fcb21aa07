"""`rayos display`, `input`, `console --list` and `logs` as processes, over the service in memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import trio

from rayos_vmm.config.spec import VmSpec
from tests.unit.api.serving import open_api
from tests.unit.cli.test_measurements import rayos

LIMIT_S = 30


async def test_monitors_in_words_and_in_json(tmp_path: Path) -> None:
    """Modes, pictures, what changed, another mode; a picture with its cursor; no change is status 124."""
    async with open_api(tmp_path) as (client, service):
        await client.create(VmSpec(name="dev"))
        shown = (await rayos(tmp_path, "display", "show", "dev")).stdout.splitlines()
        assert shown[0].split() == ["SCANOUT", "MODE", "PICTURE", "CURSOR"]
        assert shown[2].split() == ["1", "640x480", "off", "-"]
        damage = await rayos(tmp_path, "display", "damage", "dev", "--since", "6", "--scanout", "1", "--json")
        assert json.loads(damage.stdout)["width"] == 3
        late = await rayos(tmp_path, "display", "damage", "dev", "--scanout", "1", "--timeout", "1s")
        assert (late.returncode, "nothing changed" in late.stderr) == (124, True)
        assert (
            await rayos(tmp_path, "display", "resize", "dev", "1920x1080", "--scanout", "1")
        ).returncode == 0
        assert service.resized == [(1920, 1080, 1)]
        wrong = await rayos(tmp_path, "display", "resize", "dev", "1920x9999")
        assert (wrong.returncode, "64 to 4095" in wrong.stderr) == (2, True)
        await rayos(tmp_path, "screenshot", "dev", "shot.png", "--cursor", "--scanout", "1")
        assert (tmp_path / "shot.png").read_bytes() == b"\x89PNG\1\1"


async def test_input_is_used_recorded_and_replayed(tmp_path: Path) -> None:
    """A click is a press and a release; a recording is whole when Ctrl-C ends it, and replays as it was."""
    async with open_api(tmp_path) as (client, service):
        await client.create(VmSpec(name="dev"))
        assert "caps" in (await rayos(tmp_path, "input", "show", "dev")).stdout
        await rayos(tmp_path, "input", "point", "dev", "0.5", "1", "--click", "left")
        await rayos(tmp_path, "input", "mouse", "dev", "3", "-4", "--hold", "right")
        await rayos(tmp_path, "input", "touch", "dev", "0.5,0.25")
        asked = service.inputs["dev"].asked
        assert asked == [
            ("point", 0.5, 1, ["left"]),
            ("point", 0.5, 1, []),
            ("move", 3, -4, 0, ["right"]),
            ("touch", [(0.5, 0.25)]),
            ("touch", []),
        ]
        recorder = await trio.lowlevel.open_process(
            [sys.executable, "-P", "-m", "rayos_vmm.cli", "input", "record", "dev", "keys.jsonl"],
            stderr=subprocess.PIPE,
            cwd=tmp_path,
            env={**os.environ, "RAYOS_RUNTIME_DIR": str(tmp_path)},
        )
        with trio.fail_after(LIMIT_S):
            assert recorder.stderr is not None
            said = b""
            while b"Ctrl-C ends it" not in said:
                said += await recorder.stderr.receive_some()
            await client.input_events("dev", "keyboard", [(1, 30, 1)])
            await client.input_events("dev", "keyboard", [(1, 30, 0)])
            while (tmp_path / "keys.jsonl").read_bytes().count(b"\n") < 3:  # noqa: ASYNC110 (another process writes)
                await trio.sleep(0.02)
            recorder.send_signal(signal.SIGINT)
            await recorder.wait()
            await recorder.stderr.aclose()
        async with client.input_record("dev") as again:
            done = await rayos(tmp_path, "input", "replay", "dev", "keys.jsonl", "--speed", "100", "--json")
            assert json.loads(done.stdout) == {"steps": 2}
            assert [(await anext(again)).events, (await anext(again)).events] == [[(1, 30, 1)], [(1, 30, 0)]]
        (tmp_path / "bad").write_text("{}")
        bad = await rayos(tmp_path, "input", "replay", "dev", "bad")
        assert (bad.returncode, "does not begin with" in bad.stderr) == (2, True)


async def test_consoles_are_listed_and_their_past_has_times(tmp_path: Path) -> None:
    async with open_api(tmp_path) as (client, service):
        await client.create(VmSpec(name="dev"))
        await service.guests.console_write("dev", 2, b"one\n\xfftwo")
        async with client.console("dev", 0):
            listed = (await rayos(tmp_path, "console", "dev", "--list")).stdout
            assert "process" in listed and listed.splitlines()[0].split()[:2] == ["PORT", "NAME"]
            typed = await rayos(tmp_path, "console", "dev")
            assert (typed.returncode, "writes on this console" in typed.stderr) == (4, True)
        stamped = (await rayos(tmp_path, "logs", "dev", "--timestamps", "--json")).stdout.splitlines()
        assert [json.loads(line)["offset"] for line in stamped] == [0]
        cast_lines = (await rayos(tmp_path, "logs", "dev", "--format", "asciicast")).stdout.splitlines()
        head, *moments = [json.loads(line) for line in cast_lines]
        assert (head["version"], head["width"]) == (2, 80)
        assert b"".join(text.encode("utf-8", "surrogateescape") for _, _, text in moments) == b"one\n\xfftwo"
        nowhere = await rayos(tmp_path, "logs", "dev", "--port", "org.none")
        assert (nowhere.returncode, "it has org.rayos.console" in nowhere.stderr) == (3, True)
