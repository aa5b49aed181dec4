"""What runs on the nodes beside the ranks: a supervisor for each task.

A supervisor starts `python -m fleetune.train RUN` as a process group of its own, passes signals on, watches its beats,
and writes down how it ended in RUN/slurm/JOB-RESTART/. It ends with 0 where its rank is done or saved, so that srun's
--kill-on-bad-exit never strikes a rank that is still saving, and with 1 otherwise, so that it strikes the others.

What follows from how they ended is `verdict`'s.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from fleetune import opening, runs
from fleetune.attempts import start_attempt
from fleetune.batch import cut_batch, total_steps
from fleetune.cluster import local, slurm
from fleetune.cluster.beats import Beats, Silence, where_each_is
from fleetune.cluster.verdict import close_last, notes_of, sent_at
from fleetune.recipe import dump_recipe, in_this_machines_precision
from fleetune.schema import Recipe, RecipeError

LEASE_WAIT = 2 * runs.LEASE_SECONDS  # for the lease of an attempt whose node died
GRACE_SECONDS = 5.0  # in which other ranks may still say how they ended
HANG_SECONDS = 60.0  # or where they hang: a network file system shows a new file late


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
    notes = notes_of(run, task.job, task.restart)
    notes.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        _make_caches_private()
        with _lead(run, task, notes, heard) if task.rank == 0 else contextlib.nullcontext(lambda: None) as beat:
            start = _await_start(run, notes, heard)
            code, reason = _train(run, task, notes, start, heard, beat)
    except (RecipeError, local.PreparationFailed) as error:
        code = runs.WRONG if isinstance(error, RecipeError) else runs.FAILED
        reason = str(error)
    except local.StoppedEarly:
        code, reason = runs.SAVED, "asked to stop before training began"
    _note(notes, f"ended-{task.rank}", {"code": code, "reason": reason, "signals": heard, "time": time.time()})
    if code not in (runs.DONE, runs.SAVED):
        _let_others_speak(notes, task)
        raise SystemExit(1)


def _let_others_speak(notes: Path, task: Task) -> None:
    """This task's end is that of all: --kill-on-bad-exit. Of ranks that hang, each is to say where first."""
    hangs = (notes / "hang.json").exists()
    deadline = time.monotonic() + (HANG_SECONDS if hangs else GRACE_SECONDS)
    while time.monotonic() < deadline and len(list(notes.glob("ended-*.json"))) < task.world_size:
        time.sleep(1.0)


def _make_caches_private() -> None:
    """The folder in `cache_dir` on this node: what is compiled there is loaded as code, so that none but this user may
    write to it. Raises PreparationFailed where it cannot be made, RecipeError where it is another's."""
    if (name := os.environ.get("FLEETUNE_COMPILED")) is None:
        return
    folder, where = Path(name), f"cache_dir: {name} on {socket.gethostname()}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        is_own = folder.lstat().st_uid == os.getuid()  # of a link, whose it is
        if is_own:
            folder.chmod(0o700)
    except OSError as error:
        right = "cache_dir should be a folder in which every user may make one, as /tmp; a container's needs a mount"
        raise local.PreparationFailed(f"{where} cannot be made: {error.strerror}; {right}") from None
    if not is_own:
        raise RecipeError(f"{where} belongs to another user, and no compiled code is taken from it; choose another")


# ---------------------------------------------------------------- rank 0 begins the attempt


