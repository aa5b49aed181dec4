"""Whole runs on a real Slurm cluster: sent, interrupted, found again; the same parameters bit for bit in the end."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from devcluster import DevCluster, eventually
from tiny import recipe_values, write_model, write_rows

from fleetune import runs, verify
from fleetune.ledger import ledger_of

ROOT = Path(__file__).parents[2]
STEPS, SAVE_STEPS = 48, 4  # some 10 seconds of training: time enough for a fault to fall into it

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # a job waits for its nodes, and two minutes when requeued


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by all nodes, with a model, data and a profile of 2 nodes x 2 ranks."""
    place = tmp_path_factory.mktemp("slurm")
    write_model(place / "model", hidden_dropout_prob=0.1)
    write_rows(place / "train.jsonl", 90)
    write_rows(place / "validation.jsonl", 31, seed=1)
    profile = {"partition": "main", "nodes": 2, "ranks_per_node": 2, "time": "10m", "stop_seconds": 30}
    (place / "profile.yaml").write_text(yaml.safe_dump(profile), encoding="utf-8")
    return place


def recipe(folder: Path, name: str) -> Path:
    values = recipe_values(folder, name, deepspeed={"zero_stage": 2}, checkpoint={"save_steps": SAVE_STEPS})
    values["training"] |= {"max_steps": STEPS}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values | {"output_dir": str(folder)}), encoding="utf-8")
    return path


def fleetune(cluster: DevCluster, *words: str, code: int = 0, sources: tuple[Path, ...] = ()) -> str:
    path = os.pathsep.join([*map(str, sources), *sys.path])
    environment = cluster.environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-m", "fleetune.cli", *words], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def look_at(cluster: DevCluster, run: runs.Run) -> None:
    """As a person does, which moves up the start of a job that Slurm holds back."""
    fleetune(cluster, "status", str(run.path))


def ended(cluster: DevCluster, run: runs.Run, kind: str, seconds: float = 240.0) -> dict[str, Any]:
    """The entry of the attempt that ended so, as soon as there is one."""

    def look() -> dict[str, Any] | None:
        look_at(cluster, run)
        entries = [e for e in runs.read_jsonl(run.attempts) if e["event"] == "end" and e.get("kind") == kind]
        return entries[-1] if entries else None

    found = eventually(look, seconds)
    assert found, f"{kind}: {runs.read_jsonl(run.attempts)}"
    return found


@pytest.fixture(scope="module")
def on_this_machine(devcluster: DevCluster, folder: Path) -> runs.Run:
    """The same run as two emulated nodes here."""
    fleetune(devcluster, "run", str(recipe(folder, "here")), "--nodes", "2", "--nproc-per-node", "2")
    return runs.Run(folder / "here")


@pytest.fixture
def send(devcluster: DevCluster, folder: Path) -> Iterator[Any]:
    """Sends a recipe and returns its run; what is left in the queue is cancelled."""

    def sent(name: str, sources: tuple[Path, ...] = ()) -> runs.Run:
        words = ("submit", str(recipe(folder, name)), "--cluster", str(folder / "profile.yaml"))
        said = fleetune(devcluster, *words, sources=sources)
        assert ", sent" in said
        return runs.Run(folder / name)

    yield sent
    devcluster.slurm("scancel", "--user=root")


def step_of(run: runs.Run) -> int:
    return int(runs.last_json(run.metrics, "step").get("step", 0))


def same_in_the_end(run: runs.Run, expected: runs.Run) -> None:
    assert verify.same(expected.path, run.path) == {"losses": "equal", "data order": "equal", "parameters": "equal"}


def test_a_run_on_the_cluster_is_the_run_on_this_machine_whatever_is_edited_after_it_was_sent(
    devcluster: DevCluster, on_this_machine: runs.Run, folder: Path, send: Any
) -> None:
    sources = (folder / "sources" / "launcher", folder / "sources" / "kernels")
    for source in sources:
        shutil.copytree(ROOT / source.name, source, ignore=shutil.ignore_patterns("benchmarks", "__pycache__"))
    run = send("whole", sources)
    for file in (folder / "sources").rglob("*.py"):
        file.write_text("raise SystemExit('edited after it was sent')\n", encoding="utf-8")
    code = runs.read_json(run.path / "job.json")["code"]
    again = fleetune(devcluster, "submit", str(folder / "whole.yaml"), "--cluster", str(folder / "profile.yaml"))
    assert "already" in again
    ended(devcluster, run, "done")
    assert [entry["event"] for entry in runs.read_jsonl(run.attempts)] == ["start", "end"]
    assert run.eval.exists()
    assert runs.read_json(run.path / "job.json")["code"] == code
    same_in_the_end(run, on_this_machine)
    assert f"{STEPS}/{STEPS}" in fleetune(devcluster, "status", str(run.path))
    assert "done" in fleetune(devcluster, "logs", str(run.path))


