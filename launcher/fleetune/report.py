"""Tables over runs. Nothing here imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from fleetune import runs
from fleetune.schema import RecipeError

if TYPE_CHECKING:
    from fleetune.cluster.doctor_slurm import Row
    from fleetune.verify import Finding


def _with_baselines(folders: list[Path]) -> list[runs.Run]:
    found: dict[Path, runs.Run] = {}
    for given in folders:
        run = runs.Run(given.resolve())
        for file in ("run.json", "recipe.yaml"):
            if not (run.path / file).exists():
                raise RecipeError(f"{given}: is no run folder (it has no {file})")
        found[run.path] = run
        baseline = runs.Run(run.path.parent / run.info().get("baseline", run.path.name))
        if baseline.recipe_file.exists():
            found.setdefault(baseline.path, baseline)
    return list(found.values())


def row(run: runs.Run) -> dict[str, str]:
    """One run's figures, as text, by column."""
    recipe = run.recipe()
    cells = {"run": run.path.name, "weights": "from scratch" if recipe.model.from_scratch else "pretrained"}
    if not run.eval.exists():
        last = runs.read_jsonl(run.attempts)[-1:] or [{}]
        return {**cells, "state": last[0].get("reason", "unfinished").partition("\n")[0]}
    report: dict[str, Any] = runs.read_json(run.eval)
    for split in ("validation", "test"):
        cells |= {
            f"{split} {name}": "undefined" if value is None else f"{value:.4f}" for name, value in report[split].items()
        }
    return {
        **cells,
        "parameters": f"{report['parameters'] / 1e6:.1f}M",
        "steps": str(report["step"]),
        "seconds": f"{report['train_seconds']:.0f}",
        "samples/s": f"{report['samples_per_second']:.0f}",
    }


def comparison(folders: list[Path]) -> Table:
    """A column for each run and a line for each figure. Raises RecipeError for a folder that is no run."""
    columns = [row(run) for run in _with_baselines(folders)]
    table = Table("run")
    for cells in columns:
        table.add_column(escape(cells["run"]), justify="right", overflow="fold")
    for name in dict.fromkeys(name for cells in columns for name in cells if name != "run"):
        table.add_row(name, *(escape(cells.get(name, "")) for cells in columns))
    return table


def findings(found: list[Finding]) -> Table:
    """What `fleetune verify` found."""
    table = Table("what was done", "found", "holds")
    for finding in found:
        table.add_row(escape(finding.what), escape(finding.found), "yes" if finding.holds else "NO")
    return table


def examined(rows: list[Row]) -> Table:
    """What `fleetune doctor` found."""
    table = Table("what", "found", "", "what to do")
    for row in rows:
        table.add_row(escape(row.what), escape(row.found), row.state, escape(row.todo))
    return table


def statuses(folders: list[Path], jobs: dict[Path, str]) -> Table:
    """A line for each run. Raises RecipeError for a folder that is no run."""
    table = Table("run", "state", "attempts", "nodes", "step", "left", "loss", "what happened last")
    for folder in folders:
        if not (folder / "run.json").exists():
            raise RecipeError(f"{folder}: is no run folder (it has no run.json)")
        run = runs.Run(folder)
        attempts = runs.read_jsonl(run.attempts)
        metrics = runs.last_json(run.metrics, "train/loss")
        info = run.info()
        step, total = metrics.get("step", 0), info.get("total_steps")
        last = attempts[-1] if attempts else {}
        state = jobs.get(folder) or ("running" if last.get("event") == "start" else "ended" if last else "not begun")
        rate = metrics.get("train/samples_per_second")
        left = f"{(total - step) * info['global_batch_size'] / rate / 60:.0f} min" if total and rate else ""
        loss = metrics.get("train/loss")
        table.add_row(
            escape(folder.name),
            escape(state),
            str(sum(entry["event"] == "start" for entry in attempts)),
            escape(", ".join(last.get("nodes", []))),
            f"{step}/{total}" if total else str(step),
            left,
            "" if loss is None else f"{loss:.4f}",
            escape(str(last.get("reason", "")).partition("\n")[0]),
        )
    return table
