"""Every command of the README is run, in its order; those that need a hub or hours have their recipes read."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from wandb_server import serving, wandb_environment

from fleetune.cli import app
from fleetune.recipe import flatten, load_recipe

ROOT = Path(__file__).parents[1]
COMMANDS = re.findall(r"^\$ (.+)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
FLEETUNE = [shlex.split(command)[1:] for command in COMMANDS if command.startswith("fleetune ")]
SHORT = ["training.max_steps=3", "data.train.limit=200"]  # the same commands, with less to do
DATA = "$FLEETUNE_DATA"  # the public data sets, which are not always there


def needs_hub(arguments: list[str]) -> bool:
    return any("hub" in argument or "recipes/lm/qwen" in argument for argument in arguments)


def is_long(arguments: list[str]) -> bool:
    return any("recipes/amazon" in argument for argument in arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    return folder


def test_the_readme_shows_every_command() -> None:
    assert {arguments[0] for arguments in FLEETUNE} == {
        "run",
        "check",
        "verify",
        "eval",
        "export",
        "compare",
        "teach",
        "shift",
        "sync",
        "schema",
    }


def test_the_recipe_that_it_shows_trains_what_the_shipped_one_does(tmp_path: Path) -> None:
    shown = tmp_path / "recipe.yaml"
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown.write_text(text.partition("```yaml\n")[2].partition("```")[0], encoding="utf-8")
    ours, shipped = (
        dict(flatten(load_recipe(file).model_dump(mode="json", exclude={"output_dir"})))
        for file in (shown, ROOT / "recipes" / "sst2" / "minilm_hub.yaml")
    )
    assert {key for key in ours | shipped if ours.get(key) != shipped.get(key)} == {"name", "training.logging_steps"}


@pytest.mark.parametrize("arguments", [a for a in FLEETUNE if not needs_hub(a) and not is_long(a)], ids=" ".join)
def test_runs(folder: Path, arguments: list[str], request: pytest.FixtureRequest) -> None:
    there = ""
    if any(DATA in argument or "stories260k" in argument for argument in arguments):
        there = str(request.getfixturevalue("shared_data"))
        arguments = [argument.replace(DATA, there) for argument in arguments]
    wrong = any("learning_rte" in argument for argument in arguments)
    shorter = SHORT if arguments[0] in ("run", "check", "teach") else []
    if arguments[0] == "verify":
        shorter = ["data.train.limit=200", "--steps", "3", "--kills", "1"]
    if arguments[0] == "shift":
        shorter = ["--limit", "20", "--permutations", "99"]
    command = [sys.executable, "-m", "fleetune.cli", *arguments, *shorter]
    with serving() as server:  # for `sync`, which needs one
        environment = os.environ | wandb_environment(server.url, folder) | {"FLEETUNE_DATA": there}
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=850, check=False, env=environment
        )
    assert done.returncode == (2 if wrong else 0), done.stderr
    assert ("did you mean `learning_rate`?" in done.stderr) is wrong


@pytest.mark.parametrize("arguments", [a for a in FLEETUNE if needs_hub(a) or is_long(a)], ids=" ".join)
def test_is_understood(arguments: list[str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if is_long(arguments):
        monkeypatch.setenv("FLEETUNE_DATA", str(request.getfixturevalue("shared_data")))
    command = typer.main.get_command(app)
    name, sub, rest = command.resolve_command(command.make_context("fleetune", list(arguments)), list(arguments))  # type: ignore[attr-defined]
    context = sub.make_context(name, rest)
    monkeypatch.chdir(ROOT)
    recipe = load_recipe(context.params["recipe"], list(context.params["overrides"]))
    assert recipe.data.train.path.endswith(("nyu-mll/glue", "tatsu-lab/alpaca", "amazon/books.jsonl"))


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("make ")])
def test_make_has_the_target(command: str) -> None:
    done = subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
