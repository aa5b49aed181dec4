"""What sending costs, and that it happens once: on the development cluster (slurm/devcluster).

    python launcher/benchmarks/submits.py kills     # `fleetune submit` killed at 50 moments; 5 minutes
    python launcher/benchmarks/submits.py speed     # submit beside sbatch; status over 1,000 run folders

After each kill `fleetune submit` is run once more, to its end: there must be one job, and it must find its task.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import record
import yaml

from fleetune import runs

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests"))
from devcluster import DevCluster  # noqa: E402
from tiny import recipe_values, write_model, write_rows  # noqa: E402

KILLS, RUNS = 50, 1000
CLI = [sys.executable, "-m", "fleetune.cli"]


def recipe(folder: Path, name: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe_values(folder, name) | {"output_dir": str(folder)}), encoding="utf-8")
    return path


def submit(folder: Path, name: str, profile: str = "held") -> list[str]:
    return [*CLI, "submit", str(recipe(folder, name)), "--cluster", str(folder / f"{profile}.yaml")]


def queue(cluster: DevCluster, name: str) -> list[str]:
    """The ids of the jobs of a run in the queue, by the name they begin with."""
    lines = cluster.slurm("squeue", "--noheader", "--format=%i %j").splitlines()
    return [line.split()[0] for line in lines if line.split()[1].startswith(f"{name}-")]


def kills(cluster: DevCluster, folder: Path) -> dict[str, Any]:
    """Jobs are held, so that they stay in the queue to be counted."""
    environment = cluster.environment
    start = time.monotonic()
    subprocess.run(submit(folder, "whole"), env=environment, check=True, capture_output=True)
    whole = time.monotonic() - start
    chance, found = random.Random(0), []
    for number in range(KILLS):
        name, moment = f"killed{number}", chance.uniform(0.0, whole)
        silent: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(submit(folder, name), env=environment, **silent)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        was_killed = process.wait() == -signal.SIGKILL
        after = len(queue(cluster, name))
        again = subprocess.run(submit(folder, name), env=environment, capture_output=True, text=True, check=False)
        jobs = queue(cluster, name)
        tasks = list((folder / name / "submitit").glob(f"*/{jobs[0]}_submitted.pkl")) if jobs else []
        found.append(
            {"moment": round(moment, 3), "killed": was_killed, "jobs_after_the_kill": after, "jobs": len(jobs),
             "has_its_task": len(tasks) == 1, "code": again.returncode}
        )  # fmt: skip
        print(found[-1], again.stderr.strip(), flush=True)
    return {
        "seconds_of_a_submit": round(whole, 3),
        "kills": sum(one["killed"] for one in found),
        "sent_before_the_kill": sum(one["jobs_after_the_kill"] > 0 for one in found),
        "orphans": sum(one["jobs"] == 0 or not one["has_its_task"] for one in found),
        "duplicates": sum(one["jobs"] > 1 for one in found),
        "moments": found,
    }


def speed(cluster: DevCluster, folder: Path) -> dict[str, Any]:
    environment, submits, sbatches = cluster.environment, [], []
    script = "#!/bin/bash\nsleep 1\n"
    for number in range(10):
        start = time.monotonic()
        subprocess.run(submit(folder, f"fast{number}"), env=environment, check=True, capture_output=True)
        submits.append(time.monotonic() - start)
        start = time.monotonic()
        subprocess.run(["sbatch", "--hold"], input=script, env=environment, text=True, check=True, capture_output=True)
        sbatches.append(time.monotonic() - start)
    template = folder / "fast0"
    names = [f"many{number}" for number in range(RUNS)]
    jobs = [runs.read_json(folder / f"fast{number}" / "job.json") for number in range(10)]
    for number, name in enumerate(names):
        (folder / name).mkdir()
        for file in ("run.json", "recipe.yaml"):
            shutil.copy(template / file, folder / name / file)
        runs.write_json(folder / name / "job.json", jobs[number % 10])
        runs.append_jsonl(
            folder / name / "attempts.jsonl",
            {"attempt": 1, "event": "start", "time": "2026-01-01T00:00:00+00:00", "began": "2026-01-01T00:00:00+00:00",
             "nodes": ["node1"]},
        )  # fmt: skip
        for step in range(10, 210, 10):
            runs.append_jsonl(
                folder / name / "metrics.jsonl", {"step": step, "train/loss": 0.5, "train/samples_per_second": 9.0}
            )
    counted = folder / "counted"
    counted.mkdir()
    for command in ("squeue", "sacct", "scontrol", "sinfo"):
        real = shutil.which(command)
        (counted / command).write_text(f'#!/bin/sh\necho {command} >> {counted}/calls\nexec {real} "$@"\n')
        (counted / command).chmod(0o755)
    times = []
    for _ in range(5):
        (counted / "calls").unlink(missing_ok=True)
        start = time.monotonic()
        subprocess.run(
            [*CLI, "status", *names], cwd=folder, check=True, capture_output=True,
            env=environment | {"PATH": f"{counted}:{environment['PATH']}"},
        )  # fmt: skip
        times.append(time.monotonic() - start)
    return {
        "submit_seconds": round(statistics.median(submits), 3),
        "sbatch_seconds": round(statistics.median(sbatches), 3),
        "submit_beyond_sbatch": round(statistics.median(submits) - statistics.median(sbatches), 3),
        "status_runs": RUNS,
        "status_seconds": round(statistics.median(times), 3),
        "status_slurm_calls": (counted / "calls").read_text().split(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kills", "speed"])
    what = parser.parse_args().what
    folder = Path(tempfile.mkdtemp(prefix="fleetune-submits-"))
    write_model(folder / "model")
    write_rows(folder / "train.jsonl", 90)
    write_rows(folder / "validation.jsonl", 31, seed=1)
    held = {"partition": "main", "nodes": 1, "time": "10m", "stop_seconds": 30, "extra": {"hold": True}}
    (folder / "held.yaml").write_text(yaml.safe_dump(held), encoding="utf-8")
    cluster = DevCluster(folder / "cluster")
    cluster("up", "--nodes", "1", "--gpus-per-node", "0")
    try:
        figures = kills(cluster, folder) if what == "kills" else speed(cluster, folder)
    finally:
        cluster("down")
        shutil.rmtree(folder)
    print({name: value for name, value in figures.items() if name != "moments"})
    record.write(f"submits/{what}", f"python launcher/benchmarks/submits.py {what}", figures)


if __name__ == "__main__":
    main()
