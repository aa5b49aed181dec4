"""What runs on the nodes beside the ranks: a supervisor for each task, and the batch script's last word.

A supervisor starts `python -m fleetune.train RUN` as a process group of its own, passes signals on, watches its beats,
and writes down how it ended in RUN/slurm/JOB-RESTART/. It ends with 0 where its rank is done or saved, so that srun's
--kill-on-bad-exit never strikes a rank that is still saving, and with 1 otherwise, so that it strikes the others.

After srun, `python -m fleetune.cluster.supervisor RUN CODE` in the batch script reads how the ranks ended, ends the
attempt in RUN/attempts.jsonl, and requeues the job under its own id, or gives the run up: each kind of interruption
has a budget of its own. Where Slurm itself requeues (a dead node, scontrol requeue) it never comes to that; the next
attempt then ends the one before.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from fleetune import runs
from fleetune.cluster import local, slurm
from fleetune.cluster.watch import Beats, where_each_is
from fleetune.recipe import dump_recipe
from fleetune.schema import Recipe, RecipeError, cut_batch, total_steps

WAIT_SECONDS = 1800.0  # for rank 0 to prepare the data
LEASE_WAIT = 2 * runs.LEASE_SECONDS  # for the lease of an attempt whose node died
GRACE_SECONDS = 3.0  # in which other ranks may still say how they ended


@dataclass(frozen=True)
class Task:
    """This task, as srun describes it."""

    job: str
    restart: int
    rank: int
    world_size: int
    local_rank: int
    node: int
    nodes: int
    node_list: str

    @classmethod
    def of_slurm(cls) -> Task:
        env = os.environ
        return cls(
            env["SLURM_JOB_ID"],
            int(env.get("SLURM_RESTART_COUNT", "0")),
            int(env["SLURM_PROCID"]),
            int(env["SLURM_NTASKS"]),
            int(env["SLURM_LOCALID"]),
            int(env["SLURM_NODEID"]),
            int(env["SLURM_JOB_NUM_NODES"]),
            env["SLURM_JOB_NODELIST"],
        )


def supervise(path: str) -> None:
    """The task itself, from submitit's pickle; leaves the process with 1 where its rank failed."""
    heard: list[int] = []

    def hear(number: int, frame: FrameType | None) -> None:
        heard.append(number)

    for number in (signal.SIGTERM, signal.SIGCONT, signal.SIGUSR2):  # from submitit's own handler
        signal.signal(number, hear)
    task, run = Task.of_slurm(), runs.Run(Path(path))
    notes = _notes(run, task.job, task.restart)
    notes.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        with _lead(run, task, notes) if task.rank == 0 else contextlib.nullcontext(lambda: None) as beat:
            start = _await_start(notes, heard)
            code, reason = _train(run, task, start, heard, beat)
    except (RecipeError, local.PreparationFailed) as error:
        code = runs.WRONG if isinstance(error, RecipeError) else runs.FAILED
        reason = str(error)
    except local.StoppedEarly:
        code, reason = runs.SAVED, "asked to stop before training began"
    _note(notes, f"ended-{task.rank}", {"code": code, "reason": reason, "signals": heard, "time": time.time()})
    if code not in (runs.DONE, runs.SAVED):
        time.sleep(GRACE_SECONDS)
        raise SystemExit(1)


# ---------------------------------------------------------------- rank 0 begins the attempt


