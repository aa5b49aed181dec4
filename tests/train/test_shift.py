"""`fleetune shift`: the statistic against the kernel's own, the p-value's level, rows that stand out, the command."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import WORDS, write_model
from typer.testing import CliRunner

from fleetune import runs
from fleetune.cli import app
from fleetune.model_section import Model
from fleetune.train import shift
from fleetune.train.features import load_encoder, mean_pooled
from fleetune.train.gaussian_kernel import GaussianKernel
from fleetune.train.report import print_report
from fleetune.train.shift import Texts, _shuffles, most_typical, two_sample
from fleetune_kernels.reference_mmd import mmd as reference


def normal(rows: int, mean: float = 0.0, seed: int = 0, features: int = 4) -> torch.Tensor:
    return torch.randn(rows, features, generator=torch.Generator().manual_seed(seed)) + mean


# ---------------------------------------------------------------- the test


@pytest.mark.parametrize("rows", [(40, 40), (30, 50), (61, 2)], ids=str)
@pytest.mark.parametrize("block", [1, 4 * 1000, shift.BLOCK_BYTES], ids="{} bytes a block".format)
def test_a_shuffle_has_the_mmd_of_its_rows(rows: tuple[int, int], block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the null's figures is what the loss itself says of the rows that the shuffle put on each side."""
    monkeypatch.setattr(shift, "BLOCK_BYTES", block)
    n, m = rows
    a, b = normal(n), normal(m, 0.5, seed=1)
    found = two_sample(a, b, permutations=20, seed=3)
    pooled = torch.cat([a, b]).double()
    assert found.mmd == pytest.approx(float(reference(a, b, estimator="unbiased")), abs=found.rounding)
    for value, shuffle in zip(found.null, _shuffles(n, m, 20, 3), strict=True):
        on_a = shuffle > 0
        assert int(on_a.sum()) == n
        truth = reference(pooled[on_a], pooled[~on_a], estimator="unbiased")
        assert float(value) == pytest.approx(float(truth), abs=found.rounding)


def test_the_kernel_is_that_of_the_loss() -> None:
    a, b = normal(30).double(), normal(20, 1.0, seed=1).double()
    kernel = GaussianKernel.of(torch.cat([a, b]))
    ours = kernel(a, a).mean() + kernel(b, b).mean() - 2 * kernel(a, b).mean()
    torch.testing.assert_close(ours, reference(a, b), rtol=1e-12, atol=1e-14)
    assert float(GaussianKernel.of(torch.ones(3, 2))(torch.ones(3, 2), torch.ones(3, 2)).min()) == 5.0


def test_what_differs_has_the_least_p_value_there_is() -> None:
    found = two_sample(normal(100), normal(100, 1.0, seed=1), permutations=199)
    assert found.p_value == 1 / 200
    assert found.mmd > float(found.null.max())


def test_what_is_equal_is_not_told_apart() -> None:
    rows = normal(50)
    assert two_sample(rows, rows, permutations=199).p_value == 1.0  # nearer than any two halves
    assert two_sample(torch.ones(9, 3), torch.ones(8, 3), permutations=199).p_value == 1.0


def test_the_level_is_what_it_says() -> None:
    """Of 200 pairs of one kind 5 % are rejected at 0.05: 10 of them, give or take 3 times the spread of 3.1."""
    p_values = [two_sample(normal(24, seed=2 * i), normal(16, seed=2 * i + 1), 99, i).p_value for i in range(200)]
    assert 1 <= sum(p <= 0.05 for p in p_values) <= 19
    assert 78 <= sum(p <= 0.5 for p in p_values) <= 122


