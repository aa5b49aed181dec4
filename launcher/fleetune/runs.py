"""The run folder: its paths, identity, attempts, lease. Nothing here imports torch."""

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

from fleetune.recipe import dump_recipe, flatten, parse_recipe
from fleetune.schema import Recipe, RecipeError

# Exit codes of every command.
DONE, FAILED, WRONG, FAILED_FOR_GOOD, SAVED = 0, 1, 2, 3, 75

LEASE_SECONDS = 60.0  # a lease whose heartbeat is older is nobody's
MAY_CHANGE = (
    "training.num_train_epochs",
    "training.max_steps",
    "training.logging_steps",
    "tracking.",
    "checkpoint.save_steps",
    "checkpoint.save_total_limit",
    "deepspeed.offload_",
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
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def source_commit() -> str | None:
    """The commit of the checkout that Fleetune runs from; None for an installed package."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    with contextlib.suppress(OSError):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() or None
    return None


# ---------------------------------------------------------------- identity


def open_run(recipe: Recipe, layout: dict[str, int], fresh: bool = False) -> Run:
    """Makes the recipe's run folder, or takes up the one that is there; `layout` holds nodes, nproc_per_node, threads.

    Raises:
        RecipeError: the folder is of another recipe or layout, or is no run folder.
    """
    base = Path(recipe.output_dir) / recipe.name
    if fresh:
        name, number = recipe.name, 2
        while (Path(recipe.output_dir) / name).exists():
            name, number = f"{recipe.name}-{number}", number + 1
        recipe = recipe.model_copy(update={"name": name})
        base = Path(recipe.output_dir) / name
    run = Run(base)
    if (run.path / "run.json").exists():
        _refuse_another_recipe(run, recipe, layout)
    elif run.path.exists() and any(run.path.iterdir()):
        raise RecipeError(
            f"output_dir/name = {str(run.path)!r}: is there already and is no run folder; "
            "choose another name, or --fresh"
        )
    else:
        run.path.mkdir(parents=True, exist_ok=True)
        run.path.chmod(0o700)
        write_json(
            run.path / "run.json",
            {
                "id": secrets.token_hex(4),
                "name": recipe.name,
                "created": _now(),
                "versions": versions(),
                "commit": source_commit(),
                "layout": layout,
            },
        )
    write_text(run.recipe_file, dump_recipe(recipe))
    return run


def write_text(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def differences(stored: Recipe, new: Recipe) -> list[str]:
    """A line for each key that differs and may not, when a run is taken up again."""
    old, now = (dict(flatten(recipe.model_dump(mode="json"))) for recipe in (stored, new))
    keys = [key for key in {**old, **now} if old.get(key) != now.get(key) and not key.startswith(MAY_CHANGE)]
    return [f"{key}: {old.get(key)!r} in the run, {now.get(key)!r} now" for key in keys]


def _refuse_another_recipe(run: Run, recipe: Recipe, layout: dict[str, int]) -> None:
    changed = differences(run.recipe(), recipe)
    if changed:
        raise RecipeError(
            f"{run.path} is a run of another recipe (--fresh takes the next free name):\n  " + "\n  ".join(changed)
        )
    stored = run.info()["layout"]
    moved = [f"{key} = {layout[key]}: the run has {stored[key]}" for key in layout if stored.get(key) != layout[key]]
    if moved and any(run.checkpoints.glob("step-*")):
        raise RecipeError(f"{run.path} goes on only as it began (--fresh begins anew):\n  " + "\n  ".join(moved))
    write_json(run.path / "run.json", {**run.info(), "layout": layout})


def is_finished(run: Run, steps: int) -> bool:
    """Whether the run has its report and has no more steps to go: it reached them, or stopped early."""
    if not run.eval.exists() or not run.attempts.exists():
        return False
    report, attempts = read_json(run.eval), read_jsonl(run.attempts)
    return bool(attempts) and attempts[-1].get("exit_code") == DONE and report["total_steps"] == steps


# ---------------------------------------------------------------- attempts


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Whole lines; one torn by a kill is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def append_jsonl(path: Path, value: dict[str, Any]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, (json.dumps(value) + "\n").encode())
    finally:
        os.close(descriptor)


def start_attempt(run: Run, nodes: list[str]) -> int:
    """Records the attempt; returns its number, counted from 1."""
    number = 1 + max((entry["attempt"] for entry in read_jsonl(run.attempts)), default=0)
    run.logs(number).mkdir(parents=True, exist_ok=True)
    append_jsonl(run.attempts, {"attempt": number, "event": "start", "time": _now(), "nodes": nodes})
    return number


def end_attempt(run: Run, number: int, exit_code: int, reason: str, nodes: list[str], seconds: float) -> None:
    span = run.logs(number) / "steps.json"  # written by rank 0
    steps = read_json(span) if span.exists() else {}
    append_jsonl(
        run.attempts,
        {
            "attempt": number,
            "event": "end",
            "time": _now(),
            "exit_code": exit_code,
            "reason": reason,
            "nodes": nodes,
            "seconds": round(seconds, 3),
            "first_step": steps.get("first"),
            "last_step": steps.get("last"),
        },
    )


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


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
        with contextlib.suppress(OSError, ValueError):
            other = read_json(self.path)
            here = other["host"] == socket.gethostname()
            alive = _process_lives(other["pid"]) if here else time.time() - other["time"] < LEASE_SECONDS
            if alive:
                raise RecipeError(
                    f"{self.path.parent}: another attempt is at work on this run "
                    f"(process {other['pid']} on {other['host']})"
                ) from None
        self.beat()

    def beat(self) -> None:
        """To be called every few seconds; writes every 10."""
        if time.time() - self.beaten >= 10.0:
            self.beaten = time.time()
            write_json(
                self.path, {"host": socket.gethostname(), "pid": os.getpid(), "token": self.token, "time": self.beaten}
            )

    def release(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            if read_json(self.path)["token"] == self.token:
                self.path.unlink()


def _process_lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
