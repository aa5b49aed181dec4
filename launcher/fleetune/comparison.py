"""`fleetune compare`: what runs came to, side by side, the seeds of one recipe together. Nothing here imports torch."""

from __future__ import annotations

import datetime
import json
import math
import re
import statistics
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from fleetune import runs, sizes
from fleetune.gap import gaps_closed, missing_ends
from fleetune.opening import refuse_closed
from fleetune.schema import Recipe, RecipeError, teachers_of

WIDTH = 100  # of a table; runs that find no room stand in a second one
NAME_WIDTH = 10  # the least that a run's name is folded to
BUSY = 0.5  # the machine's load, before latency is measured, from which on the reader is told


@dataclass(frozen=True)
class Compared:
    """A run, or a model folder by itself, which has no info and no report."""

    path: Path
    model: Path
    recipe: Recipe
    info: dict[str, Any]
    report: dict[str, Any] | None  # eval.json of a run that is finished
    is_asked_for: bool  # and not only found as the baseline of one that is


@dataclass(frozen=True)
class Row:
    """One run, or those that are the same but for their seed."""

    name: str
    members: tuple[Compared, ...]
    latency: dict[str, Any] | None = None  # of the first member's model, as train/latency.py prints it


# ---------------------------------------------------------------- what is compared


def find(folders: list[Path]) -> list[Compared]:
    """What the folders are, each run followed by its from-scratch baseline.

    Raises:
        RecipeError: a folder is neither a run nor a model that Fleetune wrote.
    """
    found: dict[Path, Compared] = {}
    for given in folders:
        path = given.resolve()
        refuse_closed(path)
        if path.name == "model" and (path.parent / "run.json").exists():
            path = path.parent
        if not (path / "run.json").exists() and (path / "config.json").exists():
            found[path] = _model(given, path)
            continue
        for file in ("run.json", "recipe.yaml"):
            if not (path / file).exists():
                raise RecipeError(f"{given}: is no run folder (it has no {file})")
        found[path] = _run(path, is_asked_for=True)
        baseline = path.parent / found[path].info.get("baseline", path.name)
        if baseline not in found and runs.Run(baseline).recipe_file.exists():
            found[baseline] = _run(baseline, is_asked_for=False)
    return list(found.values())


def _run(path: Path, *, is_asked_for: bool) -> Compared:
    run = runs.Run(path)
    report = runs.read_json(run.eval) if run.eval.exists() else None
    return Compared(path, run.model, run.recipe(), run.info(), report, is_asked_for)


def _model(given: Path, path: Path) -> Compared:
    if not (path / "recipe.yaml").exists():
        raise RecipeError(
            f"{given}: is no run folder (it has no run.json), and no model that Fleetune wrote (it has no recipe.yaml)"
        )
    return Compared(path, path, runs.Run(path).recipe(), {}, None, True)


# ---------------------------------------------------------------- rows


def rows_of(compared: Sequence[Compared], *, by_run: bool = False) -> list[Row]:
    """Runs in one row where their resolved recipes differ in nothing but the seed (and name, place and tracking)."""
    groups: dict[tuple[str, int], list[Compared]] = {}
    times: Counter[tuple[str, int]] = Counter()
    for member in compared:
        key, seed = _all_but_the_seed(member), member.recipe.training.seed
        if by_run or member.report is None:
            key = str(member.path)
        # A seed that comes again is the same run once more, and no second draw: it begins a row of its own.
        groups.setdefault((key, times[key, seed]), []).append(member)
        times[key, seed] += 1
    members = list(groups.values())
    names = [common_name([member.path.name for member in group]) for group in members]
    return [
        Row(name if names.count(name) == 1 else group[0].path.name, tuple(group))
        for name, group in zip(names, members, strict=True)
    ]


def _all_but_the_seed(member: Compared) -> str:
    """The ranks count too: where the recipe gives a micro-batch alone, they make the global batch, and the time."""
    exclude: Any = {"name": True, "output_dir": True, "tracking": True, "training": {"seed"}}
    values = member.recipe.model_dump(mode="json", exclude=exclude)
    return json.dumps([values, member.info.get("layout")], sort_keys=True)


def common_name(names: Sequence[str]) -> str:
    """What the names begin and end with, in whole words, without a `seed` at the seam; else the first."""
    if len(names) == 1:
        return names[0]
    words = [re.findall(r"[-_.]?[^-_.]+", name) for name in names]
    head = _common_start(words)
    tail = _common_start([list(reversed(rest[len(head) :])) for rest in words])[::-1]
    if head and re.fullmatch(r"[-_.]?seed", head[-1]):
        head.pop()
    return "".join(head + tail).lstrip("-_.") or names[0]


def _common_start(lists: list[list[str]]) -> list[str]:
    start = []
    for words in zip(*lists, strict=False):
        if len(set(words)) > 1:
            break
        start.append(words[0])
    return start


# ---------------------------------------------------------------- figures


