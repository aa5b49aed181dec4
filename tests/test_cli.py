"""The commands: light to start, complete in the shell, and right in what they say of themselves."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import recipe_values, write_model, write_rows
from typer.testing import CliRunner

from fleetune.cli import _show_data, app
from fleetune.cluster.local import Layout
from fleetune.opening import open_run
from fleetune.recipe import load_recipe
from fleetune.schema import Recipe

ROOT = Path(__file__).parents[1]
COMMANDS = (
    *("run", "submit", "status", "watch", "why", "cancel", "logs"),
    *("check", "doctor", "teach", "eval", "export", "compare", "shift", "verify", "sync", "schema"),
)
HEAVY = {
    "torch",
    "transformers",
    "deepspeed",
    "datasets",
    "wandb",
    "submitit",
    "numpy",
    "yaml",
    "psutil",
    "matplotlib",
    "sklearn",
}
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "launcher"), str(ROOT / "kernels")])}


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=ENVIRONMENT | environment, capture_output=True, text=True, check=False, cwd=ROOT)


def loaded(importtime: str) -> set[str]:
    """The top-level packages that `-X importtime` names."""
    lines = (line for line in importtime.splitlines() if line.startswith("import time:"))
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


# ---------------------------------------------------------------- what is loaded


def test_the_probe_sees_a_heavy_module() -> None:
    assert "pydantic" in loaded(python("-X", "importtime", "-c", "import fleetune.schema").stderr)


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], []], ids=["help", "run help", "nothing"])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    done = python("-X", "importtime", "-m", "fleetune.cli", *arguments)
    assert "Usage: " in done.stdout + done.stderr
    assert "typer" in loaded(done.stderr)
    assert not loaded(done.stderr) & HEAVY
    if arguments == ["--help"]:  # Typer itself takes pydantic to parse what it is given
        assert "pydantic" not in loaded(done.stderr)


def test_completion_loads_nothing_heavy() -> None:
    environment = {"_FLEETUNE_COMPLETE": "complete_bash", "COMP_WORDS": "fleetune ", "COMP_CWORD": "1"}
    done = python("-X", "importtime", "-c", "from fleetune.cli import app; app(prog_name='fleetune')", **environment)
    assert done.stdout.split() == list(COMMANDS)
    assert not loaded(done.stderr) & HEAVY


def test_a_recipe_is_refused_without_torch() -> None:
    done = python("-X", "importtime", "-m", "fleetune.cli", "run", "nothing.yaml")
    assert done.returncode == 2
    assert "pydantic" in loaded(done.stderr)
    assert not loaded(done.stderr) & {"torch", "transformers", "deepspeed", "datasets", "wandb", "submitit"}


# ---------------------------------------------------------------- help and completion


def test_help_names_every_command_and_each_has_help() -> None:
    runner = CliRunner()
    overview = runner.invoke(app, ["--help"])
    assert overview.exit_code == 0
    for name in COMMANDS:
        assert f" {name} " in overview.stdout
        done = runner.invoke(app, [name, "--help"])
        assert done.exit_code == 0
        assert f"fleetune {name}" in done.stdout
    for option in ("--nproc-per-node", "--nodes", "--fresh", "--baseline"):
        assert option in runner.invoke(app, ["run", "--help"], env={"COLUMNS": "120"}).stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_script_for_each_shell(shell: str) -> None:
    done = python("-c", "from fleetune.cli import app; app(prog_name='fleetune')", _FLEETUNE_COMPLETE=f"source_{shell}")
    assert done.returncode == 0
    assert f"_FLEETUNE_COMPLETE=complete_{shell}" in done.stdout


def test_the_bash_script_completes_in_bash(tmp_path: Path) -> None:
    """The script as a user's bash runs it: after `fleetune r` and tab."""
    program = tmp_path / "fleetune"
    program.write_text(f"#!{sys.executable}\nfrom fleetune.cli import main\nmain()\n")
    program.chmod(0o755)
    script = """
        eval "$(_FLEETUNE_COMPLETE=source_bash fleetune)"
        COMP_WORDS=(fleetune $1) COMP_CWORD=1
        $(complete -p fleetune | sed 's/.*-F \\([^ ]*\\).*/\\1/') fleetune
        echo "${COMPREPLY[@]}"
    """
    environment = ENVIRONMENT | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    for word, offered in (("r", "run"), ("c", "cancel check compare"), ("x", "")):
        done = subprocess.run(
            ["bash", "-c", script, "bash", word], env=environment, capture_output=True, text=True, check=False
        )
        assert done.stdout.strip() == offered, done.stderr


# ---------------------------------------------------------------- schema, compare, and what is no command


def test_schema_is_json_of_every_section() -> None:
    done = CliRunner().invoke(app, ["schema"])
    schema = json.loads(done.stdout)
    assert done.exit_code == 0
    assert set(Recipe.model_fields) | {"extends"} == set(schema["properties"])
    assert schema["$defs"]["Training"]["properties"]["learning_rate"]["exclusiveMinimum"] == 0.0
    assert not schema["$defs"]["Training"]["additionalProperties"]


