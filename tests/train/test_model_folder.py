"""RUN/model of a language model: whoever loads it writes as it learnt to, and stops where it learnt to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import write_language_model, write_prompts
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from fleetune import runs
from fleetune.schema import Recipe
from fleetune.train import model_folder
from fleetune.train.data import prepare
from fleetune.train.model import build_model, load_tokenizer
from fleetune.train.trained import load_trained

END = "<|im_end|>"
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} <|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)
REPORT: dict[str, Any] = {"parameters": 1, "step": 1, "best_step": 1, "validation": {}, "test": {}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base model whose tokenizer knows the token that the template ends turns with, and ends texts with another."""
    monkeypatch.setenv("FLEETUNE_CACHE", str(tmp_path / "cache"))
    write_language_model(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.add_special_tokens({"additional_special_tokens": [END]})
    tokenizer.save_pretrained(tmp_path / "base")
    write_prompts(tmp_path / "rows.jsonl", 8)
    return tmp_path


def written(folder: Path, lora: dict[str, Any] | None = None, **data: Any) -> tuple[Recipe, Path, Any]:
    model = {"model_name_or_path": str(folder / "base"), "lora": lora}
    values = {"train": {"path": str(folder / "rows.jsonl")}, "max_length": 60, **data}
    recipe = Recipe.model_validate({"name": "x", "task": "causal_lm", "model": model, "data": values})
    tokenizer = load_tokenizer(recipe)
    prepared = prepare(recipe, tokenizer)
    built: Any = build_model(recipe, [], torch.float32, {"zero_optimization": {"stage": 0}})
    model_folder.write(runs.Run(folder), recipe, built, built.state_dict(), tokenizer, prepared, REPORT)
    return recipe, folder / "model", tokenizer


def test_it_stops_where_the_rows_end_that_it_learnt_from(folder: Path) -> None:
    _, path, tokenizer = written(folder, chat_template=TEMPLATE)
    ends = GenerationConfig.from_pretrained(path).eos_token_id
    assert ends == [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END)]
    assert AutoModelForCausalLM.from_pretrained(path).generation_config.eos_token_id == ends


def test_the_last_word_of_some_answers_is_no_end(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.add_tokens(["</call>"])
    tokenizer.save_pretrained(folder / "base")
    rows = folder / "rows.jsonl"
    rows.write_text(rows.read_text(encoding="utf-8") + '{"prompt": "good", "completion": "yes </call>"}\n', "utf-8")
    _, path, tokenizer = written(folder, chat_template=TEMPLATE.replace(END, ""))
    assert GenerationConfig.from_pretrained(path).eos_token_id == [tokenizer.eos_token_id]


def test_an_adapter_does_and_what_it_is_merged_into(folder: Path) -> None:
    recipe, path, tokenizer = written(folder, {"r": 2}, chat_template=TEMPLATE)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END)]
    assert load_trained(recipe, path).generation_config.eos_token_id == ends


def test_settings_of_the_base_that_transformers_would_refuse_to_save_are_no_obstacle(folder: Path) -> None:
    odd = runs.read_json(folder / "base" / "generation_config.json") | {"temperature": 0.9}  # without do_sample
    runs.write_json(folder / "base" / "generation_config.json", odd)
    _, path, _ = written(folder, chat_template=TEMPLATE)
    assert runs.read_json(path / "generation_config.json")["temperature"] == 0.9


def test_it_has_the_template_that_it_learnt(folder: Path) -> None:
    _, path, _ = written(folder, chat_template=TEMPLATE)
    turn = [{"role": "user", "content": "good"}]
    said = AutoTokenizer.from_pretrained(path).apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    assert said == "user : good <|im_end|>assistant :"


@pytest.mark.parametrize("data", [{}, {"chat_template": "none"}])
def test_without_one_it_gets_none(folder: Path, data: dict[str, Any]) -> None:
    _, path, tokenizer = written(folder, **data)
    assert AutoTokenizer.from_pretrained(path).chat_template is None
    assert GenerationConfig.from_pretrained(path).eos_token_id == [tokenizer.eos_token_id]
