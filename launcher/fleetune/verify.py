"""`fleetune verify`: proves on this machine and model that a run which is killed, or cut otherwise, is the same run.

A short form of the recipe is run unbroken, then again and killed by SIGKILL at random moments, each time taken up
again by the same command. Both must have the same losses, order of data and parameters, bit for bit. Then the gradient
of one global batch is taken under several cuts into ranks and micro-batches. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from fleetune import opening, runs
from fleetune.batch import Batch, cut_batch
from fleetune.cluster.local import Layout, die_with_parent, run_program
from fleetune.recipe import dump_recipe
from fleetune.schema import Recipe
from fleetune.short_form import short_form

# What a clock or the machine says, and no two runs have alike.
MEASURED = re.compile(r"time/|checkpoint/|nodes/|train/(samples_per_second|tokens_per_second|memory_mb|mfu)$")
_STEP = re.compile(r"^step +(\d+)/")
AT_START = 0.15  # of the kills come before the attempt's first step
WHOM = ("one rank", "all ranks", "the launcher")


@dataclass(frozen=True)
class Kill:
    moment: str
    whom: str
    in_save: bool  # a checkpoint was left half written


@dataclass
class Broken:
    """A run that was killed again and again until it was done."""

    path: Path
    kills: list[Kill] = field(default_factory=list)


def start(recipe: Recipe, layout: Layout) -> subprocess.Popen[str]:
    """The recipe by the command that a person would type."""
    file = Path(recipe.output_dir) / f"{recipe.name}.yaml"
    file.write_text(dump_recipe(recipe), encoding="utf-8")
    command = [sys.executable, "-m", "fleetune.cli", "run", str(file)]
    command += ["--nodes", str(layout.nodes), "--nproc-per-node", str(layout.nproc_per_node)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "OMP_NUM_THREADS": str(layout.threads)},
        preexec_fn=die_with_parent,
    )


def run_unbroken(recipe: Recipe, layout: Layout) -> tuple[Path, float, float]:
    """The run's folder, the seconds until its first step was done, and those of a step with all that belongs to it.

    Raises:
        RuntimeError: it failed; with its output.
    """
    begun, moments, lines = time.monotonic(), list[float](), list[str]()
    process = start(recipe, layout)
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if _STEP.match(line):
            moments.append(time.monotonic())
    if process.wait() != runs.DONE:
        raise RuntimeError("".join(lines[-15:]))
    return (
        Path(recipe.output_dir) / recipe.name,
        moments[0] - begun,
        (moments[-1] - moments[0]) / max(1, len(moments) - 1),
    )


def run_broken(
    recipe: Recipe,
    layout: Layout,
    kills: int,
    steps: int,
    seconds: tuple[float, float],
    chance: random.Random,
    say: Callable[[str], None],
) -> Broken:
    """Kills the run so often at random, of its steps and its starts, and lets it go on to its end.

    Raises:
        RuntimeError: an attempt that was not killed failed; with its output.
    """
    broken = Broken(Path(recipe.output_dir) / recipe.name)
    targets = sorted(chance.choices(range(1, steps), k=kills))
    while targets:
        at_start = chance.random() < AT_START
        target = 0 if at_start else targets[0]
        delay = chance.uniform(0.0, seconds[0] if at_start else seconds[1])
        whom = chance.choice(WHOM if layout.world_size > 1 else WHOM[1:])
        kill = _kill_one_attempt(recipe, layout, target, delay, whom, chance)
        if kill is None:
            return broken  # it was done before the moment came
        broken.kills.append(kill)
        targets.pop(0)
        say(f"kill {len(broken.kills)}/{kills}  {kill.whom}, {kill.moment}{', inside a save' if kill.in_save else ''}")
    process = start(recipe, layout)
    output, _ = process.communicate()
    if process.returncode != runs.DONE:
        raise RuntimeError("\n".join(output.splitlines()[-15:]))
    return broken


def _kill_one_attempt(
    recipe: Recipe, layout: Layout, target: int, delay: float, whom: str, chance: random.Random
) -> Kill | None:
    """Kills an attempt `delay` seconds after its step `target`, or its start; None where it ended before."""
    process = start(recipe, layout)
    assert process.stdout is not None
    lines = list[str]()
    moment = f"{delay:.2f} s after its start"
    for line in process.stdout if target else ():
        lines.append(line)
        step = _STEP.match(line)
        if step and int(step[1]) >= target:
            moment = f"{delay:.2f} s after step {step[1]}"
            break
    else:
        if target:
            if process.wait() != runs.DONE:
                raise RuntimeError("".join(lines[-15:]))
            return None
    time.sleep(delay)
    if process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            whom = _kill(process.pid, whom, chance)
    lines.append(process.stdout.read())
    code = process.wait()
    if code == runs.DONE:
        return None
    if code != -signal.SIGKILL and "was killed by SIGKILL" not in lines[-1]:
        raise RuntimeError("".join(lines[-15:]))
    checkpoints = Path(recipe.output_dir) / recipe.name / "checkpoints"
    halves = [path for path in checkpoints.glob("*step-*") if not (path / "MANIFEST.json").exists()]
    return Kill(moment, whom, bool(halves) or any(checkpoints.glob(".step-*.part")))


def _kill(launcher: int, whom: str, chance: random.Random) -> str:
    """Returns whom it hit: before there are ranks, the launcher."""
    ranks = []
    for child in psutil.Process(launcher).children():
        with contextlib.suppress(psutil.Error):
            if "fleetune.train" in child.cmdline():
                ranks.append(child.pid)
    if whom == "the launcher" or not ranks:
        whom, chosen = "the launcher", [launcher]
    else:
        chosen = [chance.choice(ranks)] if whom == "one rank" else ranks
    for pid in chosen:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return whom


# ---------------------------------------------------------------- what must be equal


def exact_metrics(run: Path) -> dict[int, dict[str, Any]]:
    """Each logged step's figures, without what a clock measured.

    Raises:
        ValueError: a step was logged twice.
    """
    steps: dict[int, dict[str, Any]] = {}
    for line in runs.read_jsonl(run / "metrics.jsonl"):
        values = {key: value for key, value in line.items() if key != "step" and not MEASURED.match(key)}
        known = steps.setdefault(line["step"], {})
        if known.keys() & values.keys():
            raise ValueError(f"{run.name}: step {line['step']} was logged twice")
        known.update(values)
    return steps


def same(unbroken: Path, broken: Path) -> dict[str, str]:
    """For losses, order of data and parameters: `equal`, or what differs first."""
    first, second = exact_metrics(unbroken), exact_metrics(broken)
    found = {"losses": "equal", "data order": "equal", "parameters": "equal"}
    if list(first) != list(second):
        found["losses"] = f"steps {len(first)} against {len(second)}"
    for step in [step for step in first if step in second]:
        for key in first[step].keys() | second[step].keys():
            one, other = first[step].get(key), second[step].get(key)
            name = "data order" if key == "data/order" else "losses"
            if one != other and found[name] == "equal":
                found[name] = f"step {step}: {key} is {one} against {other}"
    hashes = [
        [hashlib.sha256(path.read_bytes()).digest() for path in sorted((run / "model").glob("*.safetensors"))]
        for run in (unbroken, broken)
    ]
    if hashes[0] != hashes[1]:
        found["parameters"] = "the models differ"
    return found


# ---------------------------------------------------------------- the gradient


GRADIENT_BOUND = 1e-6  # of the whole gradient's norm, in fp32


def cuts_of(recipe: Recipe, layout: Layout) -> list[Batch]:
    """One rank, the ranks asked for, and these with smaller micro-batches: all of the same global batch."""
    batch = cut_batch(recipe.training, layout.world_size)
    size, micro, world = batch.global_batch_size, batch.micro_batch_size, batch.world_size
    found = []
    for ranks, most in ((1, micro), (1, max(1, micro // 4)), (world, micro), (world, micro // 2)):
        shared = 1 if ranks == 1 else batch.sequence_parallel_size
        if size % (ranks // shared) == 0 and most:
            training = recipe.training.model_copy(
                update={
                    "global_batch_size": size,
                    "per_device_train_batch_size": most,
                    "gradient_accumulation_steps": None,
                    "sequence_parallel_size": shared,
                }
            )
            found.append(cut_batch(training, ranks))
    return list(dict.fromkeys(found))


def compare_cuts(
    recipe: Recipe, layout: Layout, dropout: list[str], folder: Path, say: Callable[[str], None]
) -> list[tuple[Batch, Difference]]:
    """The gradient of the first global batch under each cut against the first cut's, in fp32 and without dropout.

    Losses between domains that are of a micro-batch by the recipe are taken over the whole batch here, at full weight.

    Raises:
        RuntimeError: one of them failed; with its reason.
    """
    from safetensors.numpy import load_file

    reference: dict[str, Any] = {}
    found = []
    for number, batch in enumerate(cuts_of(recipe, layout)):
        training = recipe.training.model_copy(
            update={
                "global_batch_size": batch.global_batch_size,
                "per_device_train_batch_size": batch.micro_batch_size,
                "gradient_accumulation_steps": batch.gradient_accumulation_steps,
                "sequence_parallel_size": batch.sequence_parallel_size,
                "bf16": False,
                "fp16": False,
            }
        )
        lora = recipe.model.lora and recipe.model.lora.model_copy(update={"lora_dropout": 0.0})
        config = {**recipe.model.config, **dict.fromkeys(dropout, 0.0)}
        model = recipe.model.model_copy(update={"config": config, "lora": lora})
        cut_recipe = short_form(recipe, f"cut-{number}", folder, 1, 1)
        cut_recipe = cut_recipe.model_copy(
            update={"training": training, "model": model, "losses": list(map(_of_the_whole_batch, recipe.losses))}
        )
        place = Layout(1, batch.world_size, max(1, layout.threads * layout.world_size // batch.world_size))
        run = opening.open_run(cut_recipe, place.stored())
        file = run.path / "gradient.safetensors"
        code, reason = run_program(place, ["fleetune.train.gradient", str(run.path), str(file)], run.logs(1))
        if code != runs.DONE:
            raise RuntimeError(reason)
        gradient = load_file(file)
        reference = reference or gradient
        found.append((batch, difference(reference, gradient)))
        say(f"cut as {batch}")
    return found


def _of_the_whole_batch(loss: Any) -> Any:
    changes = {"schedule": "constant", "accumulate": True, "estimator": "biased"}
    linear = getattr(loss, "estimator", None) == "linear"
    there = {key: value for key, value in changes.items() if hasattr(loss, key) and (key != "estimator" or linear)}
    return loss.model_copy(update=there)


@dataclass(frozen=True)
class Difference:
    """Of a gradient from a reference; both errors are relative to the norm of the whole reference."""

    whole: float
    worst: float  # over single tensors
    worst_tensor: str


def difference(reference: Mapping[str, Any], other: Mapping[str, Any]) -> Difference:
    """Of tensors or arrays by parameter; norms are taken in fp64.

    Raises:
        ValueError: the two are not of the same parameters.
    """
    arrays = [{name: np.asarray(value) for name, value in one.items()} for one in (reference, other)]
    if {n: a.shape for n, a in arrays[0].items()} != {n: a.shape for n, a in arrays[1].items()}:
        raise ValueError("the gradients are of different parameters")
    errors = {n: float(np.linalg.norm(arrays[1][n].astype(np.float64) - a)) for n, a in arrays[0].items()}
    norm = float(np.linalg.norm([np.linalg.norm(a.astype(np.float64)) for a in arrays[0].values()]))
    worst = max(errors, key=errors.__getitem__)
    return Difference(float(np.linalg.norm(list(errors.values()))) / norm, errors[worst] / norm, worst)


# ---------------------------------------------------------------- the whole


@dataclass(frozen=True)
class Finding:
    what: str
    found: str
    holds: bool


def verify(
    recipe: Recipe,
    layout: Layout,
    dropout: list[str],
    folder: Path,
    *,
    steps: int,
    kills: int,
    seed: int,
    say: Callable[[str], None],
) -> list[Finding]:
    """Everything, in `folder`. Raises RuntimeError where a run fails that was not killed."""
    say(f"a run of {steps} steps, unbroken")
    unbroken, *seconds = run_unbroken(short_form(recipe, "unbroken", folder, steps, 2), layout)
    say(f"the same run, killed {kills} times (seed {seed})")
    broken = run_broken(
        short_form(recipe, "broken", folder, steps, 2),
        layout,
        kills,
        steps,
        (seconds[0], seconds[1]),
        random.Random(seed),
        say,
    )
    times = f"killed {len(broken.kills)} times, {sum(kill.in_save for kill in broken.kills)} inside a save"
    killed = bool(broken.kills)
    findings = [
        Finding(f"{times}: {name}", found, found == "equal" and killed)
        for name, found in same(unbroken, broken.path).items()
    ]
    say("the gradient of one global batch, in fp32 without dropout")
    (first, _), *others = compare_cuts(recipe, layout, dropout, folder, say)
    return findings + [
        Finding(
            f"cut as {_shown(batch)} in place of {_shown(first)}: gradient",
            f"{found.whole:.1e} apart; worst {found.worst:.1e}, {found.worst_tensor}",
            max(found.whole, found.worst) <= GRADIENT_BOUND,
        )
        for batch, found in others
    ]


def _shown(batch: Batch) -> str:
    """Ranks x micro-batches x examples."""
    return f"{batch.world_size} x {batch.gradient_accumulation_steps} x {batch.micro_batch_size}"
