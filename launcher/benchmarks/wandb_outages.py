"""What an outage of Weights & Biases costs a run: its time, its end, its log, and what can be sent later.

    python launcher/benchmarks/wandb_outages.py             # about 12 minutes on 2 cores that nobody else uses
    python launcher/benchmarks/wandb_outages.py --table     # what is recorded

The same recipe through `fleetune run`: MiniLM-L6 on the quickstart's data, fp32, one rank on one thread, so that a
second core is free for wandb as it is on a machine with a GPU; small batches, a line at every step, one evaluation at
the end. `rounds` times in turn:

- off           no tracking; once more as "off, again", for what two runs of the same differ by
- answering     a stand-in for wandb's server on loopback, which takes everything
- refusing      a port on which nobody listens
- black-holed   a port on which connects never complete: a socket that accepts nobody, its backlog full
- silent midway the stand-in takes connections and requests, and after a third of the steps it answers none

The stand-in is sent to every second instead of every 15, so that it has steps when it falls silent. After an outage
comes what the run has told its user to do, against a server that answers, and `wandb sync --include-online RUN/wandb`.

Times are those of the same step in the round's first run without tracking: the same rows in the same order on the same
weights. Each run is one recorded result; what is there already, of the same number of steps, is not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import record
from accuracy import ROOT

sys.path.insert(0, str(ROOT / "tests"))  # the stand-in for wandb's server is the tests'
import wandb_server
from wandb_server import Server, black_hole, refusing, serving, wandb_environment, without_wandb

from fleetune import runs
from fleetune.train.metrics_log import read_metrics

Address = Callable[[], AbstractContextManager[str]]
OFF = "off"
OUTAGES: dict[str, Address] = {"refusing": refusing, "black-holed": black_hole}
MIDWAY = "silent midway"
ARMS = (OFF, "answering", *OUTAGES, MIDWAY, "off, again")
WARM_UP = 3  # the first steps, which also grow the memory


def train(arm: str, steps: int) -> dict[str, Any]:
    """One run of an arm, and what became of its steps: the figures of it."""
    with tempfile.TemporaryDirectory() as folder, serving() as server, address_of(arm, server) as url:
        run = runs.Run(Path(folder) / "quickstart")
        home = Path(folder) / "home"
        environment = {**without_wandb(os.environ), **wandb_environment(url, home), "OMP_NUM_THREADS": "1"}
        output, last_step, end = watched(command(arm, steps, folder), environment, run, server, arm == MIDWAY, steps)
        figures = {
            "train_seconds": runs.read_json(run.eval)["train_seconds"],
            "step_seconds": [line["time/whole_step"] for line in read_metrics(run.metrics)],
            "from_last_step_to_end": end - last_step,
            "from_report_to_end": end - run.eval.stat().st_mtime,
            "missing_from_metrics": lacking(steps, [line["step"] for line in read_metrics(run.metrics)]),
            "twice_in_metrics": twice([line["step"] for line in runs.read_jsonl(run.metrics) if "train/loss" in line]),
        }
        if arm.startswith(OFF):
            return figures
        server.answering.set()
        environment |= wandb_environment(server.url, home)
        before = len(server.history)
        told = wandb_server.send_as_told(output, environment)
        wandb_server.sync(run.path, environment)
        return figures | {
            "told": told and told.replace(folder, "OUTPUT"),
            "sent_in_time": before,
            "missing_from_server": lacking(steps, server.steps()),
            "twice_on_server": twice(server.steps()),
        }


@contextlib.contextmanager
def address_of(arm: str, server: Server) -> Iterator[str]:
    with OUTAGES[arm]() if arm in OUTAGES else contextlib.nullcontext(server.url) as url:
        yield url


def command(arm: str, steps: int, folder: str) -> list[str]:
    overrides = [
        f"output_dir={folder}",
        "data.validation.limit=64",
        "data.test=null",
        "training.bf16=false",
        f"training.max_steps={steps}",
        "training.global_batch_size=8",
        "training.per_device_train_batch_size=8",
        "training.logging_steps=1",
        f"evaluation.eval_steps={steps}",
        "deepspeed.zero_stage=0",
        "tracking.wandb=null" if arm.startswith(OFF) else "tracking.wandb.mode=auto",
    ]
    return [sys.executable, "-m", "fleetune.cli", "run", "recipes/quickstart.yaml", *overrides]


def watched(
    command: list[str], environment: dict[str, str], run: runs.Run, server: Server, falls_silent: bool, steps: int
) -> tuple[str, float, float]:
    """Runs it: (its output, when the last step was there, when it ended). The server falls silent after a third."""
    last_step = 0.0
    with tempfile.TemporaryFile("w+") as output:
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output) as process:
            while process.poll() is None:
                time.sleep(0.05)
                done = run.metrics.read_bytes().count(b'"train/loss"') if run.metrics.exists() else 0
                if falls_silent and done >= steps // 3 and server.history:
                    server.answering.clear()
                if done >= steps and not last_step:
                    last_step = time.time()
            end = time.time()
        output.seek(0)
        text = output.read()
    if process.returncode:
        sys.exit(f"{' '.join(command)} exited with {process.returncode}:\n{text[-3000:]}")
    if falls_silent and server.answering.is_set():
        sys.exit("the run ended before the server had a step; it needs more --steps")
    return text, last_step, end


def lacking(steps: int, found: list[int]) -> int:
    return len(set(range(1, steps + 1)) - set(found))


def twice(found: list[int]) -> int:
    return len(found) - len(set(found))


def key(arm: str, number: int) -> str:
    return f"wandb_outages/{arm.replace(',', '').replace(' ', '-')}-{number}"


def recorded(arm: str, number: int, steps: int) -> dict[str, Any] | None:
    found = record.read(key(arm, number))
    return found if found is not None and found["steps"] == steps else None


def summary(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Over the rounds: the median of the ratios, the longest end, and the sum of what is not as it should be."""
    table = {}
    for arm in ARMS[1:]:
        found = [(done[OFF], done[arm]) for done in rounds]
        counted = [name for name in found[0][1] if name.startswith(("missing_", "twice_"))]
        step_ratios = [
            statistics.median(
                mine / theirs
                for theirs, mine in zip(off["step_seconds"][WARM_UP:], on["step_seconds"][WARM_UP:], strict=True)
            )
            for off, on in found
        ]
        table[arm] = {
            "step_ratio": statistics.median(step_ratios),
            "step_ratios": step_ratios,
            "train_ratio": statistics.median(on["train_seconds"] / off["train_seconds"] for off, on in found),
            "from_last_step_to_end": max(on["from_last_step_to_end"] for _, on in found),
            "from_report_to_end": max(on["from_report_to_end"] for _, on in found),
            **{name: sum(on[name] for _, on in found) for name in counted},
        }
    return table


