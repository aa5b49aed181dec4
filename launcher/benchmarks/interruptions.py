"""Runs that are killed, or asked to stop, at random moments, against the same run never interrupted: bit for bit.

    python launcher/benchmarks/interruptions.py kills    # 100 kills by SIGKILL, ZeRO 0 to 3; 20 minutes on 2 cores
    python launcher/benchmarks/interruptions.py stops    # 20 signals to stop; 5 minutes
    python launcher/benchmarks/interruptions.py table

A BERT of two layers with dropout trains on two ranks and saves after every step, so that many kills fall inside a save;
in every second run the files are written in the background. What is recorded already is not run again.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import record

from fleetune import runs, verify
from fleetune.cluster.local import Layout
from fleetune.schema import Recipe

sys.path.append(str(Path(__file__).parents[2] / "tests"))
from tiny import recipe_values, write_model, write_rows

STAGES, SEEDS, KILLS, STOPS, STEPS = (0, 1, 2, 3), range(6), 5, 5, 24
LAYOUT = Layout(nodes=1, nproc_per_node=2, threads=1)


def recipe(folder: Path, name: str, stage: int, in_background: bool) -> Recipe:
    values = recipe_values(
        folder,
        name,
        deepspeed={"zero_stage": stage},
        checkpoint={"async": in_background, "save_steps": 1},
        evaluation={"eval_steps": 7},
    )
    values["training"] |= {"max_steps": STEPS, "lr_scheduler_type": "cosine"}
    return Recipe.model_validate(values | {"output_dir": str(folder)})


def workspace(folder: Path) -> Path:
    write_model(folder / "model", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    write_rows(folder / "train.jsonl", 90)
    write_rows(folder / "validation.jsonl", 31, seed=1)
    return folder


def missing(kind: str, stage: int) -> list[int]:
    return [seed for seed in SEEDS if record.read(f"interruptions/{kind}-zero{stage}-{seed}") is None]


def kills() -> None:
    for stage in STAGES:
        seeds = missing("kills", stage)
        with tempfile.TemporaryDirectory() as place:
            folder = workspace(Path(place))
            unbroken: Any = verify.run_unbroken(recipe(folder, "unbroken", stage, False), LAYOUT) if seeds else None
            for seed in seeds:
                in_background = seed % 2 == 1
                broken = verify.run_broken(
                    recipe(folder, f"broken-{seed}", stage, in_background),
                    LAYOUT,
                    KILLS,
                    STEPS,
                    unbroken[1:],
                    random.Random(1000 * stage + seed),
                    lambda line: print(line, flush=True),
                )
                found = verify.same(unbroken[0], broken.path)
                print(f"ZeRO-{stage}, seed {seed}: {len(broken.kills)} kills, {found}", flush=True)
                record.write(
                    f"interruptions/kills-zero{stage}-{seed}",
                    "python launcher/benchmarks/interruptions.py kills",
                    {"async": in_background, "kills": [vars(kill) for kill in broken.kills], **found},
                )


def stops() -> None:
    """At each moment SIGTERM, SIGINT or SIGUSR2, to the launcher or to one rank."""
    stage = 2
    seeds = [seed for seed in range(20 // STOPS) if record.read(f"interruptions/stops-{seed}") is None]
    with tempfile.TemporaryDirectory() as place:
        folder = workspace(Path(place))
        unbroken: Any = verify.run_unbroken(recipe(folder, "unbroken", stage, False), LAYOUT) if seeds else None
        for seed in seeds:
            stopped = recipe(folder, f"stopped-{seed}", stage, seed % 2 == 1)
            found = list(stop_attempts(stopped, random.Random(seed), unbroken[1], unbroken[2]))
            equal = verify.same(unbroken[0], folder / f"stopped-{seed}")
            print(f"seed {seed}: {equal}", flush=True)
            record.write(
                f"interruptions/stops-{seed}",
                "python launcher/benchmarks/interruptions.py stops",
                {"stops": found, **equal},
            )


def stop_attempts(stopped: Recipe, chance: random.Random, startup: float, step: float) -> Iterator[dict[str, Any]]:
    path = Path(stopped.output_dir) / stopped.name
    for number in range(STOPS):
        process = verify.start(stopped, LAYOUT)
        number_name = chance.choice(["SIGTERM", "SIGTERM", "SIGINT", "SIGUSR2"])
        at_start = number == 0
        target = (number + 1) * STEPS // (STOPS + 2)
        assert process.stdout is not None
        for line in () if at_start else process.stdout:
            if line.startswith("step") and int(line.split()[1].partition("/")[0]) >= target:
                break
        time.sleep(chance.uniform(0.0, startup if at_start else step))
        children = psutil.Process(process.pid).children()
        ranks = [child.pid for child in children if "fleetune.train" in child.cmdline()]
        to_rank = bool(ranks) and not at_start and chance.random() < 0.5
        begun = time.monotonic()
        os.kill(chance.choice(ranks) if to_rank else process.pid, getattr(signal, number_name))
        rest = process.stdout.read()
        code = process.wait()
        seconds = time.monotonic() - begun
        steps = [line["step"] for line in runs.read_jsonl(path / "metrics.jsonl")]
        saved = max((int(folder.name[5:]) for folder in (path / "checkpoints").glob("step-*")), default=0)
        found = {
            "signal": number_name,
            "to": "a rank" if to_rank else "the launcher",
            "exit_code": code,
            "seconds_to_exit": round(seconds, 3),
            "steps_lost": max(steps, default=0) - saved,
            "while_starting": at_start,
        }
        print(found, flush=True)
        if code != runs.SAVED:
            print(rest[-2000:], flush=True)
        yield found
    last = verify.start(stopped, LAYOUT)
    last.communicate()


def table() -> None:
    units = [r for stage in STAGES for seed in SEEDS if (r := record.read(f"interruptions/kills-zero{stage}-{seed}"))]
    every = [kill for unit in units for kill in unit["kills"]]
    equal = sum(unit["losses"] == unit["data order"] == unit["parameters"] == "equal" for unit in units)
    print(
        f"{len(every)} kills, {sum(kill['in_save'] for kill in every)} of them inside a save; "
        f"{equal} of {len(units)} runs equal in losses, data order and parameters"
    )
    for whom in verify.WHOM:
        print(f"  {whom}: {sum(kill['whom'] == whom for kill in every)}")
    stopped = [r for seed in range(20 // STOPS) if (r := record.read(f"interruptions/stops-{seed}"))]
    each = [stop for unit in stopped for stop in unit["stops"]]
    if each:
        times = [stop["seconds_to_exit"] for stop in each]
        print(
            f"{len(each)} stops: {sum(stop['exit_code'] == runs.SAVED for stop in each)} with exit code 75, "
            f"{sum(stop['steps_lost'] for stop in each)} steps lost, {statistics.median(times):.2f} s to exit "
            f"(median; {min(times):.2f} to {max(times):.2f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kills", "stops", "table"))
    what = parser.parse_args().what
    if what == "kills":
        kills()
    elif what == "stops":
        stops()
    table()


if __name__ == "__main__":
    main()
