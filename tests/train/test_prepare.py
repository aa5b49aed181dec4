"""What is checked before anything starts: that a model has its rows' tokens, and knows where a row ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import write_language_model, write_prompts, write_rows
from transformers import AutoTokenizer

from fleetune.schema import Recipe, RecipeError
from fleetune.train import setup
from fleetune.train.data import Prepared
from fleetune.train.distributed import World
from fleetune.train.model import build_model
from fleetune.train.prepare import prepare_recipe


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A decoder without a padding token, whose tokenizer has been given one: the first of five rows to spare."""
    monkeypatch.setenv("FLEETUNE_CACHE", str(tmp_path / "cache"))
    write_language_model(tmp_path / "model")
    add_tokens(tmp_path, pad_token="[PAD]")
    write_rows(tmp_path / "rows.jsonl", 8)
    write_prompts(tmp_path / "prompts.jsonl", 8)
    return tmp_path


def add_tokens(folder: Path, *more: str, pad_token: str | None = None) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    named = {} if pad_token is None else {"pad_token": pad_token}
    tokenizer.add_special_tokens({**named, "additional_special_tokens": list(more)})
    tokenizer.save_pretrained(folder / "model")
    return tokenizer


def recipe(folder: Path, task: str = "classification", **sections: Any) -> Recipe:
    rows = "rows" if task == "classification" else "prompts"
    data = {"train": {"path": str(folder / f"{rows}.jsonl")}, "max_length": 60}
    values = {"name": "x", "task": task, "model": {"model_name_or_path": str(folder / "model")}, "data": data}
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}  # type: ignore[dict-item]
    return Recipe.model_validate(values)


def test_a_decoder_without_a_padding_token_takes_the_tokenizers_and_reads_what_stands_before_it(folder: Path) -> None:
    found = recipe(folder)
    prepare_recipe(found)
    model: Any = build_model(found, ["a", "b"], torch.float32, {"zero_optimization": {"stage": 0}}).eval()
    padding = AutoTokenizer.from_pretrained(folder / "model").pad_token_id
    short = torch.tensor([[1, 5, 9]])
    padded = torch.tensor([[1, 5, 9, padding, padding]])
    masks = torch.ones_like(short), (padded != padding).long()
    plain, wide = (model(ids, attention_mask=m).logits for ids, m in zip((short, padded), masks, strict=True))
    torch.testing.assert_close(wide, plain)


def test_another_padding_token_than_the_tokenizers_is_refused(folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"^model\.config\.pad_token_id = 2: .* should be \d+$"):
        prepare_recipe(recipe(folder, model={"config": {"pad_token_id": 2}}))


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_a_token_that_occurs_and_has_no_embedding_is_named(folder: Path, task: str) -> None:
    tokenizer = add_tokens(folder, "[A]", "[B]", "[C]", "[D]", "[E]", "[F]")
    prepare_recipe(recipe(folder, task))  # the last two have no row, and do not occur
    row = {"text": "good [F]", "label": 0} if task == "classification" else {"prompt": "good", "completion": "[F]"}
    file = folder / ("rows.jsonl" if task == "classification" else "prompts.jsonl")
    file.write_text(file.read_text(encoding="utf-8") + json.dumps(row | {"weight": 1.0}) + "\n", encoding="utf-8")
    number = tokenizer.convert_tokens_to_ids("[F]")
    said = rf"gives number {number} \('\[F\]'\); set model\.resize_embeddings to {number + 1} or more"
    with pytest.raises(RecipeError, match=said):
        prepare_recipe(recipe(folder, task))
    prepare_recipe(recipe(folder, task, model={"resize_embeddings": number + 1}))


def test_plain_text_has_no_answers_to_hold_against(folder: Path) -> None:
    wanted = {"exact_match": {"pattern": "(yes|no)"}}
    prepare_recipe(recipe(folder, "causal_lm", evaluation=wanted, data={"validation_fraction": 0.5}))
    (folder / "prompts.jsonl").write_text('{"text": "good"}\n{"text": "bad"}\n', encoding="utf-8")
    with pytest.raises(RecipeError, match=r"^evaluation\.exact_match\.pattern = .*: needs answers"):
        prepare_recipe(recipe(folder, "causal_lm", evaluation=wanted, data={"validation_fraction": 0.5}))


def test_nodes_that_read_other_data_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Prepared({}, [], {"content": "a"})
    for found, said in ((["a", "a"], None), (["a", "b", "a", "b"], r"^data: 2 of 4 ranks have read .* rank 1: a file")):
        monkeypatch.setattr(setup, "gather_objects", lambda content, world, found=found: found)
        if said is None:
            setup._check_alike(data, World(0, 2, 0, torch.device("cpu")))
            continue
        with pytest.raises(RecipeError, match=said):
            setup._check_alike(data, World(0, 4, 0, torch.device("cpu")))


def test_the_highest_token_is_that_of_all_splits(folder: Path) -> None:
    found = prepare_recipe(recipe(folder, "causal_lm", data={"validation_fraction": 0.5}))
    ids = [np.load(path) for path in (folder / "cache").glob("tokens/*/*/input_ids.npy")]
    assert len(ids) == 2
    assert found["highest_token"] == max(int(one.max()) for one in ids)