COLUMNS = {  # heading: (figure, format)
    "step": ("step_ratio", ".4f"),
    "train": ("train_ratio", ".4f"),
    "end, s": ("from_last_step_to_end", ".1f"),
    "end*, s": ("from_report_to_end", ".1f"),
    "lacks": ("missing_from_metrics", "d"),
    "twice": ("twice_in_metrics", "d"),
    "server lacks": ("missing_from_server", "d"),
    "twice there": ("twice_on_server", "d"),
}


def show(table: dict[str, dict[str, Any]], steps: int, rounds: int) -> None:
    print(f"{steps} steps, {rounds} rounds; times of a step and of training, without tracking 1")
    print("end: seconds from the last step to the command's end; end*: from eval.json; the longest of the rounds")
    print("lacks, twice: steps of metrics.jsonl, and of the server once everything was sent; all rounds together")
    print(" " * 14 + "".join(f"{heading:>14}" for heading in COLUMNS))
    for arm, row in table.items():
        cells = [format(row[name], form) if name in row else "" for name, form in COLUMNS.values()]
        print(f"{arm:14}" + "".join(f"{cell:>14}" for cell in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="show what is recorded; run nothing")
    args = parser.parse_args()
    shown = "python launcher/benchmarks/wandb_outages.py " + " ".join(sys.argv[1:])
    if not args.table:
        for number in range(args.rounds):
            for arm in ARMS:
                if recorded(arm, number, args.steps) is None:
                    print(f"round {number + 1} of {args.rounds}: {arm}", flush=True)
                    record.write(key(arm, number), shown, {"steps": args.steps, **train(arm, args.steps)})
    found = [{arm: recorded(arm, number, args.steps) for arm in ARMS} for number in range(args.rounds)]
    rounds = [{arm: figures for arm, figures in done.items() if figures} for done in found]
    rounds = [done for done in rounds if len(done) == len(ARMS)]
    if not rounds:
        sys.exit(f"no round of {args.steps} steps is recorded")
    table = summary(rounds)
    show(table, args.steps, len(rounds))
    if not args.table:
        record.write("wandb_outages", shown, {"steps": args.steps, "rounds": len(rounds), "arms": table})


if __name__ == "__main__":
    main()