def figures(member: Compared) -> dict[str, float | None]:
    """A member's numbers by name; None is a metric that is undefined, such as the correlation of a constant."""
    found: dict[str, float | None] = {}
    report = member.report
    if report is not None:
        found = {f"{split}/{name}": value for split in ("validation", "test") for name, value in report[split].items()}
    weights = sorted(member.model.glob("*.safetensors"))
    if report is not None:
        found["parameters"] = report["parameters"]
    elif weights and not member.info:
        found["parameters"] = sum(map(_count_parameters, weights))
    if weights:
        found["model_bytes"] = sum(file.stat().st_size for file in weights)
    if report is not None:
        for target, moments in report.get("shift", {}).items():
            for when, of_moment in moments.items():
                found[f"{target}/MMD² {when}"], found[f"{target}/p {when}"] = of_moment["mmd"], of_moment["p_value"]
        found |= {key: report[key] for key in ("step", "train_seconds", "samples_per_second")}
    return found


def _count_parameters(file: Path) -> int:
    """Read from the head of a safetensors file: eight bytes of length, then JSON with every tensor's shape."""
    with file.open("rb") as opened:
        head = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return sum(math.prod(tensor["shape"]) for name, tensor in head.items() if name != "__metadata__")


def summary(row: Row) -> dict[str, dict[str, Any]]:
    """Each figure's mean over the row's runs, the sample standard deviation where they are several, and the values."""
    each = [figures(member) for member in row.members]
    found = {}
    for key in dict.fromkeys(key for one in each for key in one):
        values = [one.get(key) for one in each]
        known = [value for value in values if value is not None]
        # A mean of the runs where it is defined would be of the lucky ones.
        mean = statistics.fmean(known) if len(known) == len(values) else None
        spread = statistics.stdev(known) if mean is not None and len(known) > 1 else None
        found[key] = {"mean": mean, "std": spread, "values": values}
    return found


# ---------------------------------------------------------------- latency