# As apptainer does, so much of it as matters here: the command runs where there is none of Slurm's.
APPTAINER = """#!/bin/sh
while [ "$1" != image.sif ]; do shift; done
shift
PATH=/nowhere exec "$@"
"""


def test_a_run_is_trained_in_a_container_that_has_none_of_slurms_commands(devcluster: DevCluster, folder: Path) -> None:
    (folder / "bin").mkdir()
    (folder / "bin" / "apptainer").write_text(APPTAINER, encoding="utf-8")
    (folder / "bin" / "apptainer").chmod(0o700)
    profile = folder / "contained-profile.yaml"
    values = yaml.safe_load((folder / "profile.yaml").read_text(encoding="utf-8")) | {
        "ranks_per_node": 1,
        "container": {"kind": "apptainer", "image": "image.sif", "python": sys.executable},
        "setup": [f"export PATH={folder}/bin:$PATH"],
        "cache_dir": str(folder / "local"),
    }
    profile.write_text(yaml.safe_dump(values), encoding="utf-8")
    words = (str(recipe(folder, "contained")), "training.max_steps=2", "--cluster", str(profile))
    fleetune(devcluster, "submit", *words)
    run = runs.Run(folder / "contained")
    assert eventually(lambda: not devcluster.slurm("squeue", "--noheader"), 240)
    start, end = runs.read_jsonl(run.attempts)
    assert (start["nodes"], end["reason"]) == (["node1", "node2"], "done")
    own = folder / "local" / f"fleetune-{os.getuid()}"
    assert stat.S_IMODE(own.stat().st_mode) == 0o700


def test_a_run_goes_on_by_itself_and_loses_no_step_that_it_could_save(
    devcluster: DevCluster, on_this_machine: runs.Run, folder: Path, send: Any
) -> None:
    """Preempted, then with a rank killed, then cancelled and sent again: one run, with a ledger and a story."""
    run = send("broken")
    assert eventually(lambda: step_of(run) >= 3, 180)
    devcluster.submit("sleep 5", "--partition=hi", "--nodes=3", "--exclusive")
    preempted = ended(devcluster, run, "preemption")
    assert preempted["exit_code"] == runs.SAVED

    assert eventually(lambda: step_of(run) >= preempted["last_step"] + 6, 240, lambda: look_at(devcluster, run))
    victim = subprocess.run(
        ["pgrep", "-f", f"fleetune.train {run.path}$"], capture_output=True, text=True, check=True
    ).stdout.split()[-1]
    os.kill(int(victim), signal.SIGKILL)
    killed = ended(devcluster, run, "crash")
    assert "was killed by SIGKILL" in killed["reason"]
    assert killed["first_step"] == preempted["last_step"] + 1

    assert eventually(lambda: step_of(run) >= killed["last_step"] + 5, 240, lambda: look_at(devcluster, run))
    fleetune(devcluster, "cancel", str(run.path))
    assert ended(devcluster, run, "cancel")["exit_code"] == runs.SAVED
    assert eventually(lambda: not devcluster.slurm("squeue", "--noheader").strip(), 30)
    assert "cancelled: stopped and saved" in fleetune(devcluster, "why", str(run.path))
    words = ("submit", str(folder / "broken.yaml"), "--cluster", str(folder / "profile.yaml"))
    assert ", sent" in fleetune(devcluster, *words)

    ended(devcluster, run, "done")
    same_in_the_end(run, on_this_machine)
    told = fleetune(devcluster, "why", str(run.path))
    assert "3 earlier attempts ended: 1 by preemption, 1 by crash, 1 by cancel." in told
    ledger = ledger_of(run)
    assert ledger.queued > 0
    assert ledger.recomputed_steps <= SAVE_STEPS + 1  # of the killed attempt alone
    assert ledger.goodput > 0
