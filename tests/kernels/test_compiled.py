"""Every kernel compiles ahead of time for four architectures, and spills nothing at the settings it has there."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ARCHITECTURES = {"sm_80", "sm_90", "sm_100", "gfx942"}


@pytest.fixture(scope="module")
def usages() -> list[dict[str, Any]]:
    """In a process of its own: here the kernels are interpreted, and an interpreted one has no binary."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "kernels")
    command = [sys.executable, str(ROOT / "kernels" / "benchmarks" / "compiled.py"), "--json"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=850, check=False)
    assert ended.stdout, ended.stderr
    found: list[dict[str, Any]] = json.loads(ended.stdout)
    return found


def kernels_in_the_package() -> Iterator[str]:
    """The names of the functions that are launched: those that no other kernel calls."""
    for file in (ROOT / "kernels" / "fleetune_kernels" / "triton").glob("*.py"):
        lines = file.read_text(encoding="utf-8").splitlines()
        for decorator, line in itertools.pairwise(lines):
            if decorator == "@triton.jit" and line.startswith("def ") and line.split("(")[0].endswith("_kernel"):
                yield line.split("(")[0].removeprefix("def ")


@pytest.mark.slow
def test_every_architecture_has_every_variant(usages: list[dict[str, Any]]) -> None:
    by_architecture: dict[str, set[str]] = {}
    for usage in usages:
        by_architecture.setdefault(usage["architecture"], set()).add(usage["name"])
    assert by_architecture.keys() == ARCHITECTURES
    assert len({frozenset(names) for names in by_architecture.values()}) == 1


@pytest.mark.slow
def test_every_kernel_of_the_package_is_among_them(usages: list[dict[str, Any]]) -> None:
    launched = set(kernels_in_the_package())
    assert launched
    assert launched == {usage["kernel"] for usage in usages}


@pytest.mark.slow
def test_nothing_spills(usages: list[dict[str, Any]]) -> None:
    print(f"\n{'kernel':<52} {'target':<8} {'registers':>9} {'shared':>8} {'spilled':>8}")
    for u in usages:
        print(f"{u['name']:<52} {u['architecture']:<8} {u['registers']:>9} {u['shared']:>8} {u['spilled']:>8}")
        assert u["registers"] > 0
    assert not [(u["name"], u["architecture"], u["spilled"]) for u in usages if u["spilled"]]