def measure(rows: list[Row], threads: int) -> tuple[list[Row], dict[str, Any]]:
    """The rows with the latency of their models, and how it was measured, by a process of its own that has torch.

    Of a row of several seeds, the first's model is measured: they are of one architecture.

    Raises:
        RecipeError: a run that is asked for has no model yet, or it cannot be loaded.
        RuntimeError: measuring broke.
    """
    from fleetune.cluster import local

    for row in rows:
        if row.members[0].is_asked_for and not _has_model(row):
            raise RecipeError(f"{row.members[0].path}: is a run that has not written its model yet; --latency needs it")
    measured = [row for row in rows if _has_model(row)]
    command = [sys.executable, "-m", "fleetune.train.latency", "--threads", str(threads)]
    done = subprocess.run(
        [*command, *(str(row.members[0].path) for row in measured)],
        env=local.rank_environment() | {"OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        kind = RecipeError if done.returncode == runs.WRONG else RuntimeError
        raise kind(local.error_of(done.stderr))
    report: dict[str, Any] = json.loads(done.stdout)
    found = {row.members[0].path: latency for row, latency in zip(measured, report.pop("models"), strict=True)}
    return [replace(row, latency=found.get(row.members[0].path)) for row in rows], report


def _has_model(row: Row) -> bool:
    return (row.members[0].model / "config.json").exists()


# ---------------------------------------------------------------- the table


def _megabytes(value: float) -> str:
    return f"{value / 1e6:.1f}"


def _whole(value: float) -> str:
    return f"{value:.0f}"


def _four_places(value: float) -> str:
    return f"{value:.4f}"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


# A figure's line and how it is written; a metric has a line of its name, with four places.
WRITTEN: dict[str, tuple[str, Callable[[float], str]]] = {
    "parameters": ("parameters", sizes.count),
    "model_bytes": ("model MB", _megabytes),
    "step": ("steps", _whole),
    "train_seconds": ("seconds", _whole),
    "samples_per_second": ("samples/s", _whole),
}
COUNTED = ("parameters", "model_bytes", "step")  # mostly alike for all seeds: no spread is shown then
FIRST_LINES = ("run", "n", "weights", "state")
LAST_LINES = (
    *(line for line, _ in WRITTEN.values()),
    "tokens a row",
    *(f"{device} {what}, batch {size}" for device in ("CPU", "GPU") for what in ("ms", "rows/s") for size in (1, 32)),
)


def tables(rows: list[Row]) -> list[Table]:
    """A column for each row and a line for each figure; as many tables as WIDTH takes."""
    is_mixed = any(len(row.members) > 1 for row in rows)
    columns = [_cells(row) | ({"n": str(len(row.members))} if is_mixed else {}) for row in rows]
    for cells, closed in zip(columns, _gaps(rows), strict=True):
        cells |= {f"gap closed, {line}": f"{value:.2f}" for line, value in closed.items()}
    label = 4 + max(len(line) for cells in columns for line in cells)
    groups: list[list[dict[str, str]]] = []
    room = 0
    for cells in columns:
        needed = 3 + _figures_width(cells)
        if needed > room or not groups:
            groups.append([])
            room = WIDTH - label
        groups[-1].append(cells)
        room -= needed
    return [_table(group) for group in groups]


def _gaps(rows: list[Row]) -> list[dict[str, float]]:
    return gaps_closed([(row.members[0].recipe, summary(row)) for row in rows])


def _figures_width(cells: dict[str, str]) -> int:
    return max(NAME_WIDTH, *(len(text) for line, text in cells.items() if line not in ("run", "state")))


def _table(columns: list[dict[str, str]]) -> Table:
    table = Table()
    table.add_column("run", no_wrap=True)
    label = 4 + max(len(line) for cells in columns for line in cells)
    has_room = label + sum(3 + max(len(cells["run"]), _figures_width(cells)) for cells in columns) <= WIDTH
    for cells in columns:
        width = _figures_width(cells)
        name = cells["run"] if has_room else "\n".join(textwrap.wrap(cells["run"], width))
        table.add_column(escape(name), justify="right", overflow="fold", min_width=width)
    metrics = (line for cells in columns for line in cells if line not in LAST_LINES)
    for line in dict.fromkeys([*FIRST_LINES, *metrics, *LAST_LINES]):
        texts = [cells.get(line, "") for cells in columns]
        if line != "run" and any(texts):
            table.add_row(line, *map(escape, texts))
    return table


def _origin(recipe: Recipe) -> str:
    """Where its weights come from, and what it learns from beside the labels."""
    lora = recipe.model.lora
    drawn = "from scratch" if recipe.model.from_scratch else "pretrained" if lora is None else lora.kind
    return f"{drawn}, distilled" if teachers_of(recipe) else drawn


def _cells(row: Row) -> dict[str, str]:
    """The row's column as text, by line."""
    first = row.members[0]
    cells = {"run": row.name, "weights": _origin(first.recipe)}
    if first.info and first.report is None:
        last = runs.read_jsonl(runs.Run(first.path).attempts)[-1:] or [{}]
        cells["state"] = last[0].get("reason", "unfinished").partition("\n")[0]
    for key, figure in summary(row).items():
        line, written = WRITTEN.get(key, (key.replace("/", " "), _four_places))
        cells[line] = "undefined" if figure["mean"] is None else written(figure["mean"])
        if figure["std"] is not None and not (key in COUNTED and figure["std"] == 0.0):
            cells[line] += f" ± {written(figure['std'])}"
    return cells | _latency_cells(row.latency or {})


def _latency_cells(latency: dict[str, Any]) -> dict[str, str]:
    cells = {}
    if latency:
        cells["tokens a row"] = f"{latency['tokens']['length']} ({latency['tokens']['source']})"
    for device in ("cpu", "gpu"):
        for size, measured in latency.get(device, {}).items():
            low, high = map(_three_digits, measured["quartiles"])
            cells[f"{device.upper()} ms, batch {size}"] = f"{_three_digits(measured['milliseconds'])} ({low}-{high})"
            cells[f"{device.upper()} rows/s, batch {size}"] = _three_digits(measured["samples_per_second"])
    return cells


def notes(rows: list[Row], machine: dict[str, Any] | None) -> list[str]:
    """What the tables do not say of themselves."""
    lines = []
    if any(len(row.members) > 1 for row in rows):
        lines.append("± is the sample standard deviation over n runs, which differ in their seed alone")
    if machine is not None:
        devices = f"{machine['cpu']}, {machine['threads']} thread(s)" + (
            f"; {machine['gpu']}" if machine["gpu"] else ""
        )
        lines.append(f"latency on {devices}: {machine['dtype']}, median (quartiles) of the passes, the models in turn")
        if machine["load"] > BUSY:
            lines.append(f"the machine was at work on something else too: its load was {machine['load']:.1f} before")
        if any(len(row.members) > 1 for row in rows):
            lines.append("latency of several seeds is that of the first's model")
        if any(row.latency and row.latency["tokens"]["source"] == "random" for row in rows):
            lines.append("random tokens stand for the rows of a run whose data are not there")
    return [*lines, *missing_ends([row.members[0].recipe for row in rows])]


# ---------------------------------------------------------------- the file


def as_json(rows: list[Row], machine: dict[str, Any] | None) -> dict[str, Any]:
    """The figures, with all that says where they come from; `machine` is where latency was measured."""
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": runs.versions(),
        "commit": runs.source_commit(),
        "machine": machine,
        "rows": [{**_json_row(row), "gap_closed": gap} for row, gap in zip(rows, _gaps(rows), strict=True)],
    }


def _json_row(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "n": len(row.members),
        "weights": _origin(row.members[0].recipe),
        "is_finished": row.members[0].report is not None,
        "runs": [_json_run(member) for member in row.members],
        "figures": summary(row),
        "latency": row.latency,
    }


def _json_run(member: Compared) -> dict[str, Any]:
    attempts = runs.read_jsonl(runs.Run(member.path).attempts)
    return {
        "path": str(member.path),
        "seed": member.recipe.training.seed,
        **{key: member.info.get(key) for key in ("id", "versions", "commit", "layout")},
        "nodes": attempts[-1].get("nodes") if attempts else None,
    }
