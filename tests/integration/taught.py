"""A stored teacher that two real ranks write together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fleetune import runs
from fleetune.cluster.local import Layout, run_program
from fleetune.recipe import dump_recipe
from fleetune.schema import Recipe
from fleetune.train import teach


def teach_on_two_ranks(recipe: Recipe, folder: Path, rows_of_a_part: int, **chosen: Any) -> list[str]:
    """Into FOLDER/taught, where some parts may be. Returns what the main rank says."""
    taught = folder / "taught"
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teach, "PART", rows_of_a_part)
        teach.begin(recipe, taught, **chosen)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    program = ["fleetune.train.teach", "write", str(folder / "recipe.yaml"), str(taught)]
    assert run_program(Layout(1, 2, 1), program, taught / "logs", said.append) == (runs.DONE, "done")
    teach.end(taught)
    return said
