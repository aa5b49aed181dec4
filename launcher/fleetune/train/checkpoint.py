"""Checkpoints: collective, written beside and renamed into place, complete only with MANIFEST.json in them.

step-00000100/engine/...     DeepSpeed's own files: weights, and the optimizer's shards of each rank
step-00000100/rank-0.pt      random states of that rank, tensors alone
step-00000100/state.json     where training stands
step-00000100/MANIFEST.json  every file's size and SHA-256, the layout, and a hash of itself; written last

A save has two halves. `start` takes every rank's state: written at once, or copied and left to a thread beside the next
steps. `finish`, when all ranks have written, makes the whole of it a checkpoint or, where one of them could not
write, nothing.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import random
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

from fleetune import runs
from fleetune.batch import cut_batch
from fleetune.schema import Checkpoint
from fleetune.train import reshard, signals
from fleetune.train.distributed import World, barrier, gather_objects
from fleetune.train.lora import has_adapter
from fleetune.train.manifest import MANIFEST, checkpoint_path, prune, read_manifest, sealed
from fleetune.train.speed import available_memory

FAILURES = 3  # saves in a row that may fail before training gives up
SPARE_MEMORY = 1 << 30  # left free beside the copies that wait to be written


class SaveFailed(RuntimeError):
    """What has been trained cannot be written to disk."""


@dataclass(frozen=True)
class Saved:
    """What became of a save; `problem` says why it is no checkpoint."""

    step: int
    blocked_seconds: float  # training stood still
    seconds: float  # from its start until it was whole
    problem: str | None


# ---------------------------------------------------------------- saving


@dataclass
class _Save:
    """A save under way, as one rank knows it."""

    step: int
    best_step: int | None
    state: str  # state.json, as it stood
    beside: Path
    started: float
    blocked: float = 0.0
    bytes: int = 0  # written so far
    copies: list[tuple[Path, Any]] = field(default_factory=list)
    written: dict[str, dict[str, Any]] = field(default_factory=dict)
    problem: str | None = None
    thread: threading.Thread | None = None


class Saver(TorchCheckpointEngine):  # type: ignore[misc]
    """Saves a run's checkpoints, one at a time. DeepSpeed hands it each file's content in place of writing it."""

    def __init__(self, engine: Any, run: runs.Run, world: World, settings: Checkpoint, saved_step: int) -> None:
        super().__init__()
        self.engine, self.folder, self.world, self.settings = engine, run.checkpoints, world, settings
        self.run_id, self.layout = run.info()["id"], layout_of(run, world)
        self.saved_step = saved_step  # the last that is a checkpoint
        self.started_step = saved_step  # the last that was to be one
        self.failures = 0
        self._save: _Save | None = None
        engine.checkpoint_engine = self
        engine._copy_recovery_script = lambda path: None  # scripts for use without Fleetune; and one rank alone writes

    @property
    def is_open(self) -> bool:
        """Whether a save was started and not finished; alike on every rank."""
        return self._save is not None

    @property
    def is_writing(self) -> bool:
        """Whether this rank still writes."""
        return self._save is not None and self._save.thread is not None and self._save.thread.is_alive()

    def start(self, step: int, state: dict[str, Any], best_step: int | None, problem: str | None) -> None:
        """Takes the state of the run at `step`. A collective; no other save may be open.

        With a `problem` on one rank it is carried out on all of them, and is no checkpoint in the end.
        """
        assert self._save is None
        start = time.perf_counter()
        beside = self.folder / f".step-{step:08d}.part"
        save = self._save = _Save(step, best_step, json.dumps(state, indent=1), beside, start, problem=problem)
        self.started_step = step
        signals.beat("save")
        if self.world.is_main:
            with _noted(save):
                shutil.rmtree(beside, ignore_errors=True)
                (beside / "engine").mkdir(parents=True)
        barrier()
        # What an adapter leaves frozen is loaded from where it came from.
        frozen = has_adapter(self.engine.module)
        self.engine.save_checkpoint(str(beside), tag="engine", save_latest=False, exclude_frozen_parameters=frozen)
        self.save(_random_state(), str(beside / f"rank-{self.world.rank}.pt"))
        if save.copies:
            save.thread = threading.Thread(target=_write_copies, args=(save,), name="checkpoint", daemon=True)
            save.thread.start()
        save.blocked = time.perf_counter() - start

    def save(self, state_dict: Any, path: str) -> None:
        """One file of the open save: copied, to be written beside the next steps, if memory allows; else written."""
        save = self._save
        assert save is not None
        if self.settings.in_background:
            size = _nbytes(state_dict)
            ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            if size * ranks_here + SPARE_MEMORY < available_memory():
                save.copies.append((Path(path), _copied(state_dict, {})))
                return
        with _noted(save):
            _write(Path(path), state_dict, save)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """`start` makes the one folder: DeepSpeed would raise on one rank, and the others would wait for it."""

    def finish(self, must: bool = False) -> Saved | None:
        """Waits until every rank has written, and makes the open save a checkpoint. A collective.

        Raises:
            SaveFailed: it is the third in a row that cannot be written, or the first where it `must`.
        """
        save = self._save
        if save is None:
            return None
        start = time.perf_counter()
        signals.beat("save")
        while save.thread is not None and save.thread.is_alive():
            before = save.bytes
            save.thread.join(5.0)
            if save.bytes != before:  # a slow disk is no hang
                signals.beat("save")
        save.copies.clear()
        found = gather_objects((save.written, save.problem), self.world)
        problem = next((problem for _, problem in found if problem is not None), None)
        if problem is None and self.world.is_main:
            with _noted(save):
                self._commit(save, {name: entry for written, _ in found for name, entry in written.items()})
        problem = problem or gather_objects(save.problem, self.world)[0]
        self._save = None
        now = time.perf_counter()
        if problem is None:
            self.failures, self.saved_step = 0, save.step
            if self.world.is_main:
                with contextlib.suppress(OSError):  # what cannot be removed takes room, and no more
                    prune(self.folder, self.settings.save_total_limit, save.step, save.best_step)
        else:
            self.failures += 1
            if self.world.is_main:
                shutil.rmtree(save.beside, ignore_errors=True)
            if must or self.failures == FAILURES:
                raise SaveFailed(
                    f"the checkpoint of step {save.step} cannot be written: {problem}"
                    + ("" if must else f" (so could not the {FAILURES - 1} before it)")
                    + "; those that stand in the folder are whole"
                )
        return Saved(save.step, save.blocked + now - start, now - save.started, problem)

    def _commit(self, save: _Save, files: dict[str, dict[str, Any]]) -> None:
        """The main rank's: everything is synced before the rename, and the rename after it."""
        beside, final = save.beside, checkpoint_path(self.folder, save.step)
        files["state.json"] = _write_bytes(beside / "state.json", save.state.encode())
        manifest = {"run": self.run_id, "step": save.step, **self.layout}
        _write_bytes(beside / MANIFEST, sealed({**manifest, "files": dict(sorted(files.items()))}).encode())
        for path in (beside / "engine", beside):
            _sync(path)
        if final.exists():  # a damaged one, or it would have been gone on from
            (final / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(final)
        beside.rename(final)
        _sync(self.folder)


@contextlib.contextmanager
def _noted(save: _Save) -> Any:
    """Whatever keeps a file from being written must not end training, least of all on one rank alone."""
    try:
        yield
    except Exception as error:
        cause: BaseException = error  # torch's writer raises a RuntimeError of its own over the file's OSError
        while not isinstance(cause, OSError) and cause.__context__ is not None:
            cause = cause.__context__
        text = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(error).partition("\n")[0]
        save.problem = save.problem or text


def _write_copies(save: _Save) -> None:
    with _noted(save):
        while save.copies:
            _write(*save.copies.pop(0), save)


class _Hashed:
    """A file that is hashed while it is written."""

    def __init__(self, file: Any, save: _Save) -> None:
        self.file, self.save, self.sha256, self.bytes = file, save, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self.sha256.update(data)
        self.bytes += size
        self.save.bytes += size
        if self.save.thread is None:  # the thread's own progress is no sign of the loop's
            signals.beat("save")
        self.file.write(data)
        return size

    def flush(self) -> None:
        self.file.flush()


def _write(path: Path, state: Any, save: _Save) -> None:
    with path.open("wb") as raw:
        file = _Hashed(raw, save)
        torch.save(state, file)  # type: ignore[arg-type]
        raw.flush()
        os.fsync(raw.fileno())
    save.written[str(path.relative_to(save.beside))] = {"bytes": file.bytes, "sha256": file.sha256.hexdigest()}


def _write_bytes(path: Path, content: bytes) -> dict[str, Any]:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _nbytes(state: Any) -> int:
    if isinstance(state, torch.Tensor):
        return state.nbytes
    if isinstance(state, dict):
        return sum(_nbytes(value) for value in state.values())
    return sum(_nbytes(value) for value in state) if isinstance(state, list | tuple) else 0


def _copied(state: Any, seen: dict[tuple[Any, ...], torch.Tensor]) -> Any:
    """The state with its tensors copied to the CPU; one that stands there twice, as tied weights do, once."""
    if isinstance(state, torch.Tensor):
        key = (state.device, state.data_ptr(), state.dtype, state.shape, state.stride())
        if state.numel() == 0 or key not in seen:
            seen[key] = state.detach().to("cpu", copy=True)
        return seen[key]
    if isinstance(state, dict):
        copied = copy.copy(state)
        copied.update((key, _copied(value, seen)) for key, value in state.items())
        return copied
    if type(state) in (list, tuple):
        return type(state)(_copied(value, seen) for value in state)
    return copy.deepcopy(state)  # DeepSpeed's loss scaler lives on


# ---------------------------------------------------------------- loading


LAYOUT = {
    "world_size": "ranks",
    "nodes": "nodes",
    "threads": "threads a rank",
    "micro_batch_size": "micro-batch",
    "sequence_parallel_size": "ranks to a sequence",
    "zero_stage": "ZeRO stage",
    "offload_optimizer": "offload_optimizer",
    "offload_param": "offload_param",
}


def layout_of(run: runs.Run, world: World) -> dict[str, Any]:
    """How the run is cut here: what decides the order in which numbers are added, and so their last bits."""
    recipe = run.recipe()
    batch = cut_batch(recipe.training, world.world_size)
    return {
        "world_size": world.world_size,
        "nodes": run.info()["layout"]["nodes"],
        "threads": torch.get_num_threads(),
        "micro_batch_size": batch.micro_batch_size,
        "sequence_parallel_size": batch.sequence_parallel_size,
        **recipe.deepspeed.model_dump(),
    }


def load(engine: Any, path: Path, run: runs.Run, world: World) -> tuple[dict[str, Any], str | None]:
    """Restores a verified checkpoint into the engine and the random generators.

    Returns its state, and for one of another layout a line that says so. Other ranks than it was made on cannot keep
    their random states: these, which dropout draws from, begin anew from the seed, the rank and the step.
    """
    manifest, state = read_manifest(path), json.loads((path / "state.json").read_text(encoding="utf-8"))
    load_weights(engine, path, world)
    if manifest["world_size"] == world.world_size:
        _restore_random_state(torch.load(path / f"rank-{world.rank}.pt", weights_only=True))
    else:
        _seed(run.recipe().training.seed, world.rank, state["step"])
    layout = layout_of(run, world)
    moved = [
        f"{said} {manifest[key]}, now {layout[key]}"
        for key, said in LAYOUT.items()
        if manifest.get(key, layout[key]) != layout[key]
    ]
    if not moved:
        return state, None
    rows = [layout_["micro_batch_size"] * layout_["world_size"] for layout_ in (manifest, layout)]
    compared = [loss.kind for loss in run.recipe().losses if not getattr(loss, "accumulate", True)]
    if compared and rows[0] != rows[1]:
        moved.append(
            f"{', '.join(compared)}: over {rows[0]} rows before, over {rows[1]} now, which is another loss "
            "(with accumulate: true it is over the whole step)"
        )
    return state, (
        f"{path.name} is of another layout ({'; '.join(moved)}) and is converted: from here the run is the same "
        "to rounding, no more bit for bit"
    )


def load_weights(engine: Any, path: Path, world: World) -> None:
    """For evaluating the best checkpoint at the end. All of it: ZeRO-3's weights stand in the optimizer's shards."""
    if reshard.is_native(engine, path / "engine", world.world_size):
        engine.load_checkpoint(str(path), tag="engine", load_module_strict=not has_adapter(engine.module))
    else:
        reshard.load(engine, path / "engine")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _seed(seed: int, rank: int, step: int) -> None:
    for_torch, for_numpy, for_python = np.random.SeedSequence([seed, rank, step]).generate_state(3).tolist()
    torch.manual_seed(for_torch)
    np.random.seed(for_numpy)
    random.seed(for_python)


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
