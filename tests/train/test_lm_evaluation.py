"""`fleetune eval --lm-eval`: tasks of one's own by the real lm-eval, its figures held against plain log-likelihoods."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import recipe_values, write_language_model, write_model, write_prompts
from transformers import AutoTokenizer
from typer.testing import CliRunner

from fleetune.cli import app
from fleetune.recipe import dump_recipe
from fleetune.schema import Recipe, RecipeError
from fleetune.train import lm_evaluation
from fleetune.train.lm_evaluation import lm_evaluate
from fleetune.train.lora import save_adapter
from fleetune.train.model import build_model
from fleetune.train.trained import load_trained, recipe_and_model

CHOICES = ["no", "yes very good"]
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{rows}"}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: {choices}
doc_to_target: "{{{{{choices}.index(completion)}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter over a language model as training leaves one, a classifier, and a folder with one task."""
    folder = tmp_path_factory.mktemp("lm-eval")
    write_language_model(folder / "model", tie_word_embeddings=False)
    rows = write_prompts(folder / "rows.jsonl", 12)
    (folder / "tasks").mkdir()
    (folder / "tasks" / "kind.yaml").write_text(TASK.format(name="kind", rows=rows, choices=CHOICES))
    model = {"model_name_or_path": str(folder / "model"), "lora": {"r": 4}}
    values = {**recipe_values(folder, "lm", model=model), "task": "causal_lm"}
    recipe = Recipe.model_validate(values)
    trained: Any = build_model(recipe, [], torch.float32, {"zero_optimization": {"stage": 0}})
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    save_adapter(trained, trained.state_dict(), folder / "adapter")
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(folder / "adapter")
    (folder / "adapter" / "recipe.yaml").write_text(dump_recipe(recipe))
    write_model(folder / "classifier")
    plain = Recipe.model_validate(recipe_values(folder, "classifier"))
    (folder / "classifier" / "recipe.yaml").write_text(dump_recipe(plain))
    return folder


@torch.no_grad()
def right(folder: Path, count: int) -> float:
    """The share of rows whose answer the model finds the likelier, by its logits."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    model = load_trained(*recipe_and_model(folder / "adapter"))
    found = []
    for line in (folder / "rows.jsonl").read_text().splitlines()[:count]:
        row, scores = json.loads(line), []
        for choice in CHOICES:
            ids = torch.tensor([tokenizer(f"{row['prompt']} {choice}")["input_ids"]])
            logits = torch.log_softmax(model(input_ids=ids).logits[0, :-1], dim=-1)
            each = logits.gather(1, ids[0, 1:, None])[:, 0]
            scores.append(float(each[-len(choice.split()) :].sum()))
        found.append(scores.index(max(scores)) == CHOICES.index(row["completion"]))
    return sum(found) / len(found)


def refusal(folder: Path, tasks: str) -> str:
    with pytest.raises(RecipeError) as caught:
        lm_evaluate(folder, tasks, None)
    return str(caught.value)


@pytest.mark.parametrize(("tasks", "limit"), [("tasks", None), ("tasks/kind.yaml", 5)])
def test_a_folder_and_a_file_give_what_the_models_logits_say(folder: Path, tasks: str, limit: int | None) -> None:
    pytest.importorskip("lm_eval")
    (task,) = lm_evaluate(folder / "adapter", str(folder / tasks), limit)["tasks"]
    assert (task["task"], task["rows"]) == ("kind", limit or 12)
    assert task["metrics"]["acc"][0] == pytest.approx(right(folder, limit or 12))
    assert task["metrics"]["acc"][1] > 0


def test_the_command_shows_a_table(folder: Path) -> None:
    pytest.importorskip("lm_eval")
    done = CliRunner().invoke(
        app, ["eval", str(folder / "adapter"), "--lm-eval", str(folder / "tasks"), "--limit", "4"]
    )
    assert done.exit_code == 0, done.output
    assert all(text in done.output for text in ("kind", "acc", " 4 ", f"{right(folder, 4):.4f}", "standard error"))


def test_what_cannot_be_evaluated_is_one_clear_error(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    adapter = folder / "adapter"
    assert "did you mean `hellaswag`? A file is ./NAME.yaml" in refusal(adapter, "helaswag")
    assert refusal(adapter, " , ") == "--lm-eval: name tasks, with commas between them"
    assert refusal(adapter, "./none.yaml") == "--lm-eval ./none.yaml: there is no such file or folder"
    assert "has no task in a .yaml file" in refusal(adapter, f"{tmp_path}/")
    assert "is for language models, and" in refusal(folder / "classifier", "hellaswag")
    assert "no model is there" in refusal(tmp_path, "hellaswag")
    broken = tmp_path / "broken.yaml"
    broken.write_text(TASK.format(name="broken", rows=tmp_path / "gone.jsonl", choices=CHOICES))
    assert refusal(adapter, str(broken)).startswith(f"--lm-eval {broken}: FileNotFoundError: ")


def test_a_name_alone_never_finds_a_file_nearby(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(folder)
    assert "lm-eval knows no such task" in refusal(folder / "adapter", "tasks")


def test_where_it_is_not_installed_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_evaluation.importlib.util, "find_spec", lambda name: name != "lm_eval" or None)
    assert refusal(folder / "adapter", "hellaswag") == (
        "--lm-eval hellaswag: needs lm_eval: pip install 'fleetune[lm-eval]'"
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--limit", "3"], "--limit 3: is for --lm-eval"),
        (["--lm-eval", "a", "--split", "test"], "--split test: --lm-eval brings its own data"),
        (["--lm-eval", "a", "--data", "b.jsonl"], "--data b.jsonl: --lm-eval brings its own data"),
    ],
)
def test_options_that_do_not_go_together(options: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["eval", "somewhere", *options])
    assert done.exit_code == 2
    assert said in done.output
