"""The run folder: its paths, identity, files, lease. Nothing here imports torch."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from fleetune.batch import cut_batch
from fleetune.recipe import dump_recipe, flatten, parse_recipe
from fleetune.schema import Recipe, RecipeError

# Exit codes of every command.
DONE, FAILED, WRONG, FAILED_FOR_GOOD, SAVED = 0, 1, 2, 3, 75

LEASE_SECONDS = 60.0  # a lease whose heartbeat is older is nobody's
MAY_CHANGE = (
    "output_dir",  # the folder was found by it; it may have moved
    "training.num_train_epochs",
    "training.max_steps",
    "training.logging_steps",
    "training.hang_timeout",
    # How a global batch is cut; the batch itself is compared.
    "training.global_batch_size",
    "training.gradient_accumulation_steps",
    "training.per_device_train_batch_size",
    "training.sequence_parallel_size",
    "tracking.",
    "checkpoint.",
    "retries.",
    "deepspeed.",
    "teacher.deepspeed.offload_",
)
PACKAGES = ("fleetune", "torch", "deepspeed", "transformers", "datasets", "tokenizers", "numpy", "wandb")


@dataclass(frozen=True)
class Run:
    path: Path

    @property
    def recipe_file(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def attempts(self) -> Path:
        return self.path / "attempts.jsonl"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def eval(self) -> Path:
        return self.path / "eval.json"

    def recipe(self) -> Recipe:
        return parse_recipe(self.recipe_file.read_text(encoding="utf-8"), str(self.recipe_file))

    def info(self) -> dict[str, Any]:
        return read_json(self.path / "run.json")

    def logs(self, attempt: int) -> Path:
        return self.path / "logs" / f"attempt-{attempt}"


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def write_json(path: Path, value: dict[str, Any]) -> None:
    """By rename, so that a reader never sees half of it."""
    beside = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    beside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def source_commit() -> str | None:
    """The commit of the checkout that Fleetune runs from; None for an installed package, wherever it lies."""
    git = ["git", "-C", str(Path(__file__).parent)]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        for command in (["ls-files", "--error-unmatch", __file__], ["describe", "--always", "--dirty", "--abbrev=12"]):
            done = subprocess.run([*git, *command], capture_output=True, text=True, check=True)
        return done.stdout.strip() or None
    return None


# ---------------------------------------------------------------- identity


def open_run(
    recipe: Recipe,
    layout: dict[str, int],
    fresh: bool = False,
    data: str | None = None,
    steps: int | None = None,
    is_queued: bool | None = None,
) -> Run:
    """Makes the recipe's run folder, or takes up the one that is there, on whatever ranks.

    One that began in fp32, on a machine without the bf16 that the recipe asks for, goes on so on any other. One that
    failed before it had logged or saved anything may be of another recipe now, and begins anew.
    `layout` holds nodes, nproc_per_node, threads; `data` is a hash of the prepared data; `steps` is the run's length;
    `is_queued` says whether a job of it may be in a cluster's queue: where one was ever sent, when absent.

    Raises:
        RecipeError: the folder is of another recipe, global batch, data or user, has gone further, is no run folder,
            cannot be made, or is at work.
    """
    if fresh:
        recipe = recipe.model_copy(update={"name": free_name(recipe)})
    run = Run(Path(recipe.output_dir) / recipe.name)
    is_there = (run.path / "run.json").exists()
    is_queued = (run.path / "job.json").exists() if is_queued is None else is_queued
    goes_on = is_there and (is_queued or _has_trained(run))
    if goes_on:
        recipe = as_it_began(recipe, run)
    text = dump_recipe(recipe)
    parse_recipe(text, str(run.recipe_file))  # as the ranks will: a name may have grown too long
    try:
        if is_there:
            refuse_another_attempt(run.path / "lease.json")  # before what it reads is changed
            refuse_another_recipe(run, recipe, layout, data, is_queued)
            _refuse_fewer_steps(run, steps)
        else:
            _make(run, recipe, layout)
        info = {**run.info(), "layout": layout, **({} if data is None else {"data": data})}
        if is_there and not goes_on:
            info.pop("fp32_for_bf16", None)
            info |= {"versions": versions(), "commit": source_commit()}
        write_json(run.path / "run.json", info)
        write_text(run.recipe_file, text)
    except OSError as error:
        raise RecipeError(f"output_dir/name = {str(run.path)!r}: cannot be written: {error.strerror}") from None
    return run


def free_name(recipe: Recipe) -> str:
    name, number = recipe.name, 2
    while (Path(recipe.output_dir) / name).exists():
        name, number = f"{recipe.name}-{number}", number + 1
    return name


def as_it_began(recipe: Recipe, run: Run) -> Recipe:
    """In the precision that the machines turned out to have on which the run began."""
    if (run.path / "run.json").exists() and run.info().get("fp32_for_bf16"):
        return recipe.model_copy(update={"training": recipe.training.model_copy(update={"bf16": False})})
    return recipe


def _make(run: Run, recipe: Recipe, layout: dict[str, int]) -> None:
    """The folder with its run.json; takes up one that a kill has left without."""
    run.path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if any(not path.name.startswith(".run.json.") for path in run.path.iterdir()):
        raise RecipeError(
            f"output_dir/name = {str(run.path)!r}: is there already and is no run folder; "
            "choose another name, or --fresh"
        )
    run.path.chmod(0o700)
    made = {
        "id": secrets.token_hex(4),
        "name": recipe.name,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
    }
    write_json(run.path / "run.json", {**made, "commit": source_commit(), "layout": layout})


def write_text(path: Path, text: str, sync: bool = False) -> None:
    """By rename; with `sync` a power loss leaves the old text or the new."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        if sync:
            os.fsync(file.fileno())
    beside.replace(path)


