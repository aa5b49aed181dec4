"""Sends a run to Slurm by submitit: once, however often and whenever the sending is killed.

What is meant is written down first, with a token of its own, in RUN/job.json; then sbatch is called, once, with the
token in the job's name and comment. Whoever comes next finds the job by the token and finishes what was begun.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import psutil

from fleetune import opening, runs
from fleetune.attempts import end_attempt, unended
from fleetune.batch import cut_batch
from fleetune.cluster import slurm, snapshot
from fleetune.cluster.batch_script import job_name, parameters, python_of
from fleetune.cluster.local import Layout
from fleetune.cluster.profile import CONTROL, Profile
from fleetune.cluster.supervisor import supervise
from fleetune.report import no_run
from fleetune.schema import Recipe, RecipeError, hours_between_failures

SENDING_SECONDS = 60.0  # after which an sbatch that was begun on another machine has come to its end
# What sbatch says where it has had no answer; the controller may have taken the job.
UNANSWERED = re.compile(
    r"timed out|unable to contact|zero bytes|communication|connect(ion|ed)|message (send|receive|length)|"
    r"unexpected message|broken pipe|temporarily",
    re.IGNORECASE,
)
# Variables of the job, or the task, that this process may run in; where the cluster is and who asks, it may say itself.
OF_A_JOB = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_")
OF_THE_SITE = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT")


@dataclass(frozen=True)
class Sent:
    run: runs.Run
    job: str  # Slurm's id
    state: str
    is_new: bool
    changed: tuple[str, ...] = ()  # what has changed since, of which a job in the queue knows nothing


def submit(recipe: Recipe, profile: Profile, after: Path | None = None) -> Sent:
    """Sends the recipe's run, to begin once the run `after` is done; or finds it, where it was sent before.

    Raises:
        RecipeError: the recipe does not fit the profile or the run that is there; Slurm refuses; whether the run was
            sent already cannot be known; or `after` ended before it was done.
    """
    slurm.require()
    before = None if after is None else awaited(after)
    layout = Layout(profile.nodes, profile.ranks, profile.cpus_per_rank)
    cut_batch(recipe.training, layout.world_size)
    with _alone(runs.Run(Path(recipe.output_dir) / recipe.name)):
        return standing(recipe, profile, after) or _send(recipe, profile, layout, after, before)


@contextlib.contextmanager
def _alone(run: runs.Run) -> Iterator[None]:
    """One at a time sends a run; who comes meanwhile waits, and finds its job.

    By a lock beside the run's folder, which may not be there yet. It ends with its process; where the file system has
    no locks, nobody waits.
    """
    if CONTROL.search(str(run.path)):
        raise RecipeError(f"output_dir = {str(run.path.parent)!r}: has a line break or another control character")
    path = run.path.with_name(f".{run.path.name}.sending")
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a")
        except OSError as error:
            raise RecipeError(f"output_dir = {str(path.parent)!r}: cannot be written: {error.strerror}") from None
        with file:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            if not _stands_at(path, file):
                continue  # the one that was waited for has taken it away
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _stands_at(path: Path, file: IO[str]) -> bool:
    with contextlib.suppress(OSError):  # it is not there, or on NFS was taken away elsewhere
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def _send(recipe: Recipe, profile: Profile, layout: Layout, after: Path | None, before: str | None) -> Sent:
    makes = not (Path(recipe.output_dir) / recipe.name).exists()
    recipe = with_failures(recipe, profile)
    run = opening.open_run(recipe, layout.stored(), is_queued=False)
    _forget_cancelling(run)
    code, copy = snapshot.take(run.path / "code")
    token = secrets.token_hex(6)
    job = {
        "token": token,
        "code": code,
        "sent": time.time(),
        "host": os.uname().nodename,
        "folder": _folder(run, token),
        "stop_seconds": profile.stop_seconds,
        "profile": profile.model_dump(mode="json"),
        **({} if after is None else {"after": str(after.absolute()), "waits_for": before}),
    }
    opening.refuse_replaced(run, recipe)
    runs.write_json(run.path / "job.json", job)
    executor = _executor(run, profile, token, copy, before)
    try:
        with _outside_any_job():
            sent = executor.submit(supervise, str(run.path))
    except Exception as error:  # submitit's own kinds: sbatch's words stand in the message
        # sbatch may give up on a slow controller that takes the job nevertheless.
        if (id_ := _by_name(job_name(run, token), _is_refusal(error))) is None:
            (run.path / "job.json").unlink()
            if makes:
                _take_away(run)
            raise RecipeError(f"the run was not sent; {_said(error)}") from None
        _finish(job, id_)
    else:
        id_ = sent.job_id
    runs.write_json(run.path / "job.json", job | {"id": id_})
    return Sent(run, id_, "PENDING", is_new=True)


def awaited(path: Path) -> str | None:
    """The job to wait for until a run is done; None where it is done.

    Raises RecipeError where it is neither done nor in the queue, for then it would be waited for in vain.
    """
    if (said := no_run(path)) is not None:
        raise RecipeError(f"--after {said}")
    run = runs.Run(path)
    if (sent := attached(run)) is not None:
        return sent.job
    last = (runs.read_jsonl(run.attempts) or [{}])[-1]
    if last.get("exit_code") == runs.DONE:
        return None
    reason = str(last.get("reason", "")).partition("\n")[0]
    how = f" ({reason})" if reason else ""
    raise RecipeError(f"--after {path}: is not done, and no job of it is in the queue{how}; submit it first")


def _take_away(run: runs.Run) -> None:
    """What a sending that was refused has made, unless something else stands there by now."""
    if {path.name for path in run.path.iterdir()} <= {"run.json", "recipe.yaml", "code", "submitit"}:
        shutil.rmtree(run.path)


def standing(recipe: Recipe, profile: Profile, after: Path | None = None) -> Sent | None:
    """The recipe's run, where its job is in the queue or it is done; None where it is to be sent.

    Raises RecipeError where that cannot be known, or the run that is there is of another recipe or at work elsewhere.
    """
    slurm.require()
    recipe = with_failures(recipe, profile)
    run = runs.Run(Path(recipe.output_dir) / recipe.name)
    opening.refuse_another_user(run)
    if not (run.path / "run.json").exists():
        return attached(run)
    found = attached(run) or _finished(recipe, run)
    if found is None:
        runs.refuse_another_attempt(run.path / "lease.json")
        layout = Layout(profile.nodes, profile.ranks, profile.cpus_per_rank).stored()
    else:
        layout = run.info()["layout"]
    opening.refuse_another_recipe(run, recipe, layout, is_queued=found is not None)
    if found is None or found.state == "FINISHED" or not run.recipe_file.exists():
        return found
    return replace(found, changed=tuple(_changed(run, recipe, profile, after)))


def _changed(run: runs.Run, recipe: Recipe, profile: Profile, after: Path | None) -> Iterator[str]:
    """The keys of recipe and profile that are others than when the run's job was sent."""
    for line in opening.differences(run.recipe(), opening.as_it_began(recipe, run), ("output_dir",)):
        yield line.partition(":")[0]
    job, now = runs.read_json(run.path / "job.json"), profile.model_dump(mode="json")
    before = job.get("profile", now)
    yield from (f"{key} of the profile" for key in {**before, **now} if before.get(key) != now.get(key))
    if after is not None and job.get("after") != str(after.absolute()):
        yield f"--after {after}"


