"""Checkpoints: collective, written beside and renamed into place, complete only with MANIFEST.json in them.

step-00000100/engine/...     DeepSpeed's own files: weights, and the optimizer's shards of each rank
step-00000100/rank-0.pt      random states of that rank, tensors alone
step-00000100/state.json     where training stands
step-00000100/MANIFEST.json  every file's size and SHA-256; written last
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fleetune.train.distributed import World, barrier, gather_objects

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


def save(engine: Any, folder: Path, step: int, state: dict[str, Any], world: World) -> Path:
    """A collective. On return the checkpoint is whole and in place, on disk."""
    final, beside = checkpoint_path(folder, step), folder / f".step-{step:08d}.part"
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
    barrier()
    engine.save_checkpoint(str(beside), tag="engine", save_latest=False)
    torch.save(_random_state(), beside / f"rank-{world.rank}.pt")
    barrier()
    if world.is_main:
        (beside / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        files = sorted(path for path in beside.rglob("*") if path.is_file())
        manifest = {
            str(path.relative_to(beside)): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files
        }
        (beside / MANIFEST).write_text(json.dumps({"step": step, "files": manifest}, indent=1), encoding="utf-8")
        for path in [*files, beside / MANIFEST, *(path for path in beside.rglob("*") if path.is_dir()), beside]:
            _sync(path)
        shutil.rmtree(final, ignore_errors=True)
        beside.rename(final)
        _sync(folder)
    barrier()
    return final


def verify(path: Path) -> None:
    """Raises DamagedCheckpoint for a file that is missing, of another size or content, or owned by somebody else."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{path.name}: {MANIFEST} cannot be read: {error}") from None
    if manifest["step"] != step_of(path):
        raise DamagedCheckpoint(f"{path.name}: its manifest is of step {manifest['step']}")
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise DamagedCheckpoint(f"{path.name}: {name} is missing")
        stat = file.stat()
        if stat.st_uid != os.getuid():
            raise DamagedCheckpoint(f"{path.name}: {name} belongs to another user")  # DeepSpeed's loader unpickles
        if stat.st_size != expected["bytes"] or _sha256(file) != expected["sha256"]:
            raise DamagedCheckpoint(f"{path.name}: {name} is damaged")


def newest_good(folder: Path, world: World) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and a line for each damaged one passed over. The main rank verifies for all."""
    found: tuple[Path | None, list[str]] = (None, [])
    if world.is_main:
        problems: list[str] = []
        for path in complete_checkpoints(folder):
            try:
                verify(path)
            except DamagedCheckpoint as damage:
                problems.append(str(damage))
                continue
            found = (path, problems)
            break
        else:
            found = (None, problems)
    return gather_objects(found, world)[0]  # type: ignore[no-any-return]


def load(engine: Any, path: Path, world: World) -> dict[str, Any]:
    """Restores a verified checkpoint into the engine and the random generators; returns its state."""
    engine.load_checkpoint(str(path), tag="engine")
    _restore_random_state(torch.load(path / f"rank-{world.rank}.pt", weights_only=True))
    return json.loads((path / "state.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def load_weights(engine: Any, path: Path) -> None:
    """For evaluating the best checkpoint at the end. All of it: ZeRO-3's weights stand in the optimizer's shards."""
    engine.load_checkpoint(str(path), tag="engine")


def is_good(path: Path, world: World) -> bool:
    """Whether a checkpoint is there and whole; a collective. The main rank verifies for all."""
    good = False
    if world.is_main:
        with contextlib.suppress(DamagedCheckpoint):
            verify(path)
            good = True
    return bool(gather_objects(good, world)[0])


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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _random_state() -> dict[str, Any]:
    name, keys, position, has_gauss, cached = np.random.get_state()
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": json.dumps([version, words, gauss]),
        "numpy": json.dumps([name, np.asarray(keys).tolist(), position, has_gauss, cached]),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    version, words, gauss = json.loads(state["python"])
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = json.loads(state["numpy"])
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), position, has_gauss, cached))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
