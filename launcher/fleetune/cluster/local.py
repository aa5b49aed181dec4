"""Runs on this machine: prepares once, starts the ranks as a cluster would, watches them. No torch here."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

from fleetune import opening, runs
from fleetune.attempts import end_attempt, start_attempt
from fleetune.batch import cut_batch, total_steps
from fleetune.cluster.beats import Beats, Silence, where_each_is
from fleetune.recipe import dump_recipe
from fleetune.schema import Recipe, RecipeError

GRACE_SECONDS = 3.0  # for the ranks that are left when one has failed: they mostly end by an error of their own
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class PreparationFailed(RuntimeError):
    """Preparing broke in a way that is nobody's recipe; carries the last lines."""


class StoppedEarly(Exception):
    """Asked to stop before any rank was started."""


@dataclass
class Stop:
    """Whether this process was asked to stop, and by what."""

    signals: list[signal.Signals] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.signals)


@contextlib.contextmanager
def stopping() -> Iterator[Stop]:
    """Within it, a stopping signal only says so, for the ranks to save; a second Ctrl-C is a KeyboardInterrupt."""
    stop = Stop()

    def hear(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and signal.SIGINT in stop.signals:
            raise KeyboardInterrupt
        stop.signals.append(signal.Signals(number))

    before = {number: signal.signal(number, hear) for number in STOPPING}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def count_gpus() -> int:
    """NVIDIA's and AMD's GPUs that this process may use, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", os.environ.get("HIP_VISIBLE_DEVICES"))
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    nvidia = [path for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    amd = list(Path("/sys/module/amdgpu/drivers").glob("pci:amdgpu/*:*")) if Path("/dev/kfd").exists() else []
    return len(nvidia) or len(amd)


@dataclass(frozen=True)
class Layout:
    nodes: int
    nproc_per_node: int
    threads: int  # of each rank

    @property
    def world_size(self) -> int:
        return self.nodes * self.nproc_per_node

    def stored(self) -> dict[str, int]:
        return {"nodes": self.nodes, "nproc_per_node": self.nproc_per_node, "threads": self.threads}

    def of(self, recipe: Recipe) -> dict[str, int]:
        """As an attempt's line has it: with what the recipe says of how the model is cut."""
        return {**self.stored(), "zero_stage": recipe.deepspeed.zero_stage}


def plan_layout(nodes: int, nproc_per_node: int | None) -> Layout:
    """Raises RecipeError where there are fewer GPUs than ranks."""
    gpus = count_gpus()
    nproc = nproc_per_node or gpus or 1
    if gpus and (nodes > 1 or nproc > gpus):
        raise RecipeError(
            f"--nodes {nodes} --nproc-per-node {nproc}: a rank needs a GPU of its own and there are {gpus}; "
            "CUDA_VISIBLE_DEVICES= (nothing) trains on the CPU"
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, cores // (nodes * nproc)))
    return Layout(nodes, nproc, threads)


def rank_environment() -> dict[str, str]:
    quiet = {
        "TOKENIZERS_PARALLELISM": "true",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if count_gpus() == 0:
        quiet["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed warns that it has to find out
    # Gradients and activations are freed and taken anew at every step. glibc would hand each block back to the kernel
    # and fault it in again page by page, which cost a quarter of a CPU step; these keep it, in huge pages.
    memory = {
        "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
        "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
        "THP_MEM_ALLOC_ENABLE": "1",
    }
    return {**quiet, **memory, **os.environ}


def prepare(recipe: Recipe, stop: Stop | None = None, elsewhere: bool = False) -> dict[str, Any]:
    """Checks the recipe against model, data and (not `elsewhere`) machine and fills the token cache, by a program.

    Raises:
        RecipeError: something does not fit.
        PreparationFailed: it broke.
        StoppedEarly: asked to stop.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(dump_recipe(recipe))
        file.flush()
        process = subprocess.Popen(
            [sys.executable, "-m", "fleetune.train.prepare", file.name, *(["--elsewhere"] if elsewhere else [])],
            env=rank_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=die_with_parent,
        )
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    output, errors = process.communicate(timeout=0.2)
                    break
                if stop:
                    raise StoppedEarly
        finally:
            process.kill()  # where it is not done; the cache takes nothing that is half done
            process.wait()
    if stop:
        raise StoppedEarly
    if process.returncode == runs.WRONG:
        raise RecipeError(error_of(errors))
    if process.returncode != runs.DONE:
        raise PreparationFailed("\n".join(errors.strip().splitlines()[-15:]))
    return json.loads(output)  # type: ignore[no-any-return]


def error_of(log: str) -> str:
    """The message that a process left in its log, or its last line."""
    _, marker, message = log.rpartition("fleetune: error: ")
    return message.strip() if marker else (log.strip().splitlines() or ["it left no message"])[-1]


@dataclass
class Outcome:
    run: runs.Run
    exit_code: int
    reason: str
    was_finished: bool = False


def run_recipe(
    recipe: Recipe,
    layout: Layout,
    report: dict[str, Any],
    *,
    fresh: bool,
    watch: Callable[[str], None],
    stop: Stop,
    began: float | None = None,
) -> Outcome:
    """One attempt of a prepared recipe, from its start or its newest checkpoint. `watch` gets rank 0's lines;
    `began` is when preparing it began, where that counts to its time.

    Raises:
        RecipeError: the run folder is of another recipe, data or global batch, or another attempt is at work in it.
        StoppedEarly: asked to stop before it began.
    """
    if stop:
        raise StoppedEarly
    steps = total_steps(recipe.training, report["sequences"], cut_batch(recipe.training, layout.world_size))
    run = opening.open_run(recipe, layout.stored(), fresh, report["content"] + report["teachers"], steps)
    if opening.is_finished(run, steps):
        return Outcome(run, runs.DONE, "finished before", was_finished=True)
    with runs.lease(run) as lease, tempfile.TemporaryDirectory(prefix="fleetune-beats-") as beats:
        opening.refuse_replaced(run, recipe)
        host = socket.gethostname()
        nodes = [f"{host}/{node}" if layout.nodes > 1 else host for node in range(layout.nodes)]
        size = cut_batch(recipe.training, layout.world_size).global_batch_size
        precision = {"fp32_for_bf16": True} if report.get("fp32_for_bf16") else {}
        known = {"total_steps": steps, "global_batch_size": size, **precision}
        runs.write_json(run.path / "run.json", run.info() | known)
        attempt = start_attempt(run, nodes, began, layout=layout.of(recipe))
        code, reason = runs.FAILED, "interrupted"
        try:
            program = ["fleetune.train", str(run.path)]
            ranks = _Ranks(layout, run.logs(attempt), watch, Path(beats), program)
            code, reason = ranks.wait(lease.beat, stop, recipe.training.hang_timeout)
        except KeyboardInterrupt:
            code, reason = 128 + signal.SIGINT, "stopped at once; what came after the last checkpoint is lost"
        except RecipeError as taken_over:  # the lease is another's
            code, reason = runs.FAILED, str(taken_over)
        finally:
            with contextlib.suppress(OSError):  # a full disk; what the attempt came to is still said
                end_attempt(run, attempt, code, reason)
    return Outcome(run, code, reason)


def run_program(
    layout: Layout,
    program: list[str],
    logs: Path,
    watch: Callable[[str], None] = lambda line: None,
    stop: Stop | None = None,
    beat: Callable[[], None] = lambda: None,
) -> tuple[int, str]:
    """Another of train/'s programs on the ranks of a layout: (exit code, reason). `watch` gets rank 0's lines."""
    logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fleetune-beats-") as beats:
        ranks = _Ranks(layout, logs, watch, Path(beats), program)
        return ranks.wait(beat, Stop() if stop is None else stop, None)


@dataclass
class _Ranks:
    """The processes of one attempt."""

    layout: Layout
    logs: Path
    watch: Callable[[str], None]
    beats: Path
    program: list[str]
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        port = _free_port()
        for rank in range(self.layout.world_size):
            node, local = divmod(rank, self.layout.nproc_per_node)
            environment = rank_environment() | {
                "RANK": str(rank),
                "WORLD_SIZE": str(self.layout.world_size),
                "LOCAL_RANK": str(local),
                "LOCAL_WORLD_SIZE": str(self.layout.nproc_per_node),
                "LOCAL_SIZE": str(self.layout.nproc_per_node),
                "NODE_RANK": str(node),
                "GROUP_RANK": str(node),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": str(self.layout.threads),
                "FLEETUNE_LOGS": str(self.logs),
                "FLEETUNE_BEATS": str(self.beats),
            }
            if sys.platform == "linux":
                environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host name that does not resolve must not matter
            with self.log(rank).open("a") as log:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", *self.program],
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.PIPE if rank == 0 else log,
                        stderr=log,
                        encoding="utf-8",
                        errors="replace",
                        start_new_session=True,
                        preexec_fn=_become_rank,
                    )
                )

    def log(self, rank: int) -> Path:
        return self.logs / f"rank-{rank}.log"

    def wait(self, beat: Callable[[], None], stop: Stop, hang_timeout: float | None) -> tuple[int, str]:
        """Until all are done or saved, or one has failed or hangs and the others are stopped: (exit code, reason)."""
        output = self.processes[0].stdout
        assert output is not None
        relay = threading.Thread(target=self._relay, args=(output,), daemon=True)
        relay.start()
        beats = Beats(self.beats, list(range(len(self.processes))), hang_timeout)
        told, grace = False, 0.0
        try:
            while True:
                codes = [process.poll() for process in self.processes]
                failed = [rank for rank, code in enumerate(codes) if code not in (None, runs.DONE, runs.SAVED)]
                if failed:
                    grace = GRACE_SECONDS
                    return self._failure(failed, codes)
                if None not in codes:
                    return self._end(codes, stop)
                if stop and not told:
                    told = True
                    self._signal(signal.SIGTERM)  # one flag, whatever asked for it; they agree on the step
                beats.ranks = [rank for rank, code in enumerate(codes) if code is None]
                if (silence := beats.look()) is not None:
                    return self._hang(silence)
                beat()
                time.sleep(0.1)
        finally:
            self.stop(grace)
            relay.join(timeout=5.0)

    def _end(self, codes: list[int | None], stop: Stop) -> tuple[int, str]:
        if runs.SAVED not in codes:
            return runs.DONE, "done"
        asked = f" by {stop.signals[0].name}" if stop else ", as one of its ranks was asked to"
        return runs.SAVED, f"stopped and saved{asked}"

    def _failure(self, failed: list[int], codes: list[int | None]) -> tuple[int, str]:
        # Of several in one look, the one that says most: failed for good, killed, then the one whose log was written
        # first. The others' errors are mostly that it has gone.
        def key(rank: int) -> tuple[bool, bool, float]:
            return codes[rank] != runs.FAILED_FOR_GOOD, (codes[rank] or 0) > 0, self.log(rank).stat().st_mtime

        rank = min(failed, key=key)
        code = codes[rank] or 0
        if code < 0:
            reason = f"rank {rank} was killed by {signal.Signals(-code).name}"
        else:
            reason = f"rank {rank}: " + error_of(self.log(rank).read_text(encoding="utf-8", errors="replace"))
        kept = code if code in (runs.WRONG, runs.FAILED_FOR_GOOD) else runs.FAILED
        return kept, f"{reason}\n  log: {self.log(rank)}"

    def _hang(self, silence: Silence) -> tuple[int, str]:
        left = {rank: process.pid for rank, process in enumerate(self.processes) if process.poll() is None}
        lines = where_each_is(left, {rank: self.log(rank) for rank in left})
        doing = "as they start" if silence.phase == "start" else f"in their {silence.phase}"
        reason = (
            f"the ranks hang {doing}: no sign of rank {silence.rank} for {silence.seconds:.0f} s, "
            f"and {silence.limit:.0f} s is the most it may take"
        )
        return runs.FAILED, "\n  ".join([reason, *lines, f"stacks and logs: {self.logs}"])

    def _relay(self, output: IO[str]) -> None:
        with self.log(0).open("a", encoding="utf-8") as log:
            for line in output:
                with contextlib.suppress(OSError):  # a full disk must not stop rank 0, whose pipe this empties
                    log.write(line)
                    log.flush()
                with contextlib.suppress(OSError, ValueError):  # nobody looks any more; the log goes on
                    self.watch(line.rstrip("\n"))

    def stop(self, grace: float) -> None:
        """SIGKILL to every rank that is left after a grace; a stopped one, too."""
        deadline = time.monotonic() + grace
        while any(process.poll() is None for process in self.processes) and time.monotonic() < deadline:
            time.sleep(0.05)
        self._signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def _signal(self, number: signal.Signals) -> None:
        for process in self.processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number) if number != signal.SIGKILL else os.killpg(process.pid, number)


def die_with_parent() -> None:
    """In a child, before it is another program."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _become_rank() -> None:
    """In the child, before it is Python: no rank outlives its spawner, and none dies of a signal to stop that comes
    before it can hear one."""
    die_with_parent()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
