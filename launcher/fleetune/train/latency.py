"""`python -m fleetune.train.latency [--threads N] FOLDER ...`: how fast trained models answer, as JSON.

The models are measured in turn, round by round, in one process, so that whatever slows the machine for a while slows
them all. Each is given rows of its own test or validation data, those nearest to the median length, in fp32.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fleetune.schema import Recipe, RecipeError
from fleetune.train.batches import collate
from fleetune.train.data import DataError, Split, prepare
from fleetune.train.lora import has_adapter, merge
from fleetune.train.model import padding_id
from fleetune.train.quantization import unquantized
from fleetune.train.report import print_report
from fleetune.train.trained import load_trained, recipe_and_model

BATCH_SIZES = (1, 32)
ROUNDS = 10  # in each, every model has a turn
PASSES = 3  # timed ones of a turn, after one that is not: another model's weights are in the cache
FEWEST_ROUNDS, ENOUGH_SECONDS = 3, 60.0  # of a batch size on a device: large models on a CPU get fewer rounds
RANDOM_LENGTH = 64  # tokens of a row, where the data are not there

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Subject:
    """A model that is measured, and what it is given."""

    folder: Path
    model: nn.Module
    batches: dict[int, Inputs]  # by batch size
    source: str  # the split that the rows are of, or "random"


def load(folder: Path) -> Subject:
    """Raises RecipeError for what is no trained model, or one that runs code of its own."""
    from transformers import AutoTokenizer

    recipe, path = recipe_and_model(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise RecipeError(f"{folder}: cannot be loaded: {error}") from error
    model = load_trained(unquantized(recipe), path, torch.float32)
    if has_adapter(model):
        model = merge(model)  # as it would be deployed
    found = _rows(recipe, tokenizer)
    if found is None:
        batches = {size: _random_batch(size, recipe.data.max_length, model.config.vocab_size) for size in BATCH_SIZES}
        return Subject(folder, model.eval(), batches, "random")
    source, split = found
    batches = {size: typical_batch(split, size, padding_id(tokenizer) or 0) for size in BATCH_SIZES}
    return Subject(folder, model.eval(), batches, source)


def _rows(recipe: Recipe, tokenizer: Any) -> tuple[str, Split] | None:
    """The run's own test or validation rows; None where they are not there."""
    try:
        splits = prepare(recipe, tokenizer).splits
    except DataError:
        return None
    return next(((name, splits[name]) for name in ("test", "validation") if name in splits), None)


def typical_batch(split: Split, size: int, pad_token_id: int) -> Inputs:
    """The rows whose length is nearest to the median; again from the first where there are too few."""
    distance = np.abs(split.lengths - np.median(split.lengths))
    nearest = np.argsort(distance, kind="stable")[:size]
    return collate(split, np.resize(nearest, size), pad_token_id).inputs


def _random_batch(size: int, max_length: int, vocab_size: int) -> Inputs:
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (size, min(RANDOM_LENGTH, max_length)), generator=drawn)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


# ---------------------------------------------------------------- the measurement


def time_in_turn(subjects: list[Subject], size: int, device: torch.device, rounds: int) -> list[list[float]]:
    """Seconds of each pass of each model, whose turns go forth in one round and back in the next."""
    inputs = [{name: tensor.to(device) for name, tensor in one.batches[size].items()} for one in subjects]
    seconds: list[list[float]] = [[] for _ in subjects]
    turns = list(range(len(subjects)))
    for i in turns:  # warm-up
        _time_turn(subjects[i].model, inputs[i], device)
    began = time.perf_counter()
    for done in range(rounds):
        if done >= FEWEST_ROUNDS and time.perf_counter() - began > ENOUGH_SECONDS:
            break
        for i in turns if done % 2 == 0 else reversed(turns):
            seconds[i] += _time_turn(subjects[i].model, inputs[i], device)
    return seconds


def _time_turn(model: nn.Module, inputs: Inputs, device: torch.device) -> list[float]:
    seconds = []
    with torch.inference_mode():
        for _ in range(1 + PASSES):
            start = time.perf_counter()
            model(**inputs)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
    return seconds[1:]


def figures(seconds: list[float], batch: Inputs) -> dict[str, Any]:
    """What a model took for one batch; samples/s are those of the median pass."""
    size, tokens = batch["input_ids"].shape
    median = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4)
    return {
        "milliseconds": 1e3 * median,
        "quartiles": [1e3 * low, 1e3 * high],
        "samples_per_second": size / median,
        "passes": len(seconds),
        "tokens": tokens,  # of a row, with its padding
    }


def measure(folders: list[Path], rounds: int = ROUNDS) -> dict[str, Any]:
    """Every model on the CPU and, where there is one, on a GPU. Raises RecipeError."""
    load_before = os.getloadavg()[0]
    subjects = [load(folder) for folder in folders]
    models: list[dict[str, Any]] = [
        {
            "folder": str(subject.folder),
            "tokens": {"source": subject.source, "length": subject.batches[1]["input_ids"].shape[1]},
        }
        for subject in subjects
    ]
    gpu = torch.device("cuda") if torch.cuda.is_available() else None
    for device in filter(None, (torch.device("cpu"), gpu)):
        name = "cpu" if device.type == "cpu" else "gpu"
        for subject in subjects:
            subject.model.to(device)
        for size in BATCH_SIZES:
            timed = time_in_turn(subjects, size, device, rounds)
            for model, subject, seconds in zip(models, subjects, timed, strict=True):
                model.setdefault(name, {})[str(size)] = figures(seconds, subject.batches[size])
    return {
        "cpu": cpu_name(),
        "gpu": None if gpu is None else torch.cuda.get_device_name(gpu),
        "threads": torch.get_num_threads(),
        "load": round(load_before, 2),  # of the last minute, by whatever else runs here
        "dtype": "fp32",
        "models": models,
    }


def cpu_name() -> str:
    """As the kernel has it; else the architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_float32_matmul_precision("highest")  # no TF32: fp32 is what is said
    return print_report(lambda: measure(arguments.folders))


if __name__ == "__main__":
    sys.exit(main())