@pytest.mark.parametrize(
    "arguments",
    [["rnu"], ["run"], ["run", "a.yaml", "--nodes", "0"], ["run", "a.yaml", "--nproc-per-node", "two"], ["compare"]],
    ids=" ".join,
)
def test_a_wrong_command_ends_with_2(arguments: list[str]) -> None:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert "Usage: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["run", "check", "verify"])
def test_a_profile_in_a_recipes_place_is_told_in_a_line(command: str) -> None:
    done = CliRunner().invoke(app, [command, str(ROOT / "slurm" / "gpu8.yaml")])
    said = f"error: {ROOT}/slurm/gpu8.yaml: is a cluster profile, not a recipe; it goes after --cluster\n"
    assert (done.exit_code, done.stderr) == (2, said)


def test_a_recipe_in_a_profiles_place_is_told_in_a_line() -> None:
    recipe = str(ROOT / "recipes" / "quickstart.yaml")
    done = CliRunner().invoke(app, ["submit", recipe, "--cluster", recipe])
    said = f"error: {recipe}: is a recipe, not a cluster profile; it goes first, and --cluster names a profile\n"
    assert (done.exit_code, done.stderr) == (2, said)


def test_a_recipe_is_checked_for_the_nodes_and_gpus_of_a_profile(tmp_path: Path) -> None:
    """In a precision that this machine may not have: it runs elsewhere."""
    write_model(tmp_path / "model")
    write_rows(tmp_path / "train.jsonl", 64)
    write_rows(tmp_path / "validation.jsonl", 16)
    values = recipe_values(tmp_path, "there", deepspeed={"zero_stage": 2}, training={"global_batch_size": 64})
    values["training"] |= {"fp16": True, "per_device_train_batch_size": 4}
    (tmp_path / "recipe.yaml").write_text(json.dumps(values), encoding="utf-8")
    given = ["check", str(tmp_path / "recipe.yaml"), "--cluster", str(ROOT / "slurm" / "gpu8.yaml")]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    assert "64 examples a step = 16 rank(s)" in done.output
    assert "fits its 80.0 GB" in done.output
    refused = CliRunner().invoke(app, [*given, "--nodes", "3"])
    assert (refused.exit_code, "leave the other options out" in refused.stderr) == (2, True)


@pytest.mark.parametrize(("rows", "warned"), [(64, False), (63, True), (1, True)])
def test_a_global_batch_that_is_larger_than_the_data_is_warned_of_where_cleaning_is_shown(
    rows: int, warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml", ["training.global_batch_size=64"])
    _show_data(recipe, Layout(1, 2, 1), {"cleaning": {"strip_html": {"train": 3}}, "sequences": rows})
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "cleaning  strip_html: 3 rows of train"
    assert (
        shown[1:]
        == [
            "warning   the global batch of 64 examples is larger than train, so that each step is a whole epoch of "
            f"{rows}; training.global_batch_size sets it"
        ]
        * warned
    )


def test_a_folder_that_is_no_run_cannot_be_compared(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["compare", str(tmp_path)])
    assert (done.exit_code, done.stderr) == (2, f"error: {tmp_path}: is no run folder (it has no run.json)\n")


def test_runs_are_compared_with_their_baselines_even_where_the_data_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "train.jsonl"
    data.write_text('{"text": "a", "label": 0}\n')
    (tmp_path / "recipe.yaml").write_text(
        "name: a\ntask: classification\nmodel: {model_name_or_path: m/n}\ndata: {train: {path: train.jsonl}}\n"
    )
    layout = {"nodes": 1, "nproc_per_node": 1, "threads": 1}
    run = open_run(load_recipe("recipe.yaml"), layout)
    baseline = open_run(load_recipe("recipe.yaml", ["name=a-scratch", "model.from_scratch=true"]), layout)
    (run.path / "run.json").write_text(json.dumps({**run.info(), "baseline": baseline.path.name}))
    run.attempts.write_text(
        '{"attempt": 1, "event": "end", "reason": "rank 0: size of [batch, seq] [/x]\\n  log: l"}\n'
    )
    figures = {"step": 6, "parameters": 2e6, "train_seconds": 3.0, "samples_per_second": 40.0}
    baseline.eval.write_text(json.dumps({**figures, "validation": {"f1": 0.75}, "test": {}}))
    data.unlink()
    for folder in (str(run.path), "."):
        monkeypatch.chdir(run.path)
        done = CliRunner().invoke(app, ["compare", folder])
        assert done.exit_code == 0, done.stderr
        lines = [re.split("[┃│]", line)[1:-1] for line in done.stdout.splitlines() if re.search("[┃│]", line)]
        names, run_cells, baseline_cells = zip(*[[cell.strip() for cell in line] for line in lines], strict=True)
        assert (names[:2], run_cells[:2]) == (("run", "weights"), ("a", "pretrained"))
        assert "rank 0: size of [batch, seq] [/x]" in run_cells
        assert baseline_cells[:2] == ("a-scratch", "from scratch")
        assert {"0.7500", "2.0M", "6", "3", "40"} <= set(baseline_cells)
