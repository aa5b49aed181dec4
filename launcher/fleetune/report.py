"""Tables over runs. Nothing here imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from fleetune import runs
from fleetune.schema import RecipeError


def _with_baselines(folders: list[Path]) -> list[runs.Run]:
    found: dict[Path, runs.Run] = {}
    for folder in folders:
        run = runs.Run(folder)
        if not (folder / "run.json").exists():
            raise RecipeError(f"{folder}: is no run folder (it has no run.json)")
        found[folder.resolve()] = run
        baseline = run.info().get("baseline")
        if baseline is not None and (folder.parent / baseline / "run.json").exists():
            found[(folder.parent / baseline).resolve()] = runs.Run(folder.parent / baseline)
    return list(found.values())


def row(run: runs.Run) -> dict[str, str]:
    """One run's figures, as text, by column."""
    recipe = run.recipe()
    cells = {"run": run.path.name, "weights": "from scratch" if recipe.model.from_scratch else "pretrained"}
    if not run.eval.exists():
        last = runs.read_jsonl(run.attempts)[-1:] or [{}]
        return {**cells, "state": last[0].get("reason", "unfinished").splitlines()[0]}
    report: dict[str, Any] = runs.read_json(run.eval)
    for split in ("validation", "test"):
        cells |= {f"{split} {name}": f"{value:.4f}" for name, value in report[split].items()}
    return {
        **cells,
        "parameters": f"{report['parameters'] / 1e6:.1f}M",
        "steps": str(report["step"]),
        "seconds": f"{report['train_seconds']:.0f}",
        "samples/s": f"{report['samples_per_second']:.0f}",
    }


def comparison(folders: list[Path]) -> Table:
    """Raises RecipeError for a folder that is no run."""
    rows = [row(run) for run in _with_baselines(folders)]
    columns = list(dict.fromkeys(column for cells in rows for column in cells))
    table = Table()
    for column in columns:
        table.add_column(
            column, justify="left" if column in ("run", "weights", "state") else "right", no_wrap=column == "run"
        )
    for cells in rows:
        table.add_row(*(cells.get(column, "") for column in columns))
    return table
