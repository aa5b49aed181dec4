"""Tables over runs. Nothing here imports torch."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fleetune import runs
from fleetune.attempts import last_step
from fleetune.ledger import ledger_of
from fleetune.opening import refuse_closed
from fleetune.schema import RecipeError

if TYPE_CHECKING:
    from fleetune.cluster.doctor_slurm import Row
    from fleetune.cluster.slurm import Job
    from fleetune.schema import Recipe
    from fleetune.verify import Finding


def findings(found: list[Finding]) -> Table:
    """What `fleetune verify` found."""
    table = Table("what was done", "found", "holds")
    for finding in found:
        table.add_row(escape(finding.what), escape(finding.found), "yes" if finding.holds else "NO")
    return table


def metrics(report: dict[str, Any]) -> Table:
    """What `fleetune eval` found, with a line for each domain of several."""
    title = f"{escape(report['model'])} on {escape(report['data'])} ({report['rows']} rows)"
    table = Table(title=title, title_justify="left")
    lines: dict[str, dict[str, str]] = {}
    for key, value in report["metrics"].items():
        domain, _, metric = key.rpartition("/")
        lines.setdefault(domain, {})[metric] = f"{value:.4f}"
    if len(lines) > 1:
        table.add_column("domain")
    for metric in lines[""]:
        table.add_column(metric, justify="right")
    for domain, values in lines.items():
        table.add_row(*([domain or "all"] if len(lines) > 1 else []), *values.values())
    return table


def split_lines(recipe: Recipe, report: dict[str, Any]) -> Iterator[str]:
    """What preparing found in each split."""
    for split, count in report["rows"].items():
        line = (
            f"{split:<10} {count} rows, {report['tokens'][split] / count:.1f} tokens each, "
            f"{report['truncated'][split]} cut at {recipe.data.max_length}"
        )
        if recipe.task == "causal_lm":
            share = report["supervised"][split] / report["tokens"][split]
            line += (
                f"; {report['format'][split]}: {share:.0%} of the tokens are learnt; left out: "
                f"{report['empty'][split]} rows with nothing to learn, {report['too_long'][split]} too long"
            )
        elif split in report["labels"]:
            labels = zip(report["label_names"], report["labels"][split], strict=True)
            line += "; " + ", ".join(f"{name}: {n}" for name, n in labels)
        if split in report.get("parts", {}):
            line += "; of " + ", ".join(f"{part['name']} {part['rows']}" for part in report["parts"][split])
        yield line
    if "reweight" in report:
        found = report["reweight"]
        yield (
            f"reweight   {found['method']}: the {found['rows']} rows of train tell as much as "
            f"{found['effective_sample_size']:.0f} of equal weight would; {found['at_the_highest']} have the highest "
            "weight"
        )
    if recipe.task == "causal_lm":
        counts, width = report["lengths"]["train"], recipe.data.max_length
        bounds = [round(width * i / len(counts)) for i in range(len(counts) + 1)]
        bins = zip(bounds[:-1], bounds[1:], counts, strict=True)
        yield "lengths    " + ", ".join(f"{low}-{high}: {count}" for low, high, count in bins if count)


def print_example(runs: list[list[Any]]) -> None:
    """One row as the model reads it: what it learns is coloured, or stands between » and « where there is no colour."""
    console = Console(highlight=False)
    text = Text("example    ")
    for part, learnt in runs:
        text.append(f"»{part}«" if learnt and not console.is_terminal else part, style="green" if learnt else "dim")
    console.print(text, soft_wrap=True)


def examined(rows: list[Row]) -> Table:
    """What `fleetune doctor` found."""
    table = Table("what", "found", "", "what to do")
    for row in rows:
        table.add_row(escape(row.what), escape(row.found), row.state, escape(row.todo))
    return table


def statuses(folders: list[Path], jobs: dict[Path, Job]) -> Table:
    """A line for each run; `jobs` are those that Slurm knows."""
    table = Table("run", "state", "attempts", "nodes", "step", "left", "loss", "goodput", "what happened last")
    for folder in folders:
        table.add_row(*(escape(cell) for cell in _status(runs.Run(folder), jobs.get(folder))))
    return table


def no_run(folder: Path) -> str | None:
    """Why a folder is no run that can be looked at; None where it is one."""
    try:
        refuse_closed(folder)
    except RecipeError as error:
        return str(error)
    return None if (folder / "run.json").exists() else f"{folder}: is no run folder (it has no run.json)"


def _status(run: runs.Run, job: Job | None) -> list[str]:
    attempts, info = runs.read_jsonl(run.attempts), run.info()
    metrics = runs.last_json(run.metrics, "train/loss")
    last = attempts[-1] if attempts else {}
    step, total = last_step(run), info.get("total_steps")
    ledger, rate = ledger_of(run), metrics.get("train/samples_per_second")
    is_over = last.get("event") == "end" and not (job is not None and job.is_live)
    state = "cancelled" if is_over and last.get("kind") == "cancel" else str(job or _local_state(run, last))
    left = (total - step) * info["global_batch_size"] / rate if total and rate and not is_over else None
    return [
        run.path.name,
        state,
        str(sum(entry["event"] == "start" for entry in attempts)),
        ", ".join(last.get("nodes", [])),
        f"{step}/{total}" if total else str(step),
        "" if left is None else duration(left),
        f"{metrics['train/loss']:.4f}" if metrics else "",
        f"{100 * ledger.goodput:.0f} %" if ledger.wall else "",
        (job.lost if job is not None else "") or str(last.get("reason", "")).partition("\n")[0],
    ]


def goes_on(folder: Path, job: Job | None) -> bool:
    """Whether the run is at work, or its job in the queue."""
    return (job is not None and job.is_live) or runs.is_at_work(runs.Run(folder))


def _local_state(run: runs.Run, last: dict[str, Any]) -> str:
    if not last:
        return "not begun"
    if last["event"] == "start":
        return "running" if runs.is_at_work(run) else "cut off"
    return {runs.DONE: "done", runs.SAVED: "stopped"}.get(last["exit_code"], "failed")


def duration(seconds: float) -> str:
    """As a person says it, in two units at most."""
    seconds = round(seconds)
    for size, name, below, lesser in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            rest = seconds % size // below
            return f"{seconds // size} {name}" + (f" {rest} {lesser}" if rest else "")
    return f"{seconds} s"


DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a braille character, by row and column


def chart(points: list[tuple[float, float]], width: int, height: int) -> list[str]:
    """Lines of text that show points (x, y) as dots, two a column and four a row, with the y axis' ends beside them."""
    points = [(x, y) for x, y in points if math.isfinite(y)]
    if not points:
        return []
    (x0, x1), (y0, y1) = ((min(axis), max(axis)) for axis in zip(*points, strict=True))
    cells = [[0x2800] * width for _ in range(height)]
    for x, y in points:
        column = round((x - x0) / ((x1 - x0) or 1) * (2 * width - 1))
        row = round((y1 - y) / ((y1 - y0) or 1) * (4 * height - 1))
        cells[row // 4][column // 2] |= DOTS[row % 4][column % 2]
    ends = {0: f"{y1:.4g}", height - 1: f"{y0:.4g}"}
    margin = max(len(text) for text in ends.values())
    lines = [f"{ends.get(at, ''):>{margin}} {''.join(map(chr, row))}" for at, row in enumerate(cells)]
    left, right = f"{x0:.0f}", f"{x1:.0f}"
    return [*lines, f"{'':>{margin}} {left}{right:>{width - len(left)}}"]


def losses(run: runs.Run, most: int = 4 << 20) -> list[tuple[float, float]]:
    """(step, loss) of the steps that were logged last."""
    points = []
    with contextlib.suppress(OSError), run.metrics.open("rb") as file:
        file.seek(max(0, run.metrics.stat().st_size - most))
        for line in file:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                points.append((float(entry["step"]), float(entry["train/loss"])))
    return points


def live(folders: list[Path], jobs: dict[Path, Job], width: int) -> Group:
    """What `fleetune watch` shows: the runs, and the loss of the first that has one."""
    parts: list[Any] = [statuses(folders, jobs)]
    for run in map(runs.Run, folders):
        lines = chart(losses(run), max(10, min(width, 100) - 10), 8)
        if lines:
            parts.append(Text("\n".join([f"train/loss of {run.path.name} by step", *lines])))
            break
    return Group(*parts)


def memory_lines(recipe: Recipe, found: dict[str, Any]) -> list[str]:
    """What a rank's memory comes to, whether it fits, and what would make it."""

    if "unknown" in found:
        return [f"memory    not known of this model: {found['unknown']}"]

    def gigabytes(size: float) -> str:
        return f"{size / 1e9:.2f}" if size < 1e10 else f"{size / 1e9:.1f}"

    parts = [
        f"{name} {gigabytes(found[name])}"
        for name in ("weights", "gradients", "optimizer", "buckets", "activations", "loss", "teachers")
        if found[name] >= 5e6
    ]
    where = "a GPU" if found["device"] == "cuda" else "a rank, Python itself aside,"
    lines = [f"memory    {gigabytes(found['height'])} GB of {where} at its height: {', '.join(parts)}"]
    if found["host"]:
        lines.append(f"          {gigabytes(found['host'])} GB a rank of the node's memory")
    if found["limit"] is not None and found["height"] <= found["limit"]:
        lines.append(f"          fits its {gigabytes(found['limit'])} GB")
    elif found["limit"] is not None and found["change"]:
        changes = " ".join(found["change"])
        lines.append(
            f"warning   does not fit its {gigabytes(found['limit'])} GB; it does with {changes} "
            f"({gigabytes(found['changed'])} GB)"
        )
    elif found["limit"] is not None:
        lines.append(
            f"warning   does not fit its {gigabytes(found['limit'])} GB, and nothing here makes it: more GPUs do"
        )
    kept = recipe.checkpoint.save_total_limit + 1
    lines.append(f"disk      {gigabytes(found['checkpoint'])} GB a checkpoint; {kept} may stand there, with the best")
    return lines