def _finished(recipe: Recipe, run: runs.Run) -> Sent | None:
    """A run that is done, unless the recipe is longer now."""
    if not (run.path / "run.json").exists() or not run.recipe_file.exists():
        return None
    stored, length = run.recipe().training, ("num_train_epochs", "max_steps")
    as_long = all(getattr(stored, key) == getattr(recipe.training, key) for key in length)
    if as_long and opening.is_finished(run, run.info().get("total_steps", -1)):
        job = runs.read_json(run.path / "job.json").get("id", "") if (run.path / "job.json").exists() else ""
        return Sent(run, job, "FINISHED", is_new=False)
    return None


def _forget_cancelling(run: runs.Run) -> None:
    """Ends an attempt that was cancelled at once, so that the next one does not take it for something else."""
    if not (run.path / "cancel.json").exists():
        return
    for entry in unended(run):
        reason = "cancelled at once; what came after the last checkpoint is lost"
        end_attempt(run, entry["attempt"], runs.FAILED, reason, kind="cancel")
    (run.path / "cancel.json").unlink()


def script(recipe: Recipe, profile: Profile, after: Path | None = None) -> str:
    """The sbatch script as `submit` would write it, with placeholders for the token and the code's hash."""
    slurm.require()
    run = runs.Run(Path(recipe.output_dir) / recipe.name)
    before = None if after is None else awaited(after)
    executor = _executor(run, profile, "TOKEN", run.path / "code" / "HASH", before)
    return str(executor._make_submission_file_text(executor._submitit_command_str, "TOKEN"))


