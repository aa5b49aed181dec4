"""A recipe that asks for bf16 runs on a machine that has none: in fp32, said aloud, and stored so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import recipe_values, write_model, write_rows

from fleetune.recipe import in_this_machines_precision
from fleetune.runs import Run
from fleetune.schema import Recipe


def recipe(**training: bool) -> Recipe:
    return Recipe.model_validate(recipe_values(Path("/nowhere"), "precise", training=training))


@pytest.mark.parametrize(("asked", "fast", "used"), [(True, True, True), (True, False, False), (False, False, False)])
def test_bf16_is_used_where_the_machine_has_it(asked: bool, fast: bool, used: bool) -> None:
    assert in_this_machines_precision(recipe(bf16=asked), {"has_fast_bf16": fast}).training.bf16 is used


def test_a_run_says_and_stores_the_precision_it_has(tmp_path: Path) -> None:
    from fleetune.train.prepare import has_fast_bf16

    write_model(tmp_path / "model")
    for split in ("train", "validation"):
        write_rows(tmp_path / f"{split}.jsonl", 16)
    values = recipe_values(tmp_path, "precise", training={"bf16": True, "max_steps": 1})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    command = [sys.executable, "-m", "fleetune.cli", "run", str(tmp_path / "recipe.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    stored = yaml.safe_load((tmp_path / "runs" / "precise" / "recipe.yaml").read_text(encoding="utf-8"))
    assert stored["training"]["bf16"] is has_fast_bf16()
    assert ("fp32 is faster here" in done.stdout) is not has_fast_bf16()
    # `fleetune submit`, which cannot know the nodes' precision, goes on in this one.
    assert Run(tmp_path / "runs" / "precise").info().get("fp32_for_bf16", False) is not has_fast_bf16()