def differences(stored: Recipe, new: Recipe, may_change: tuple[str, ...] = MAY_CHANGE) -> list[str]:
    """A line for each key that differs and may not, when a run is taken up again."""
    old, now = (
        {key: value for key, value in flatten(recipe.model_dump(mode="json")) if value not in (None, [], {})}
        for recipe in (stored, new)
    )
    keys = [key for key in {**old, **now} if old.get(key) != now.get(key) and not key.startswith(may_change)]
    said = [{key: repr(values[key]) if key in values else "nothing" for key in keys} for values in (old, now)]
    return [f"{key}: {said[0][key]} in the run, {said[1][key]} now" for key in keys]


def _refuse_fewer_steps(run: Run, steps: int | None) -> None:
    reached = max((int(path.parent.name[5:]) for path in run.checkpoints.glob("step-*/MANIFEST.json")), default=0)
    if steps is not None and reached > steps:
        raise RecipeError(
            f"training.max_steps: the recipe comes to {steps} steps, and {run.path} has done {reached} (--fresh begins "
            "anew)"
        )


def refuse_another_recipe(
    run: Run, recipe: Recipe, layout: dict[str, int], data: str | None = None, is_queued: bool = False
) -> None:
    """Raises RecipeError with the differences where the run that is there is of another recipe, or another user's."""
    if run.path.stat().st_uid != os.getuid():
        raise RecipeError(f"{run.path}: belongs to another user; what stands in it is not opened")
    changed = (
        differences(run.recipe(), as_it_began(recipe, run)) if run.recipe_file.exists() else []
    )  # killed before it was written
    if changed and (is_queued or _has_trained(run)):
        raise RecipeError(
            f"{run.path} is a run of another recipe (--fresh takes the next free name):\n  " + "\n  ".join(changed)
        )
    moved = _other_batch(run, recipe, layout) if run.recipe_file.exists() else []
    if data is not None and run.info().get("data", data) != data:
        moved.append("the data are not those it was trained on: a file, what is made of it, or a teacher has changed")
    if moved and any(run.checkpoints.glob("step-*")):
        raise RecipeError(f"{run.path} goes on only as it began (--fresh begins anew):\n  " + "\n  ".join(moved))


def refuse_replaced(run: Run, recipe: Recipe) -> None:
    """Raises RecipeError where the run that was opened is of another recipe by now: as long as it has not trained,
    another process may open it so."""
    named = recipe.model_copy(update={"name": run.path.name})  # a fresh one has another than was asked for
    if changed := differences(run.recipe(), as_it_began(named, run)):
        raise RecipeError(f"{run.path}: another recipe has just taken its place:\n  " + "\n  ".join(changed))


def _has_trained(run: Run) -> bool:
    logged = run.metrics.exists() and run.metrics.stat().st_size > 0
    return logged or any(run.checkpoints.glob("step-*"))


def _other_batch(run: Run, recipe: Recipe, layout: dict[str, int]) -> list[str]:
    """A line where the steps are not of as many examples as before."""
    before, now = (
        cut_batch(one.training, place["nodes"] * place["nproc_per_node"])
        for one, place in ((run.recipe(), run.info()["layout"]), (recipe, layout))
    )
    size = before.global_batch_size
    if size == now.global_batch_size:
        return []
    return [
        f"{now}: the run's steps are of {size}; training.global_batch_size={size} keeps that on any number of ranks"
    ]


