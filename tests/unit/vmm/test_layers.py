"""Which layer of a guest's firewall decided is counted, as a share too, and on through a worker's death."""

import os
from pathlib import Path

import pytest

from rayos_devices.net.backend import NetBackend
from rayos_vmm.shared import accounts
from rayos_vmm.shared.accounts import LAYERS, AccountReader, AccountWriter, hit_ratio, layers
from tests.framework.target import Rig, Stepped
from tests.framework.wire import Wire
from tests.hostile.test_net_filter import OUTSIDE, firewall, send
from tests.unit.net.frames import GUEST, arp, ether, tcp


def test_each_frame_has_one_layer_and_counts_outlive_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accounts, "PERIOD", 0.0)
    fd = accounts.create(tmp_path, 1)
    reader = AccountReader(tmp_path)
    for life, again in enumerate((False, True), 1):
        with (
            Stepped(lambda loop: NetBackend("net", loop, Wire(), judge=firewall())) as net,
            Rig(net, 2) as rig,
        ):
            AccountWriter(fd if again else os.dup(fd), [net.backend], net.loop)
            for frame in (
                *[ether(tcp(GUEST, 1, OUTSIDE, 80))] * 5,  # no rule: the default, then four times from memory
                ether(tcp(GUEST, 1, OUTSIDE, 25)),  # a rule of exact fields, alone of its shape
                arp(GUEST, OUTSIDE),
                ether(tcp("10.9.9.9", 1, OUTSIDE, 80)),  # spoofed
            ):
                send(rig, frame)
            rig.settle()
            own = layers(net.backend.snapshot()["firewall"])
            assert own == dict.fromkeys(LAYERS, 0) | {"cache": 4, "default": 1, "ranges": 1, "guard": 2}
        assert reader.layers() == {layer: life * count for layer, count in own.items()}
    assert hit_ratio(reader.layers())["cache"] == 0.5
    assert hit_ratio(dict.fromkeys(LAYERS, 0))["cache"] == 0.0
