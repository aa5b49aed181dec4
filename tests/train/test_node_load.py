"""What the nodes do, as it is logged."""

from __future__ import annotations

import time

import pytest
import torch

from fleetune.train.distributed import World
from fleetune.train.node_load import node_load


def test_the_figures_are_those_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    world = World(0, 1, 0, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    node_load(world)
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        torch.ones(64, 64, device=world.device).sum()
    load = node_load(world)
    assert {"nodes/0/cpu_percent", "nodes/0/memory_percent"} <= load.keys()
    assert all(0 < value <= 100 for value in (load["nodes/0/cpu_percent"], load["nodes/0/memory_percent"]))
    assert ("nodes/0/gpu_memory_percent" in load) is (world.device.type == "cuda")
    assert all(0 <= value <= 100 for value in load.values())


def test_of_many_nodes_the_spread_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("NODE_RANK", "3")
    monkeypatch.setattr("fleetune.train.node_load.sum_over_ranks", lambda table: table)  # the other nodes' rows stay 0
    load = node_load(World(3, 40, 0, torch.device("cpu")))
    assert {key.split("/")[1] for key in load} == {"least", "most", "mean"}
    assert load["nodes/least/memory_percent"] == 0.0
    assert load["nodes/most/memory_percent"] > 0.0
