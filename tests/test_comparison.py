"""`fleetune compare`: figures side by side, seeds of one recipe in one row, and what it says where there is no run."""

from __future__ import annotations

import io
import json
import struct
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny import recipe_values
from typer.testing import CliRunner

from fleetune import comparison, runs
from fleetune.cli import app
from fleetune.recipe import dump_recipe
from fleetune.runs import Run
from fleetune.schema import Recipe, RecipeError

LAYOUT = {"nodes": 1, "nproc_per_node": 2, "threads": 1}
LATENCY = {
    "tokens": {"source": "test", "length": 27},
    "cpu": {
        "1": {"milliseconds": 8.1234, "quartiles": [8.0, 9.5], "samples_per_second": 123.1},
        "32": {"milliseconds": 1300.0, "quartiles": [1200.0, 1500.0], "samples_per_second": 24.615},
    },
}
MACHINE = {"cpu": "Abacus 2", "gpu": None, "threads": 2, "dtype": "fp32", "load": 0.1}


def make_run(
    folder: Path, name: str, accuracy: float | None = 0.9, seed: int = 0, seconds: float = 30.0, **sections: Any
) -> Path:
    """A finished run with a model of one tensor, 2 x 3; `info` goes into run.json."""
    path = folder / name
    (path / "model").mkdir(parents=True)
    info = {"id": "1", "name": name, "layout": LAYOUT, "commit": "abc", "versions": {}, **sections.pop("info", {})}
    runs.write_json(path / "run.json", info)
    sections["training"] = {"seed": seed, **sections.get("training", {})}
    text = dump_recipe(Recipe.model_validate(recipe_values(folder, name, **sections)))
    for place in (path, path / "model"):
        (place / "recipe.yaml").write_text(text)
    (path / "model" / "config.json").write_text("{}")
    write_safetensors(path / "model" / "model.safetensors", [2, 3])
    report = {"step": 6, "parameters": 2e6, "train_seconds": seconds, "samples_per_second": 40.0}
    runs.write_json(path / "eval.json", {**report, "validation": {"accuracy": accuracy}, "test": {}})
    return path


