"""Which checkpoints a run has, and whether each is what it was when it was written: nothing else is ever opened."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from fleetune import runs
from fleetune.train import signals
from fleetune.train.distributed import World, gather_objects

MANIFEST = "MANIFEST.json"


class DamagedCheckpoint(Exception):
    """A checkpoint that is not what its manifest says; names the file."""


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def complete_checkpoints(folder: Path) -> list[Path]:
    """Those with a manifest, newest first."""
    return sorted((path.parent for path in folder.glob(f"step-*/{MANIFEST}")), key=step_of, reverse=True)


def prune(folder: Path, keep_last: int, step: int, best_step: int | None) -> None:
    """After saving at `step`: keeps the newest `keep_last` and the best, and clears what a kill left half written.

    One beyond `step` is damaged, or it would have been gone on from; it must not count as the newest.
    """
    kept = [path for path in complete_checkpoints(folder) if step_of(path) <= step][:keep_last]
    for path in complete_checkpoints(folder):
        if path not in kept and step_of(path) != best_step:
            (path / MANIFEST).unlink()  # from here on it is no checkpoint, whatever happens to the rest
    for path in [*folder.glob("step-*"), *folder.glob(".step-*.part")]:
        if path.name.startswith(".") or not (path / MANIFEST).exists():
            shutil.rmtree(path, ignore_errors=True)


def sealed(manifest: dict[str, Any]) -> str:
    """With a hash of itself, so that damage to the manifest is seen as well."""
    text = json.dumps(manifest, indent=1)
    return json.dumps({**manifest, "sha256": hashlib.sha256(text.encode()).hexdigest()}, indent=1) + "\n"


def read_manifest(path: Path) -> dict[str, Any]:
    """Raises DamagedCheckpoint where it is not as it was written."""
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        seal = manifest.pop("sha256")
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{path.name}: {MANIFEST} cannot be read: {error}") from None
    if sealed(manifest) != text:
        raise DamagedCheckpoint(f"{path.name}: {MANIFEST} is damaged, {str(seal)[:8]} is not its hash")
    if manifest["step"] != step_of(path):
        raise DamagedCheckpoint(f"{path.name}: its manifest is of step {manifest['step']}")
    return manifest  # type: ignore[no-any-return]


def verify(path: Path, run_id: str, part: int = 0, parts: int = 1) -> None:
    """Raises DamagedCheckpoint for one of another run, or a file that is missing, too many, another user's or changed.

    Of `parts` verifiers that share the hashing, this is number `part`.
    """
    if path.is_symlink() or not path.is_dir():
        raise DamagedCheckpoint(f"{path.name}: is not there")
    manifest = read_manifest(path)
    if manifest["run"] != run_id:
        raise DamagedCheckpoint(f"{path.name}: is of another run ({manifest['run']})")
    there = {str(file.relative_to(path)): file for file in path.rglob("*") if file.is_symlink() or not file.is_dir()}
    for file in (path, *there.values()):  # DeepSpeed's loader unpickles
        if file.lstat().st_uid != os.getuid():
            raise DamagedCheckpoint(f"{path.name}: {file.name} belongs to another user and is not opened")
    for name in sorted(there.keys() - {MANIFEST} - manifest["files"].keys()):
        raise DamagedCheckpoint(f"{path.name}: {name} is not in its manifest")
    for name, expected in list(manifest["files"].items())[part::parts]:
        if name not in there or there[name].is_symlink():
            raise DamagedCheckpoint(f"{path.name}: {name} is missing")
        if there[name].stat().st_size != expected["bytes"] or _sha256(there[name]) != expected["sha256"]:
            raise DamagedCheckpoint(f"{path.name}: {name} is damaged")


def problem_of(path: Path, run: runs.Run, world: World) -> str | None:
    """What is wrong with a checkpoint, on every rank alike; a collective that shares the hashing.

    Raises:
        OSError: it cannot be read at the moment, which says nothing of what it holds.
    """
    problem, unreadable = None, None
    try:
        verify(path, run.info()["id"], world.rank, world.world_size)
    except (DamagedCheckpoint, FileNotFoundError) as damage:
        problem = str(damage)
    except OSError as error:
        unreadable = f"{path}: {error}"
    for found, failed in gather_objects((problem, unreadable), world):
        if failed is not None:
            raise OSError(failed)
        problem = problem or found
    return problem


def newest_good(run: runs.Run, world: World) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and a line for each newer one that is damaged or half written. A collective.

    Raises:
        DamagedCheckpoint: there are some, and none is whole: beginning anew would remove what may be mended.
    """
    listed = [str(path) for path in complete_checkpoints(run.checkpoints)]
    halves = sorted(path.name.strip(".").removesuffix(".part") for path in run.checkpoints.glob(".step-*.part"))
    listed, halves = gather_objects((listed, halves), world)[0]
    problems = list[str]()
    for path in map(Path, listed):
        problem = problem_of(path, run, world)
        if problem is None:
            halves = [name for name in halves if name > path.name]
            return path, [f"{name}: was being written when the run ended" for name in halves] + problems
        problems.append(problem)
    if problems:
        raise DamagedCheckpoint("no checkpoint is whole (--fresh begins anew):\n  " + "\n  ".join(problems))
    return None, [f"{name}: was being written when the run ended" for name in halves]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 24):
            digest.update(piece)
            signals.beat("verify")
    return digest.hexdigest()
