"""The run folder: its paths, files, lease. Nothing here imports torch."""

from __future__ import annotations

import contextlib
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

from fleetune.recipe import parse_recipe
from fleetune.schema import Recipe, RecipeError

# Exit codes of every command.
DONE, FAILED, WRONG, FAILED_FOR_GOOD, SAVED = 0, 1, 2, 3, 75

LEASE_SECONDS = 60.0  # a lease whose heartbeat is older is nobody's
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


def write_text(path: Path, text: str, sync: bool = False) -> None:
    """By rename; with `sync` a power loss leaves the old text or the new."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        if sync:
            os.fsync(file.fileno())
    beside.replace(path)


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