@contextlib.contextmanager
def _lead(run: runs.Run, task: Task, notes: Path) -> Any:
    """Prepares the data, opens the run as these nodes run it, takes its lease, and tells the others where to meet."""
    _close_last(run, task)
    layout = local.Layout(task.nodes, task.world_size // task.nodes, int(os.environ.get("SLURM_CPUS_PER_TASK", "1")))
    asked = run.recipe()
    report = local.prepare(asked)
    recipe = local.in_this_machines_precision(asked, report)
    batch = cut_batch(recipe.training, task.world_size)
    steps = total_steps(recipe.training, report["rows"]["train"], batch)
    if recipe is not asked:
        runs.write_json(run.path / "run.json", run.info() | {"fp32_for_bf16": True})
        runs.write_text(run.recipe_file, dump_recipe(recipe))
    runs.open_run(_at(recipe, run), layout.stored(), False, report["content"], steps)
    runs.write_json(
        run.path / "run.json", run.info() | {"total_steps": steps, "global_batch_size": batch.global_batch_size}
    )
    with _patient_lease(run) as lease:
        hosts = slurm.hosts(task.node_list)
        attempt = runs.start_attempt(run, hosts)
        address, port = _meeting_place(hosts)
        _note(notes, "start", {"attempt": attempt, "address": address, "port": port, "time": time.time()})
        yield lease.beat


def _at(recipe: Recipe, run: runs.Run) -> Recipe:
    """The recipe as it names the folder that the run stands in: it was sent from another working folder perhaps."""
    return recipe.model_copy(update={"output_dir": str(run.path.parent), "name": run.path.name})


@contextlib.contextmanager
def _patient_lease(run: runs.Run) -> Any:
    deadline = time.monotonic() + LEASE_WAIT
    with contextlib.ExitStack() as stack:
        lease = None
        while lease is None:
            try:
                lease = stack.enter_context(runs.lease(run))
            except RecipeError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(1.0)
        yield lease


def _meeting_place(hosts: list[str]) -> tuple[str, int]:
    """This node's address as the others reach it, and a port that is free and outside the ephemeral range."""
    address = socket.gethostbyname(socket.gethostname())
    if address.startswith("127.") and len(hosts) > 1:  # Debian's own entry in /etc/hosts
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((hosts[-1], 9))
            address = probe.getsockname()[0]
    low = 32768
    with contextlib.suppress(OSError):
        low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    for _ in range(200):
        port = random.randrange(min(10000, low - 1000), low)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return address, port
    raise local.PreparationFailed("no free port below the ephemeral range on this node")


# ---------------------------------------------------------------- every rank


def _await_start(notes: Path, heard: list[int]) -> dict[str, Any]:
    deadline = time.monotonic() + WAIT_SECONDS
    while not (notes / "start.json").exists():
        if _asked_to_stop(heard):
            raise local.StoppedEarly
        if (ended := notes / "ended-0.json").exists():
            found = runs.read_json(ended)
            raise local.PreparationFailed(f"rank 0 did not start: {found['reason']}")
        if time.monotonic() > deadline:
            raise local.PreparationFailed(f"rank 0 did not start in {WAIT_SECONDS:.0f} s")
        time.sleep(0.2)
    return runs.read_json(notes / "start.json")


def _train(run: runs.Run, task: Task, start: dict[str, Any], heard: list[int], beat: Any) -> tuple[int, str]:
    """One rank, to its end: (exit code, reason)."""
    logs = run.logs(start["attempt"])
    logs.mkdir(parents=True, exist_ok=True)
    log_path = logs / f"rank-{task.rank}.log"
    with tempfile.TemporaryDirectory(prefix="fleetune-beats-") as folder, log_path.open("a") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "fleetune.train", str(run.path)],
            env=_environment(task, start, logs, folder),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=local._become_rank,
        )
        beats = Beats(Path(folder), [task.rank], run.recipe().training.hang_timeout)
        told = False
        try:
            while (code := process.poll()) is None:
                if _asked_to_stop(heard) and not told:
                    told = True
                    process.send_signal(signal.SIGTERM)
                if (silence := beats.look()) is not None:
                    lines = where_each_is({task.rank: process.pid}, {task.rank: log_path})
                    doing = "as it starts" if silence.phase == "start" else f"in its {silence.phase}"
                    reason = f"rank {task.rank} hangs {doing}: no sign for {silence.seconds:.0f} s"
                    return runs.FAILED, "\n  ".join([reason, *lines, f"log: {log_path}"])
                beat()
                time.sleep(0.1)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code == runs.DONE:
        return code, "done"
    if code == runs.SAVED:
        return code, "stopped and saved"
    if code < 0:
        return runs.FAILED, f"rank {task.rank} was killed by {signal.Signals(-code).name}\n  log: {log_path}"
    said = local.error_of(log_path.read_text(encoding="utf-8", errors="replace"))
    return code, f"rank {task.rank}: {said}\n  log: {log_path}"


