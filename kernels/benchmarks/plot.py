"""Draws what `run.py` has recorded: time and memory of each op and its peers, to eager PyTorch.

python kernels/benchmarks/plot.py --device cpu      # writes results/cpu.svg
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"


def ratios(case: dict[str, Any], of: str) -> dict[str, float]:
    """Each side's time, or memory, to eager's."""
    sides = {name: figures for name, figures in case["sides"].items() if figures.get("seconds")}

    def value(name: str) -> float:
        figures = sides[name]
        return float(statistics.median(figures["seconds"]) if of == "time" else max(0.1, figures["memory_mb"]))

    return {name: value(name) / value("eager") for name in sides} if "eager" in sides else {}


def draw(device: str) -> Path:
    cases = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((RESULTS / device).glob("*.json"))]
    cases = [case for case in cases if "seconds" in case["sides"].get("eager", {})]
    names = list(dict.fromkeys(name for case in cases for name in case["sides"]))
    colours = dict(zip(names, plt.get_cmap("tab10").colors, strict=False))
    figure, both = plt.subplots(1, 2, figsize=(11, 0.75 * len(cases) + 1.4), sharey=True, layout="constrained")
    for axis, of in zip(both, ("time", "memory"), strict=True):
        for place, case in enumerate(cases):
            found = ratios(case, of)
            height = 0.8 / len(found)
            for index, (name, ratio) in enumerate(found.items()):
                at = place + (index - (len(found) - 1) / 2) * height
                axis.barh(at, ratio, height, color=colours[name], label=name if place == 0 else None)
                axis.text(ratio, at, f" {ratio:.2g}" if ratio < 10 else f" {ratio:.0f}", va="center", fontsize=7)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_xlabel(f"{of} to eager PyTorch's (less is better)")
    both[0].set_yticks(range(len(cases)), [f"{case['op']}\n{case['shape']}" for case in cases], fontsize=8)
    both[0].invert_yaxis()
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours[name]) for name in names]
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), fontsize=8)
    path = RESULTS / f"{device}.svg"
    figure.savefig(path, metadata={"Date": None})
    return path


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    print(draw(arguments.parse_args().device))


if __name__ == "__main__":
    main()