def is_finished(run: Run, steps: int) -> bool:
    """Whether the run has its report and has no more steps to go: it reached them, or stopped early."""
    if not run.eval.exists() or not run.attempts.exists():
        return False
    report, attempts = read_json(run.eval), read_jsonl(run.attempts)
    return bool(attempts) and attempts[-1].get("exit_code") == DONE and report["total_steps"] == steps


# ---------------------------------------------------------------- files of a line a record


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Whole lines; one torn by a kill is left out."""
    lines = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def last_json(path: Path, key: str, most: int = 65536) -> dict[str, Any]:
    """The last whole line of a JSONL file that has the key, however long the file is; {} where there is none."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - most))
        for line in reversed(file.read().split(b"\n")):
            with contextlib.suppress(ValueError):
                found = json.loads(line)
                if isinstance(found, dict) and key in found:
                    return found
    return {}


def append_jsonl(path: Path, value: dict[str, Any]) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        size = os.fstat(descriptor).st_size
        is_torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        os.write(descriptor, (("\n" if is_torn else "") + json.dumps(value) + "\n").encode())
    finally:
        os.close(descriptor)


def wandb_url(run: Run) -> str | None:
    """Where Weights & Biases shows the run, by its own word; None where its server has not had it."""
    with contextlib.suppress(OSError):
        return (run.path / "wandb" / "url.txt").read_text(encoding="utf-8")
    return None


# ---------------------------------------------------------------- the lease


@contextlib.contextmanager
def lease(run: Run) -> Iterator[_Lease]:
    """One live attempt a run, by a heartbeat in a file: file locks fail on some network file systems.

    Raises:
        RecipeError: another attempt is alive.
    """
    held = _Lease(run.path / "lease.json", secrets.token_hex(8))
    held.take()
    try:
        yield held
    finally:
        held.release()


@dataclass
class _Lease:
    path: Path
    token: str
    beaten: float = 0.0

    def take(self) -> None:
        refuse_another_attempt(self.path)
        self.path.unlink(missing_ok=True)
        beside = self.path.with_name(f".lease.{self.token}")
        write_json(beside, self._now())
        try:
            os.link(beside, self.path)  # unlike a rename, this fails where another was faster
        except FileExistsError:
            raise RecipeError(f"{self.path.parent}: another attempt is starting on this run") from None
        except OSError:  # a file system without hard links
            beside.replace(self.path)
        finally:
            beside.unlink(missing_ok=True)

    def beat(self) -> None:
        """To be called every few seconds; writes every 10.

        Raises:
            RecipeError: another attempt has taken the run over, while this one's machine slept.
        """
        if time.time() - self.beaten < 10.0:
            return
        held = _held(self.path)
        if held is not None and held["token"] != self.token:
            raise RecipeError(_at_work(self.path, held))
        with contextlib.suppress(OSError):  # a full disk is no reason to stop; on this machine the process counts
            write_json(self.path, self._now())

    def _now(self) -> dict[str, Any]:
        self.beaten = time.time()
        started = psutil.Process().create_time()
        here = {"host": socket.gethostname(), "pid": os.getpid(), "started": started}
        return {**here, "token": self.token, "time": self.beaten}

    def release(self) -> None:
        held = _held(self.path)
        if held is not None and held["token"] == self.token:
            self.path.unlink(missing_ok=True)


def _held(path: Path) -> dict[str, Any] | None:
    """What the lease says; None where there is none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        held = read_json(path)
        if isinstance(held, dict) and {"host", "pid", "started", "token", "time"} <= held.keys():
            return held
    return None


def is_at_work(run: Run) -> bool:
    """Whether an attempt holds the run's lease and lives."""
    held = _held(run.path / "lease.json")
    return held is not None and _lives(held)


def _lives(held: dict[str, Any]) -> bool:
    if held["host"] == socket.gethostname():
        return _process_lives(held["pid"], held["started"])
    return bool(time.time() - held["time"] < LEASE_SECONDS)


def refuse_another_attempt(path: Path) -> None:
    """Raises RecipeError where an attempt that lives holds the lease at `path`."""
    held = _held(path)
    if held is not None and _lives(held):
        raise RecipeError(_at_work(path, held))


def _at_work(path: Path, held: dict[str, Any]) -> str:
    return f"{path.parent}: another attempt is at work on this run (process {held['pid']} on {held['host']})"


def _process_lives(pid: int, started: float) -> bool:
    """Whether that very process lives: a number is given again, in a container nearly always."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - started) < 5.0
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