def _environment(task: Task, start: dict[str, Any], logs: Path, beats: str) -> dict[str, str]:
    per_node = task.world_size // task.nodes
    return local.rank_environment() | {
        "RANK": str(task.rank),
        "WORLD_SIZE": str(task.world_size),
        "LOCAL_RANK": str(task.local_rank),
        "LOCAL_WORLD_SIZE": str(per_node),
        "LOCAL_SIZE": str(per_node),
        "NODE_RANK": str(task.node),
        "GROUP_RANK": str(task.node),
        "MASTER_ADDR": start["address"],
        "MASTER_PORT": str(start["port"]),
        "OMP_NUM_THREADS": os.environ.get("SLURM_CPUS_PER_TASK", "1"),
        "FLEETUNE_LOGS": str(logs),
        "FLEETUNE_BEATS": beats,
    }


def _asked_to_stop(heard: list[int]) -> bool:
    return any(number != signal.SIGCONT for number in heard)


def _notes(run: runs.Run, job: str, restart: int) -> Path:
    return run.path / "slurm" / f"{job}-{restart}"


def _note(notes: Path, name: str, value: dict[str, Any]) -> None:
    runs.write_json(notes / f"{name}.json", value)


# ---------------------------------------------------------------- how it ended, and what follows


@dataclass(frozen=True)
class End:
    kind: str  # done | cancel | time_limit | preemption | node_failure | crash | wrong
    code: int
    reason: str


def conclude(run: runs.Run, job: str, restart: int, srun_code: int) -> int:
    """The batch script's last word: ends the attempt and requeues, or not. Returns the job's exit code."""
    notes = _notes(run, job, restart)
    end = _end_of(run, notes, srun_code)
    verdict = _record(run, notes, end)
    if verdict is None and end.kind not in ("done", "cancel", "wrong"):
        try:
            slurm.requeue(job)
            time.sleep(30.0)  # Slurm ends this script
        except slurm.SlurmFailed as error:
            verdict = f"cannot be requeued ({error}); `fleetune submit` goes on with it"
    if verdict is not None:
        print(f"fleetune: error: {run.path}: {verdict}", file=sys.stderr)
    return 0 if end.kind in ("done", "cancel") else 1


def _end_of(run: runs.Run, notes: Path, srun_code: int) -> End:
    ended = [runs.read_json(path) for path in sorted(notes.glob("ended-*.json"))]
    failed = [one for one in ended if one["code"] not in (runs.DONE, runs.SAVED)]
    if failed:
        first = min(failed, key=lambda one: (one["code"] != runs.FAILED_FOR_GOOD, one["time"]))
        kept = first["code"] if first["code"] in (runs.WRONG, runs.FAILED_FOR_GOOD) else runs.FAILED
        return End("crash" if kept == runs.FAILED else "wrong", kept, first["reason"])
    if ended and all(one["code"] == runs.DONE for one in ended) and srun_code == 0:
        return End("done", runs.DONE, "done")
    if any(one["code"] == runs.SAVED for one in ended) and srun_code == 0:
        if (run.path / "cancel.json").exists():
            return End("cancel", runs.SAVED, "cancelled: stopped and saved")
        if _time_is_over(run, notes.name.partition("-")[0]):
            return End("time_limit", runs.SAVED, "the time limit is near: stopped and saved")
        return End("preemption", runs.SAVED, "preempted: stopped and saved")
    return End("crash", runs.FAILED, f"a task ended without a word (srun: {srun_code})")