def test_the_shuffles_are_the_seeds() -> None:
    a, b = normal(20), normal(20, seed=1)
    first, again, other = (two_sample(a, b, 50, seed).null for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_witness_is_the_difference_of_the_means_without_the_row_itself() -> None:
    a, b = normal(6), normal(9, 1.0, seed=1)
    pooled = torch.cat([a, b])
    kernel = GaussianKernel.of(pooled)(pooled, pooled).double().numpy()
    sides = np.arange(15) < 6
    wanted = []
    for i in range(15):
        others = np.arange(15) != i
        wanted.append(kernel[i, sides & others].mean() - kernel[i, ~sides & others].mean())
    assert two_sample(a, b, 20).witness.numpy() == pytest.approx(np.array(wanted), abs=1e-6)


def test_a_row_stands_out_once_and_is_shortened() -> None:
    side = Texts("a.jsonl", ["dull", "long " * 100, "best\n two", "best\n two"], np.array([3, 5, 8, 9]))
    found = most_typical(side, torch.tensor([0.0, 1.0, 3.0, 3.0]), 2)
    assert [row["row"] for row in found] == [8, 5]
    assert found[0] == {"row": 8, "witness": 3.0, "text": "best two"}
    assert len(found[1]["text"]) == shift.TEXT_LENGTH
    assert found[1]["text"].endswith("...")


# ---------------------------------------------------------------- features


def test_features_are_the_mean_over_each_rows_own_tokens(folder: Path) -> None:
    encoder = load_encoder(Model(model_name_or_path=str(folder / "model")), 8)
    texts = ["good", "a really long text that is cut at eight tokens", "", *(f"bad film {i}" for i in range(100))]
    told: list[tuple[int, int]] = []
    found = mean_pooled(encoder, texts, lambda done, total: told.append((done, total)))
    assert found.shape == (103, 32)
    assert told == [(64, 103), (103, 103)]
    for i in (0, 1, 2, 50):
        inputs = encoder.tokenizer(texts[i], truncation=True, max_length=8, return_tensors="pt")
        with torch.no_grad():
            alone = encoder.model(**inputs).last_hidden_state[0].mean(0)
        torch.testing.assert_close(found[i], alone, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- the command


def write_texts(file: Path, words: list[str], rows: int, seed: int, **more: Any) -> None:
    random = np.random.default_rng(seed)
    texts = [" ".join(random.choice(words, 6)) for _ in range(rows)]
    file.write_text("".join(json.dumps({"text": text, "n": i % 2, **more}) + "\n" for i, text in enumerate(texts)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of other words, a.jsonl and b.jsonl, and c.jsonl of a's."""
    folder = tmp_path_factory.mktemp("shift")
    write_model(folder / "model")
    words = WORDS.split()
    for seed, (name, some) in enumerate({"a": words[:12], "b": words[12:], "c": words[:12]}.items()):
        write_texts(folder / f"{name}.jsonl", some, 60, seed)
    return folder


def invoke(folder: Path, *arguments: str, model: bool = True) -> Any:
    given = ["--model", str(folder / "model"), "--max-length", "16"] if model else []
    return CliRunner().invoke(app, ["shift", *arguments, *given], env={"COLUMNS": "120"})


def test_the_command_tells_writes_and_draws(folder: Path, tmp_path: Path) -> None:
    a, b = str(folder / "a.jsonl"), str(folder / "b.jsonl")
    report, plot = tmp_path / "shift.json", tmp_path / "shift.png"
    done = invoke(folder, a, b, "--json", str(report), "--plot", str(plot), "--permutations", "99", "--where", "n=1")
    assert done.exit_code == 0, done.stderr
    assert "encoded 60 of 60 rows" in done.stdout
    assert "p         0.0100: they differ" in done.stdout
    assert f"most typical of {a} (30 rows)" in done.stdout
    figures = runs.read_json(report)
    assert figures["p_value"] == 0.01
    assert figures["permutations"] == 99
    assert figures["rows_in_both"] == 0
    assert figures["mmd"] > figures["null"]["largest"]
    for side, file in (("a", a), ("b", b)):
        assert figures[side]["path"] == file
        assert figures[side]["rows"] == 30
        witness = [row["witness"] for row in figures[side]["typical"]]
        assert len(witness) == 5
        assert witness == sorted(witness, reverse=True)
        lines = Path(file).read_text().splitlines()
        for row in figures[side]["typical"]:
            assert json.loads(lines[row["row"]]) == {"text": row["text"], "n": 1}
            assert row["text"] in done.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_data_of_one_kind_are_not_told_apart_and_common_rows_are_told(folder: Path, tmp_path: Path) -> None:
    both = tmp_path / "both.jsonl"
    lines = (folder / "a.jsonl").read_text().splitlines()[:5] + (folder / "c.jsonl").read_text().splitlines()
    both.write_text("\n".join(lines) + "\n")
    done = invoke(folder, str(folder / "a.jsonl"), str(both), "--permutations", "199", "--limit", "59")
    assert done.exit_code == 0, done.stderr
    assert "nothing says that they differ" in done.stdout
    assert "rows of A stand in B too" in done.stdout


def test_a_recipe_gives_the_encoder_and_options_go_before_it(folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: a\ntask: classification\nmodel: {{model_name_or_path: {folder / 'model'}}}\n"
        f"data: {{train: {{path: {folder / 'a.jsonl'}}}, text_column: sentence, max_length: 16}}\n"
    )
    report = tmp_path / "shift.json"
    arguments = [str(folder / "a.jsonl"), str(folder / "b.jsonl"), "--recipe", str(recipe), "--permutations", "19"]
    refused = invoke(folder, *arguments, model=False)
    assert (refused.exit_code, "--text-column = 'sentence'" in refused.stderr) == (2, True)
    done = invoke(folder, *arguments, "--text-column", "text", "--json", str(report), model=False)
    assert done.exit_code == 0, done.stderr
    figures = runs.read_json(report)
    assert (figures["text_column"], figures["max_length"]) == ("text", 16)
    assert figures["model"] == str(folder / "model")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a.jsonl", "a.jsonl"], "B = {}/a.jsonl: is the same as A: there is nothing to compare"),
        (["a.jsonl", "link.jsonl"], "B = {}/link.jsonl: is the same as A: there is nothing to compare"),
        (["a.jsonl", "b.jsonl", "--plot", "{}/none/p.png"], "--plot {}/none/p.png: there is no folder {}/none"),
        (["a.jsonl", "b.jsonl", "--plot", "{}/p.svg"], "--plot {}/p.svg: should be a file that ends in .png"),
        (["a.jsonl", "b.jsonl", "--json", "{}/none/f"], "--json {}/none/f: there is no folder {}/none"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_is_refused_before_anything_is_loaded(
    folder: Path, arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fleetune.shift_command.answer_of", None)
    (folder / "link.jsonl").unlink(missing_ok=True)
    (folder / "link.jsonl").symlink_to(folder / "a.jsonl")
    given = [a.format(folder) if "{}" in a else str(folder / a) if a.endswith(".jsonl") else a for a in arguments]
    done = invoke(folder, *given)
    assert (done.exit_code, done.stderr) == (2, "error: " + said.replace("{}", str(folder)) + "\n")


def test_without_a_model_it_says_what_one_is(folder: Path) -> None:
    done = invoke(folder, str(folder / "a.jsonl"), str(folder / "b.jsonl"), model=False)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: --model: is required: the encoder whose features are compared")
    assert "--recipe RECIPE" in done.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"a": "{}/none.jsonl"}, "A = {}/none.jsonl: there is no such file"),
        ({"b": "{}/rows.doc"}, "B = {}/rows.doc: should be a file that ends in .tsv, .csv, .json, .jsonl, .parquet"),
        ({"b": "{}/broken.jsonl"}, "B = '{}/broken.jsonl': cannot be read: line 1"),
        ({"b": "{}/one.jsonl"}, "B = {}/one.jsonl: has 1 row; the test needs at least 2"),
        ({"b": "{}/list.jsonl"}, "B = {}/list.jsonl: row 0 (counted from 0) has ['a'], which is no text"),
        ({"b": "{}/half.jsonl"}, "B = {}/half.jsonl: row 1 (counted from 0) is not valid Unicode"),
        ({"text_column": "txt"}, "A = {}/a.jsonl: --text-column = 'txt': the data has no such column; it has text, n;"),
        ({"where": ["n"]}, "--where n: should be COLUMN=VALUE"),
        ({"where": ["n=[1]"]}, "--where n=[1]: the value should be text, a number, true or false"),
        ({"where": ["k=1"]}, "A = {}/a.jsonl: --where k = 1: the data has no such column"),
        ({"where": ["n=7"]}, "A = '{}/a.jsonl': has no rows with {'n': 7}"),
        ({"model": "{}/none"}, "--model '{}/none': cannot be loaded"),
        ({"max_length": 65}, "--max-length 65: the model takes at most 64 tokens"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_fault_names_the_option_and_the_value(
    folder: Path, options: dict[str, Any], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "rows.doc").write_text("a")
    (folder / "broken.jsonl").write_text("{")
    (folder / "one.jsonl").write_text('{"text": "a"}\n')
    (folder / "list.jsonl").write_text('{"text": ["a"]}\n{"text": "b"}\n')
    (folder / "half.jsonl").write_text('{"text": "a"}\n{"text": "\\ud83d"}\n')
    given = {"a": "{}/a.jsonl", "b": "{}/b.jsonl", "model": "{}/model", "text_column": "text", "max_length": 16}
    given |= {"where": [], "limit": None, "permutations": 19, "seed": 0, "show": 1, "plot": None}
    given |= {"revision": None, "trust_remote_code": False, **options}
    values = {k: v.replace("{}", str(folder)) if isinstance(v, str) else v for k, v in given.items()}
    assert print_report(lambda: shift.compare(argparse.Namespace(**values))) == 2
    assert f"error: {said.replace('{}', str(folder))}" in capfd.readouterr().err