def write_safetensors(file: Path, shape: list[int]) -> None:
    head = json.dumps(
        {"__metadata__": {"format": "pt"}, "w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 24]}}
    )
    file.write_bytes(struct.pack("<Q", len(head)) + head.encode() + bytes(24))


def rows(*paths: Path, by_run: bool = False) -> list[comparison.Row]:
    return comparison.rows_of(comparison.find(list(paths)), by_run=by_run)


def shown(found: list[comparison.Row], width: int = comparison.WIDTH) -> str:
    console = Console(file=io.StringIO(), width=width)
    for table in comparison.tables(found):
        console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def column(row: comparison.Row) -> dict[str, str]:
    """The row's cells by line, as one table of it alone shows them."""
    (table,) = comparison.tables([row])
    names, cells = (list(one.cells) for one in table.columns)
    return {"run": str(table.columns[1].header), **dict(zip(map(str, names), map(str, cells), strict=True))}


# ---------------------------------------------------------------- one run


def test_a_run_has_its_metrics_its_size_and_what_it_cost(tmp_path: Path) -> None:
    (row,) = rows(make_run(tmp_path, "a"))
    size = (tmp_path / "a" / "model" / "model.safetensors").stat().st_size
    assert column(row) == {
        "run": "a", "weights": "pretrained", "validation accuracy": "0.9000", "parameters": "2.0M",
        "model MB": f"{size / 1e6:.1f}", "steps": "6", "seconds": "30", "samples/s": "40",
    }  # fmt: skip


def test_a_run_with_a_target_tells_how_far_it_was_and_is(tmp_path: Path) -> None:
    run = make_run(tmp_path, "a")
    report = json.loads((run / "eval.json").read_text(encoding="utf-8"))
    moments = {"before": {"mmd": 0.25, "p_value": 0.001}, "after": {"mmd": 0.0625, "p_value": 0.5}}
    (run / "eval.json").write_text(json.dumps({**report, "shift": {"dvd": moments}}), encoding="utf-8")
    (row,) = rows(run)
    found = {line: text for line, text in column(row).items() if line.startswith("dvd")}
    assert found == {
        "dvd MMD² before": "0.2500", "dvd p before": "0.0010", "dvd MMD² after": "0.0625", "dvd p after": "0.5000",
    }  # fmt: skip


def test_a_line_that_is_empty_for_all_is_left_out_and_one_that_a_run_has_is_there(tmp_path: Path) -> None:
    text = shown(rows(make_run(tmp_path, "a"), make_run(tmp_path, "b", training={"learning_rate": 0.1})))
    assert "state" not in text
    assert "test" not in text
    (tmp_path / "b" / "eval.json").unlink()
    assert "unfinished" in shown(rows(tmp_path / "a", tmp_path / "b"))


def test_an_undefined_metric_says_so(tmp_path: Path) -> None:
    (row,) = rows(make_run(tmp_path, "a", accuracy=None))
    assert column(row)["validation accuracy"] == "undefined"


def test_a_run_brings_its_baseline_once(tmp_path: Path) -> None:
    run = make_run(tmp_path, "a", info={"baseline": "b"})
    baseline = make_run(tmp_path, "b", model={"from_scratch": True})
    for given in ([run], [run, baseline], [baseline, run]):
        found = {row.name: column(row)["weights"] for row in rows(*given)}
        assert found == {"a": "pretrained", "b": "from scratch"}


def test_a_student_is_told_from_a_model_that_learnt_by_itself(tmp_path: Path) -> None:
    taught = {"teacher": {"model_name_or_path": "none"}, "losses": [{"kind": "distillation"}]}
    (row,) = rows(make_run(tmp_path, "student", **taught))
    assert column(row)["weights"] == "pretrained, distilled"


# ---------------------------------------------------------------- seeds


def test_seeds_of_a_recipe_are_a_row_with_mean_and_sample_standard_deviation(tmp_path: Path) -> None:
    paths = [make_run(tmp_path, f"sst2-seed{i}", 0.9 + i / 100, seed=i, seconds=30.0 + i) for i in range(3)]
    (row,) = rows(*paths)
    cells = column(row)
    assert (cells["run"], cells["n"]) == ("sst2", "3")
    assert cells["validation accuracy"] == "0.9100 ± 0.0100"
    assert cells["seconds"] == "31 ± 1"
    assert cells["parameters"] == "2.0M"  # alike in all of them
    assert comparison.summary(row)["validation/accuracy"]["values"] == [0.9, 0.91, 0.92]
    assert "n runs" in comparison.notes([row], None)[0]


def test_by_run_shows_each_seed_alone(tmp_path: Path) -> None:
    found = rows(*(make_run(tmp_path, f"a-seed{i}", seed=i) for i in range(2)), by_run=True)
    assert [row.name for row in found] == ["a-seed0", "a-seed1"]
    assert "n" not in column(found[0])
    assert comparison.notes(found, None) == []


@pytest.mark.parametrize(
    "other",
    [{"training": {"learning_rate": 0.5}}, {"model": {"from_scratch": True}}, {"data": {"max_length": 16}},
     {"info": {"layout": {**LAYOUT, "nproc_per_node": 4}}}],
    ids=["learning rate", "from scratch", "data", "ranks"],
)  # fmt: skip
def test_runs_that_differ_in_more_than_the_seed_stay_apart(tmp_path: Path, other: dict[str, Any]) -> None:
    found = rows(make_run(tmp_path, "a-seed0"), make_run(tmp_path, "a-seed1", seed=1, **other))
    assert [row.name for row in found] == ["a-seed0", "a-seed1"]


def test_where_a_run_is_sent_and_kept_makes_no_difference(tmp_path: Path) -> None:
    other = make_run(tmp_path, "a-1", seed=1, tracking={"wandb": {"tags": ["seed 1"]}}, output_dir="/elsewhere")
    (row,) = rows(make_run(tmp_path, "a-0"), other)
    assert row.name == "a"


def test_the_same_seed_again_is_no_second_draw(tmp_path: Path) -> None:
    first, again, second = (make_run(tmp_path, name, seed=seed) for name, seed in (("a", 0), ("a-2", 0), ("a-3", 1)))
    assert [[member.path for member in row.members] for row in rows(first, again, second)] == [[first, second], [again]]


def test_a_run_that_is_not_finished_counts_for_no_mean(tmp_path: Path) -> None:
    paths = [make_run(tmp_path, f"a-seed{i}", seed=i) for i in range(3)]
    (paths[1] / "eval.json").unlink()
    assert [(row.name, len(row.members)) for row in rows(*paths)] == [("a", 2), ("a-seed1", 1)]


def test_a_mean_is_undefined_where_one_of_its_runs_is(tmp_path: Path) -> None:
    (row,) = rows(make_run(tmp_path, "a-0", None), make_run(tmp_path, "a-1", 0.5, seed=1))
    assert column(row)["validation accuracy"] == "undefined"


def test_baselines_of_several_seeds_are_a_row_too(tmp_path: Path) -> None:
    for i in range(2):
        make_run(tmp_path, f"a-seed{i}", seed=i, info={"baseline": f"a-seed{i}-from-scratch"})
        make_run(tmp_path, f"a-seed{i}-from-scratch", seed=i, model={"from_scratch": True})
    found = rows(tmp_path / "a-seed0", tmp_path / "a-seed1")
    assert [(row.name, len(row.members)) for row in found] == [("a", 2), ("a-from-scratch", 2)]


def test_rows_that_would_have_one_name_have_that_of_their_first_run(tmp_path: Path) -> None:
    sections: list[dict[str, Any]] = [{}, {"training": {"learning_rate": 0.5}}]
    paths = [make_run(tmp_path, f"a-{i}{k}", seed=i, **sections[k]) for k in range(2) for i in range(2)]
    assert [row.name for row in rows(*paths)] == ["a-00", "a-01"]


@pytest.mark.parametrize(
    ("names", "common"),
    [
        (["sst2-distil-seed0", "sst2-distil-seed10"], "sst2-distil"),
        (["sst2-seed0-from-scratch", "sst2-seed1-from-scratch"], "sst2-from-scratch"),
        (["sst2_seed_0", "sst2_seed_1"], "sst2"),
        (["sst2", "sst2-2", "sst2-3"], "sst2"),
        (["seed0-tiny", "seed1-tiny"], "tiny"),
        (["one", "two"], "one"),
        (["one"], "one"),
    ],
)
def test_a_row_is_named_by_what_its_runs_names_have_in_common(names: list[str], common: str) -> None:
    assert comparison.common_name(names) == common


# ---------------------------------------------------------------- folders


def test_a_runs_model_folder_is_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path, "a")
    (row,) = rows(run / "model", run)
    assert row.members[0].path == run


