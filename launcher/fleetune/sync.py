"""`fleetune sync`: says which runs are over, and lets `train/sending.py` send what Weights & Biases does not have."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from fleetune import runs
from fleetune.cluster import local, slurm
from fleetune.opening import refuse_closed
from fleetune.report import goes_on
from fleetune.schema import RecipeError

LOOK_SECONDS = 5.0  # between two looks at who has ended: one query to Slurm for all runs
STOP_SECONDS = 20.0  # for what was begun, when asked to stop


class NotSent(RuntimeError):
    """Something could not be sent; carries a line for each run and why."""


def sync(folders: Iterable[Path], watch: bool) -> int:
    """Sends what is there; with `watch`, goes on until every run has ended. Returns the exit code.

    Raises:
        RecipeError: a folder is no run that is tracked by wandb.
        NotSent: a key that is not there or not taken, or, without `watch`, a server that does not answer.
    """
    paths = list(dict.fromkeys(folder.resolve() for folder in folders))
    for path in paths:
        _require_tracked(path, watch)
    going = _going_on(paths)
    asked = {"watch": watch, "runs": {str(path): path not in going for path in paths}}
    with (
        local.stopping() as stop,
        tempfile.TemporaryFile("w+", encoding="utf-8") as errors,
        tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".json") as file,  # too long a list for a command
    ):
        json.dump(asked, file)
        file.flush()
        command = [sys.executable, "-m", "fleetune.train.sending", file.name]
        # In a session of its own, so that a Ctrl-C reaches this process alone.
        process = subprocess.Popen(
            command,
            env=local.rank_environment(),
            stdin=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        try:
            _tell_who_ends(process, going if watch else set(), stop)
            _end(process)
        except KeyboardInterrupt:
            return 130
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if stop and process.returncode != runs.DONE:
            return runs.SAVED
        if process.returncode != runs.DONE:
            errors.seek(0)
            raise NotSent(local.error_of(errors.read()))
    return process.returncode


def _require_tracked(path: Path, watch: bool) -> None:
    refuse_closed(path)
    if watch and (path / "run.json").exists():  # it may wait for its nodes, with nothing to send yet
        if runs.Run(path).recipe().tracking.wandb is None:
            raise RecipeError(f"{path}: is not tracked by wandb (its recipe has no tracking.wandb)")
    elif not (path / "wandb" / "feeder.json").exists():
        raise RecipeError(f"{path}: is no run that was tracked by wandb (it has no wandb/feeder.json)")


def _going_on(paths: Iterable[Path]) -> set[Path]:
    """The runs that are being written, or will be: at work, or with a job in the queue, as one that is requeued."""
    paths = list(paths)
    try:
        jobs = slurm.jobs_of(paths)
    except slurm.SlurmFailed:  # it may be restarting: nobody's job is known to be gone
        return {path for path in paths if (path / "job.json").exists() or goes_on(path, None)}
    return {path for path in paths if goes_on(path, jobs.get(path))}


def _tell_who_ends(process: subprocess.Popen[str], going: set[Path], stop: local.Stop) -> None:
    """Until the process has ended, or this one is asked to stop."""
    assert process.stdin is not None
    looked = time.monotonic()
    while process.poll() is None and not stop:
        if going and time.monotonic() - looked > LOOK_SECONDS:
            left, looked = _going_on(going), time.monotonic()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write("".join(f"{path}\n" for path in going - left))
                process.stdin.flush()
            going = left
        time.sleep(0.1)


def _end(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):  # what it has not sent, the next one sends
        process.wait(STOP_SECONDS)