@contextlib.contextmanager
def _lead(run: runs.Run, task: Task, notes: Path, heard: list[int]) -> Any:
    """Prepares the data, opens the run as these nodes run it, takes its lease, and tells the others where to meet."""
    close_last(run, task.job, task.restart)
    _stop_early(run, heard)
    layout = local.Layout(task.nodes, task.world_size // task.nodes, int(os.environ.get("SLURM_CPUS_PER_TASK", "1")))
    asked = run.recipe()
    report = local.prepare(asked, _Asked(heard=heard, run=run))
    recipe = in_this_machines_precision(asked, report)
    batch = cut_batch(recipe.training, task.world_size)
    steps = total_steps(recipe.training, report["sequences"], batch)
    if recipe is not asked:
        runs.write_json(run.path / "run.json", run.info() | {"fp32_for_bf16": True})
        runs.write_text(run.recipe_file, dump_recipe(recipe))
    _await_free(run)
    close_last(run, task.job, task.restart)  # one that seemed to be at work, as its lease had not run out
    opening.open_run(_at(recipe, run), layout.stored(), False, report["content"] + report["teachers"], steps)
    runs.write_json(
        run.path / "run.json", run.info() | {"total_steps": steps, "global_batch_size": batch.global_batch_size}
    )
    with _patient_lease(run) as lease:
        _stop_early(run, heard)  # the last moment: once the others are told to start, each of them does
        hosts = slurm.hosts(task.node_list)
        began = psutil.Process().create_time()
        attempt = start_attempt(run, hosts, began, sent_at(run), layout.of(recipe))
        address, port = _meeting_place(hosts)
        _note(notes, "start", {"attempt": attempt, "address": address, "port": port, "time": time.time()})
        yield lease.beat


def _at(recipe: Recipe, run: runs.Run) -> Recipe:
    """The recipe as it names the folder that the run stands in: it was sent from another working folder perhaps."""
    return recipe.model_copy(update={"output_dir": str(run.path.parent), "name": run.path.name})


def _await_free(run: runs.Run) -> None:
    """Until the lease of an attempt that Slurm ended, and that could not give it back, has run out.

    Raises PreparationFailed where it does not: another attempt is at work, and this one may come again.
    """
    deadline = time.monotonic() + LEASE_WAIT
    while runs.is_at_work(run):
        if time.monotonic() > deadline:
            raise local.PreparationFailed(f"{run.path}: another attempt is still at work on this run")
        time.sleep(1.0)


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


def _await_start(run: runs.Run, notes: Path, heard: list[int]) -> dict[str, Any]:
    """However long rank 0 prepares the data: where it dies, srun or Slurm ends those that wait."""
    pause = 0.2
    while not (notes / "start.json").exists():
        _stop_early(run, heard)
        if (ended := notes / "ended-0.json").exists():
            found = runs.read_json(ended)
            if found["code"] == runs.SAVED:  # it was asked to stop, as this one will be
                raise local.StoppedEarly
            raise local.PreparationFailed(f"rank 0 did not start: {found['reason']}")
        time.sleep(pause)
        pause = min(2.0, 1.2 * pause)  # there may be a thousand that look
    return runs.read_json(notes / "start.json")


def _train(
    run: runs.Run, task: Task, notes: Path, start: dict[str, Any], heard: list[int], beat: Callable[[], None]
) -> tuple[int, str]:
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
        told, looks = False, 0
        try:
            while (code := process.poll()) is None:
                looks += 1  # ten a second; every five seconds it asks the shared file system, too
                asks = looks % 50 == 0
                if not told and (_asked_to_stop(heard) or (asks and _is_cancelled(run))):
                    told = True
                    process.send_signal(signal.SIGTERM)
                silence = beats.look()
                if silence is not None or (asks and (notes / "hang.json").exists()):
                    return _hang(notes, task.rank, silence, process.pid, log_path)
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


def _hang(notes: Path, rank: int, silence: Silence | None, pid: int, log: Path) -> tuple[int, str]:
    """Tells the other supervisors, where it is the first that finds it, and has this rank say where it is."""
    if silence is not None and not (notes / "hang.json").exists():
        _note(notes, "hang", asdict(silence))
    where = where_each_is({rank: pid}, {rank: log})
    return runs.FAILED, "\n  ".join([f"rank {rank} hangs", *where, f"log: {log}"])


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


@dataclass(kw_only=True)
class _Asked(local.Stop):
    """Whether this task was asked to stop, by a signal or by the run's folder."""

    heard: list[int]
    run: runs.Run

    def __bool__(self) -> bool:
        return _asked_to_stop(self.heard) or _is_cancelled(self.run)


def _stop_early(run: runs.Run, heard: list[int]) -> None:
    if _Asked(heard=heard, run=run):
        raise local.StoppedEarly


def _is_cancelled(run: runs.Run) -> bool:
    """The signal may have come before there was a task to hear it, or have been lost with its node."""
    return (run.path / "cancel.json").exists()


def _note(notes: Path, name: str, value: dict[str, Any]) -> None:
    runs.write_json(notes / f"{name}.json", value)