def test_only(text: str) -> str:
    """When and where `sbatch --test-only` would start a script. Raises RecipeError with why it would not."""
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(text)
        file.flush()
        with _outside_any_job():
            done = subprocess.run(["sbatch", "--test-only", file.name], capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.strip().splitlines() if not line.startswith("Try ")]
        raise RecipeError(f"the run would not be sent; {'; '.join(said) or f'sbatch: {done.returncode}'}")
    return " ".join((done.stderr + done.stdout).split())


def attached(run: runs.Run) -> Sent | None:
    """The run's job that is in the queue, found by what job.json says; None where there is none.

    Raises RecipeError where it is being cancelled.
    """
    path = run.path / "job.json"
    if not path.exists():
        return None
    job = runs.read_json(path)
    if "id" not in job:
        _wait_for_sbatch(job)
        if (id_ := _by_name(job_name(run, job["token"]))) is None:
            return None
        _finish(job, id_)
        job["id"] = id_
        runs.write_json(path, job)
    for _ in range(slurm.LOOKS):
        found = slurm.queue().get(job["id"])
        if found is None or not found.is_live:
            return None
        if found.state != "COMPLETING":  # from which it goes back into the queue, or leaves it
            break
        time.sleep(1.0)
    assert found is not None
    if (run.path / "cancel.json").exists():
        raise RecipeError(f"{run.path}: job {found.id} is being cancelled; submit it again when that has ended")
    return Sent(run, found.id, found.state, is_new=False)


def with_failures(recipe: Recipe, profile: Profile) -> Recipe:
    """With the mean time between failures that follows from the profile, where save_steps: auto is given none."""
    settings, rate = recipe.checkpoint, profile.failures_per_node_day
    if settings.save_steps != "auto" or settings.mtbf_hours is not None or rate is None:
        return recipe
    filled = settings.model_copy(update={"mtbf_hours": hours_between_failures(profile.nodes, rate)})
    return recipe.model_copy(update={"checkpoint": filled})


@contextlib.contextmanager
def _outside_any_job() -> Iterator[None]:
    """sbatch takes what stands in the environment for the job's own, and hands it on: from within a job, another's."""
    taken = {name: os.environ[name] for name in os.environ if name.startswith(OF_A_JOB) and name not in OF_THE_SITE}
    for name in taken:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(taken)


def _is_refusal(error: Exception) -> bool:
    """Whether sbatch itself said why there is no job; else the job may be there."""
    return "sbatch: " in str(error) and not UNANSWERED.search(str(error))


def _by_name(name: str, is_refused: bool = False) -> str | None:
    """Raises RecipeError where the job may have left the queue, and nothing keeps account of it. One that was refused
    is in neither."""
    for job in slurm.queue().values():
        if job.name == name:
            return job.id
    if is_refused:
        return None
    accounted = slurm.accounted(names=[name])
    if accounted is None:
        raise RecipeError(
            f"whether job {name} was sent cannot be known: it is not in the queue, and this cluster keeps no accounts "
            "(sacct fails); if it has not run, remove job.json from the run's folder"
        )
    return next(iter(accounted), None)


def _wait_for_sbatch(job: dict[str, Any]) -> None:
    """Until the sbatch that was begun has come to its end: a killed `submit` leaves it running."""
    while time.time() - job["sent"] < SENDING_SECONDS:
        if job["host"] == os.uname().nodename and not _runs(job["folder"]):
            return
        time.sleep(0.1)


def _runs(folder: str) -> bool:
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if words and Path(words[0]).name == "sbatch" and any(word.startswith(folder) for word in words):
            return True
    return False


def _finish(job: dict[str, Any], id_: str) -> None:
    """What submitit does after sbatch: the pickle under the job's own name, for which the job waits 60 s."""
    pickles = [path for path in Path(job["folder"]).glob("*.pkl") if "_" not in path.stem]
    for pickle in pickles:
        folder = Path(job["folder"])
        with contextlib.suppress(FileNotFoundError):
            shutil.move(pickle, folder / f"{id_}_submitted.pkl")


def _folder(run: runs.Run, token: str) -> str:
    return str(run.path / "submitit" / token)


def _executor(run: runs.Run, profile: Profile, token: str, code: Path, before: str | None) -> Any:
    import submitit

    executor = submitit.SlurmExecutor(_folder(run, token), python=python_of(profile, run))
    executor.update_parameters(**parameters(run, profile, token, code, before))
    return executor


def _said(error: Exception) -> str:
    """sbatch's own lines out of submitit's message."""
    lines = [line.strip() for line in str(error).splitlines() if "sbatch:" in line or "error:" in line.lower()]
    return "; ".join(dict.fromkeys(lines)) or str(error).strip().splitlines()[-1]
