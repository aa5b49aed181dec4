"""Domain adaptation on Amazon reviews: six directed pairs of books, dvd and electronics, and every method.

    python launcher/benchmarks/domains.py tune             # each method's weights, on books and dvd alone
    python launcher/benchmarks/domains.py run              # all that is not there yet; hours on 2 cores
    python launcher/benchmarks/domains.py run --small      # one pair, a few steps of each: minutes
    python launcher/benchmarks/domains.py table            # what is recorded

`tune` says which weight is best on the labelled rows of books and dvd, and the recipes take that one; electronics shows
whether it carries over. `run` is seed 0 of every pair and method first; then seeds 1 and 2 of the source alone, the
oracle and the method that is best on average. Every run is one recorded result; what is recorded is not run again, and
what was broken off goes on. On a GPU: --ranks 1, and --at-once as many runs as it and the CPU's cores have room for.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import record
import yaml

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("FLEETUNE_DATA", ROOT.parent / "shared" / "data"))
PAIRS = list(itertools.permutations(("books", "dvd", "electronics"), 2))
SOURCE_ONLY, ORACLE = "base", "oracle"
METHODS = ("mmd", "coral", "jmmd", "lmmd", "dann", "entropy", "reweight")
ARMS = (SOURCE_ONLY, *METHODS, ORACLE)
SEEDS = (0, 1, 2)
TUNED_ON = PAIRS[:1] + PAIRS[2:3]  # books to dvd, and back
TRIED = {
    "mmd": (0.02, 0.1, 0.5),
    "coral": (1.0, 10.0, 100.0),
    "jmmd": (0.02, 0.1, 0.5),
    "lmmd": (0.02, 0.1, 0.5),
    "dann": (0.01, 0.03, 0.1),
    "entropy": (0.1, 0.3),
    "reweight": (2.0, 10.0),
    # As the published code has it, for comparison: the bandwidth a constant to the gradient.
    "mmd-detached": (0.02, 0.1, 0.5),
}
SMALL = ["training.max_steps=20", "data.target.target.test=null", "evaluation.shift_rows=100"]


def setting_of(arm: str) -> str:
    """The key of what is tuned."""
    return "reweight.clip" if arm == "reweight" else "losses.1.weight"


def chosen(arm: str) -> float | None:
    """What the arm's recipe says there."""
    if arm not in METHODS:
        return None
    recipe = yaml.safe_load((ROOT / "recipes" / "amazon" / f"{arm}.yaml").read_text(encoding="utf-8"))
    return float(recipe["reweight"]["clip"] if arm == "reweight" else recipe["losses"][1]["weight"])


@dataclass(frozen=True)
class Trial:
    """One training run."""

    pair: tuple[str, str]
    arm: str
    value: float | None  # of what is tuned
    seed: int = 0
    small: bool = False


def trained_on(trial: Trial) -> tuple[str, str]:
    """The oracle learns from the target alone: one run serves both sources."""
    return next(pair for pair in PAIRS if pair[1] == trial.pair[1]) if trial.arm == ORACLE else trial.pair


def name_of(trial: Trial) -> str:
    setting = "" if trial.value is None else f"-{trial.value:g}"
    folder = "domains_small" if trial.small else "domains"
    return f"{folder}/{'-'.join(trained_on(trial))}-{trial.arm}{setting}-{trial.seed}"


def run(trial: Trial, runs: Path, ranks: int) -> None:
    """By the command that a person would type. Raises CalledProcessError where it fails."""
    arm, value, name = trial.arm, trial.value, name_of(trial)
    if record.read(name) is not None:
        return
    folder = name.replace("/", "-")
    tuned = [] if value is None else [f"{setting_of(arm)}={value:g}"]
    tuned += ["losses.1.detach_bandwidth=true"] * arm.endswith("-detached")
    recipe = f"recipes/amazon/{arm.removesuffix('-detached')}.yaml"
    shown = ["run", recipe, f"name={folder}", f"training.seed={trial.seed}", *tuned, *(SMALL if trial.small else [])]
    chosen = dict(zip(("AMAZON_SOURCE", "AMAZON_TARGET"), trained_on(trial), strict=True))
    command = [sys.executable, "-m", "fleetune.cli", *shown, f"output_dir={runs}", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "FLEETUNE_DATA": str(DATA), **chosen}
    subprocess.run(command, cwd=ROOT, check=True, env=environment)
    report = json.loads((runs / folder / "eval.json").read_text(encoding="utf-8"))
    figures = {key: report[key] for key in ("validation", "test", "train_seconds", "step", "shift")}
    variables = " ".join(f"{key}={value}" for key, value in chosen.items())
    record.write(name, f"{variables} fleetune {' '.join(shown)} --nproc-per-node {ranks}", figures)


def run_all(trials: Iterable[Trial], runs: Path, ranks: int, at_once: int) -> None:
    each = {name_of(trial): trial for trial in trials}
    with ThreadPoolExecutor(at_once) as pool:
        for _ in pool.map(lambda trial: run(trial, runs, ranks), each.values()):
            pass


def accuracy(result: dict[str, Any], split: str) -> float:
    return float(result[split]["target/accuracy"])


def recorded(arm: str, small: bool, seeds: tuple[int, ...] = SEEDS) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Of the recipe as it stands, by pair."""
    names = {pair: [name_of(Trial(pair, arm, chosen(arm), seed, small)) for seed in seeds] for pair in PAIRS}
    found = {pair: [r for name in each if (r := record.read(name)) is not None] for pair, each in names.items()}
    return {pair: results for pair, results in found.items() if results}


def best_method() -> str:
    """By the mean of seed 0 on the target's test rows, over all pairs."""
    return max(METHODS, key=lambda arm: _means(arm, False, "test").get(0, 0.0))