def test_a_model_folder_elsewhere_has_its_size_and_its_parameters(tmp_path: Path) -> None:
    model = make_run(tmp_path, "a") / "model"
    elsewhere = model.rename(tmp_path / "kept")
    cells = column(rows(elsewhere)[0])
    assert cells == {"run": "kept", "weights": "pretrained", "parameters": "6", "model MB": "0.0"}
    assert comparison.figures(rows(elsewhere)[0].members[0])["parameters"] == 6


def test_what_is_neither_run_nor_model_is_named(tmp_path: Path) -> None:
    for file, said in (
        (None, r"x: is no run folder \(it has no run.json\)$"),
        ("config.json", r"x: is no run folder \(it has no run.json\), and no model .*\(it has no recipe.yaml\)$"),
        ("run.json", r"x: is no run folder \(it has no recipe.yaml\)$"),
    ):
        (tmp_path / "x").mkdir(exist_ok=True)
        if file is not None:
            (tmp_path / "x" / file).write_text("{}")
        with pytest.raises(RecipeError, match=said):
            rows(tmp_path / "x")


# ---------------------------------------------------------------- the table and the file


def test_many_runs_with_spread_and_long_names_are_read_in_100_columns(tmp_path: Path) -> None:
    paths = [
        make_run(
            tmp_path, f"a-very-long-name-of-a-run-{kind}-seed{i}", 0.5 + i / 7, seed=i, data={"max_length": 9 + kind}
        )
        for kind in range(6)
        for i in range(2)
    ]
    found = [replace(row, latency=LATENCY) for row in rows(*paths)]
    text = shown(found)
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("0.5714 ± 0.1010") == 6  # none is broken over two lines
    assert text.count("validation accuracy") == len(comparison.tables(found)) == 2