def _time_is_over(run: runs.Run, job: str) -> bool:
    """Whether Slurm's signal was that of the time limit: it comes up to a minute early."""
    with contextlib.suppress(slurm.SlurmFailed, OSError, KeyError):
        left = slurm.seconds_left(job)
        return left is not None and left < runs.read_json(run.path / "job.json")["stop_seconds"] + 65
    return False


def _record(run: runs.Run, notes: Path, end: End) -> str | None:
    """Ends the attempt. Returns why the run is given up, or None."""
    start = runs.read_json(notes / "start.json") if (notes / "start.json").exists() else None
    if start is not None:
        nodes: list[str] = next(
            (e["nodes"] for e in runs.read_jsonl(run.attempts) if e["attempt"] == start["attempt"]), []
        )
        runs.end_attempt(run, start["attempt"], end.code, end.reason, nodes, time.time() - start["time"], kind=end.kind)
    if end.kind in ("done", "cancel"):
        return None
    if end.kind == "wrong":
        return end.reason
    return given_up(run)


def given_up(run: runs.Run) -> str | None:
    """Why no further attempt is made, by the budgets of the recipe; None where one may be. Sending it anew is a new
    beginning: what was before is not counted."""
    sent = 0.0
    with contextlib.suppress(OSError, ValueError, KeyError):
        sent = float(runs.read_json(run.path / "job.json")["sent"]) - 1.0  # attempts are dated by the second
    ends = [
        entry
        for entry in runs.read_jsonl(run.attempts)
        if entry["event"] == "end" and datetime.datetime.fromisoformat(entry["time"]).timestamp() >= sent
    ]
    retries = run.recipe().retries
    last = ends[-1] if ends else {}
    kind = last.get("kind", "crash")
    count = sum(entry.get("kind") == kind for entry in ends)
    budget = getattr(retries, kind, None)
    if budget is not None and count > budget:
        return f"given up after {count} attempts that ended by {kind} (retries.{kind} = {budget}): {last['reason']}"
    reached = [entry.get("last_step") or 0 for entry in ends]
    idle = 0
    for index in range(len(reached) - 1, -1, -1):
        if reached[index] > max(reached[:index], default=0):
            break
        idle += 1
    if idle >= retries.without_progress:
        return f"given up after {idle} attempts without a step of progress: {last.get('reason', '')}"
    return None


def _close_last(run: runs.Run, task: Task) -> None:
    """Ends an attempt that Slurm ended before it could be: a dead node, or `scontrol requeue`."""
    for entry in runs.unended(run):
        kind, reason = _why_requeued(run, task, entry["attempt"])
        runs.end_attempt(run, entry["attempt"], runs.FAILED, reason, entry["nodes"], 0.0, kind=kind)
    if task.restart and (verdict := given_up(run)) is not None:
        raise RecipeError(verdict)


def _why_requeued(run: runs.Run, task: Task, attempt: int) -> tuple[str, str]:
    saved = [
        runs.read_json(path)["code"] == runs.SAVED
        for folder in (run.path / "slurm").glob(f"{task.job}-*")
        if (folder / "start.json").exists() and runs.read_json(folder / "start.json")["attempt"] == attempt
        for path in folder.glob("ended-*.json")
    ]
    if saved and all(saved):
        return "preemption", "requeued by Slurm: stopped and saved"
    states = ""
    with contextlib.suppress(slurm.SlurmFailed):
        states = slurm.command(
            "sacct",
            "--noheader",
            "--parsable2",
            "--duplicates",
            "--allocations",
            f"--jobs={task.job}",
            "--format=State",
        )
    if "NODE_FAIL" in states:
        return "node_failure", "a node failed"
    return "preemption", "requeued by Slurm before it was saved"


def main() -> int:
    run, srun_code = runs.Run(Path(sys.argv[1])), int(sys.argv[2])
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    return conclude(run, os.environ["SLURM_JOB_ID"], restart, srun_code)


if __name__ == "__main__":
    sys.exit(main())