def tuning_table() -> None:
    """Accuracy on all 2,000 labelled rows of dvd, and of books, each drawn near to by the other; and their mean."""
    print("| method | setting | " + " | ".join(f"{s} to {t}" for s, t in TUNED_ON) + " | mean |  |")
    print("|---" * (len(TUNED_ON) + 4) + "|")
    for arm in (SOURCE_ONLY, *TRIED):
        found = {}
        for value in TRIED.get(arm, (None,)):
            each = [record.read(name_of(Trial(pair, arm, value))) for pair in TUNED_ON]
            found[value] = [(300 * accuracy(r, "validation") + 1700 * accuracy(r, "test")) / 2000 for r in each if r]
        means = {value: statistics.fmean(each) for value, each in found.items() if len(each) == len(TUNED_ON)}
        for value, mean in means.items():
            notes = ["best"] * (value == max(means, key=means.__getitem__)) + ["the recipe's"] * (value == chosen(arm))
            setting = "" if value is None else f"{setting_of(arm)}={value:g}"
            cells = [arm, setting, *(f"{one:.4f}" for one in found[value]), f"{mean:.4f}", ", ".join(notes)]
            print(f"| {' | '.join(cells)} |")


def table(small: bool) -> None:
    """Accuracy on the target's 1,700 test rows; the oracle's, the small form's and the gap's are of 300 others."""
    pairs = [pair for pair in PAIRS if any(pair in recorded(arm, small) for arm in ARMS)]
    print("| method | " + " | ".join(f"{s} to {t}" for s, t in pairs) + " | mean | spread | seeds | gap closed |")
    print("|---" * (len(pairs) + 5) + "|")
    for arm in ARMS:
        results = recorded(arm, small)
        split = "validation" if small or arm == ORACLE else "test"
        cells = [
            f"{statistics.fmean(accuracy(r, split) for r in results[pair]):.4f}" if pair in results else ""
            for pair in pairs
        ]
        if not results:
            continue
        means = list(_means(arm, small, split).values())
        mean = f"{statistics.fmean(means):.4f}" if means else ""
        spread = f"{statistics.stdev(means):.4f}" if len(means) > 1 else ""
        shown = "source only" if arm == SOURCE_ONLY else arm
        summary = [mean, spread, str(len(means) or ""), _gap_closed(arm, small)]
        print(f"| {shown} | " + " | ".join([*cells, *summary]) + " |")
    shown = "All figures are" if small else "The oracle's figures are"
    print(f"\n{shown} of 300 rows; so is the gap closed: (method - source only) / (oracle - source only).")
    machines = {_machine(r) for arm in ARMS for results in recorded(arm, small).values() for r in results}
    print(f"Trained on {' and on '.join(sorted(machines))}.")


def _machine(result: dict[str, Any]) -> str:
    """What rounding depends on."""
    machine, ranks = result["machine"], result["command"].rpartition(" ")[2]
    return f"{ranks} rank(s) of {machine.get('gpu', machine['cpu'])}"


def _means(arm: str, small: bool, split: str) -> dict[int, float]:
    """Over all pairs that the source alone was trained on, of each seed that has them."""
    whole = len(recorded(SOURCE_ONLY, small, (0,)))
    each = {seed: recorded(arm, small, (seed,)) for seed in SEEDS}
    return {
        seed: statistics.fmean(accuracy(r, split) for (r,) in found.values())
        for seed, found in each.items()
        if whole and len(found) == whole
    }


def _gap_closed(arm: str, small: bool) -> str:
    """Over the seeds that all three have."""
    found = [_means(name, small, "validation") for name in (arm, SOURCE_ONLY, ORACLE)]
    seeds = set.intersection(*map(set, found))
    if not seeds:
        return ""
    method, low, high = (statistics.fmean(means[seed] for seed in seeds) for means in found)
    return f"{(method - low) / (high - low):.2f}" if high > low else "no gap"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tune", "run", "table"))
    parser.add_argument("--small", action="store_true", help="books to dvd, seed 0, 20 steps of each")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "domains")
    parser.add_argument("--ranks", type=int, default=2, help="of each run; 2 when absent")
    parser.add_argument("--at-once", type=int, default=1, help="so many runs beside each other; 1 when absent")
    arguments = parser.parse_args()
    small, where = arguments.small, (arguments.runs.absolute(), arguments.ranks, arguments.at_once)
    if small and arguments.what == "tune":
        parser.error("--small is of run and table: weights are tuned by whole runs")
    if arguments.what == "tune":
        arms = itertools.product((SOURCE_ONLY, *TRIED), TUNED_ON)
        run_all((Trial(pair, arm, value) for arm, pair in arms for value in TRIED.get(arm, (None,))), *where)
        tuning_table()
        return
    if arguments.what == "run":
        pairs = PAIRS[:1] if small else PAIRS
        each = itertools.product(pairs, ARMS)
        run_all((Trial(pair, arm, chosen(arm), small=small) for pair, arm in each), *where)
        if not small:
            again = itertools.product(SEEDS[1:], pairs, (SOURCE_ONLY, best_method(), ORACLE))
            run_all((Trial(pair, arm, chosen(arm), seed) for seed, pair, arm in again), *where)
    if not small:
        tuning_table()
        print()
    table(small)


if __name__ == "__main__":
    main()