def test_latency_has_its_lines_and_says_how_it_was_measured(tmp_path: Path) -> None:
    (row,) = rows(make_run(tmp_path, "a"))
    row = replace(row, latency=LATENCY)
    expected = {
        "tokens a row": "27 (test)", "CPU ms, batch 1": "8.12 (8-9.5)", "CPU rows/s, batch 1": "123",
        "CPU ms, batch 32": "1300 (1200-1500)", "CPU rows/s, batch 32": "24.6",
    }  # fmt: skip
    assert expected.items() <= column(row).items()
    assert not any("GPU" in line for line in column(row))
    said = "latency on Abacus 2, 2 thread(s): fp32, median (quartiles) of the passes, the models in turn"
    assert comparison.notes([row], MACHINE) == [said]
    assert "its load was 1.9 before" in comparison.notes([row], MACHINE | {"load": 1.9})[1]


def test_the_file_has_the_figures_and_where_they_come_from(tmp_path: Path) -> None:
    paths = [make_run(tmp_path, f"a-seed{i}", 0.9 + i / 10, seed=i) for i in range(2)]
    runs.append_jsonl(Run(paths[0]).attempts, {"attempt": 1, "event": "start", "nodes": ["node7"]})
    done = CliRunner().invoke(app, ["compare", *map(str, paths), "--json", str(tmp_path / "table.json")])
    assert done.exit_code == 0, done.stderr
    report = runs.read_json(tmp_path / "table.json")
    assert {"pydantic", "fleetune"} & set(report["versions"])
    (row,) = report["rows"]
    assert (row["name"], row["n"], row["weights"], row["latency"]) == ("a", 2, "pretrained", None)
    assert row["figures"]["validation/accuracy"] == {
        "mean": pytest.approx(0.95), "std": pytest.approx(0.0707107), "values": [0.9, 1.0],
    }  # fmt: skip
    assert [run["path"] for run in row["runs"]] == list(map(str, paths))
    expected = {"seed": 0, "id": "1", "commit": "abc", "layout": LAYOUT, "nodes": ["node7"]}
    assert expected.items() <= row["runs"][0].items()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--json", "/nowhere/table.json"], "error: --json /nowhere/table.json: there is no folder /nowhere\n"),
        (["--threads", "2"], "error: --threads 2: is for --latency\n"),
    ],
)
def test_a_wrong_option_is_told_before_anything_is_done(tmp_path: Path, more: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["compare", str(make_run(tmp_path, "a")), *more])
    assert (done.exit_code, done.stdout, done.stderr) == (2, "", said)


def test_latency_needs_a_model_of_every_run_that_is_asked_for(tmp_path: Path) -> None:
    run = make_run(tmp_path, "a")
    (run / "model" / "config.json").unlink()
    done = CliRunner().invoke(app, ["compare", str(run), "--latency"])
    said = f"error: {run}: is a run that has not written its model yet; --latency needs it\n"
    assert (done.exit_code, done.stderr) == (2, said)


@pytest.mark.parametrize(
    ("code", "said"), [(runs.WRONG, "error: a: no"), (runs.FAILED, "error: measuring failed: a: no")]
)
def test_measuring_that_fails_is_told_with_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, said: str
) -> None:
    def fails(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, code, "", "noise\nfleetune: error: a: no\n")

    monkeypatch.setattr("fleetune.comparison.subprocess.run", fails)
    done = CliRunner().invoke(app, ["compare", str(make_run(tmp_path, "a")), "--latency"])
    assert (done.exit_code, done.stderr) == (code, f"{said}\n")


def test_a_baseline_that_is_not_finished_keeps_nothing_from_being_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, baseline = make_run(tmp_path, "a", info={"baseline": "b"}), make_run(tmp_path, "b")
    (baseline / "eval.json").unlink()
    (baseline / "model" / "config.json").unlink()

    def measured(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[-3:] == ["--threads", "2", str(run)]
        return subprocess.CompletedProcess(command, 0, json.dumps({**MACHINE, "models": [LATENCY]}), "")

    monkeypatch.setattr("fleetune.comparison.subprocess.run", measured)
    found, machine = comparison.measure(rows(run), 2)
    assert [row.latency for row in found] == [LATENCY, None]
    assert machine == MACHINE
