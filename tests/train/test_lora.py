"""Where an adapter may stand, and what is said where it may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import recipe_values, write_language_model, write_model

from fleetune.schema import Recipe
from fleetune.train.lora import adapter_names, merge
from fleetune.train.model import ModelError, build_model, model_location

PLAIN = {"zero_optimization": {"stage": 0}}


def recipe(folder: Path, lora: dict[str, Any], task: str = "causal_lm", kernels: str = "auto") -> Recipe:
    model = {"model_name_or_path": str(folder / "model"), "lora": lora}
    return Recipe.model_validate({**recipe_values(folder, "lora", model=model), "task": task, "kernels": kernels})


def trained(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_matrices_stand_beside_every_linear_map_but_the_head_and_nothing_else_trains(tmp_path: Path) -> None:
    write_language_model(tmp_path / "model", tie_word_embeddings=False)
    model: Any = build_model(recipe(tmp_path, {"r": 3}), [], torch.float32, PLAIN)
    assert trained(model) == adapter_names(model)
    places = {name.partition(".lora_")[0].removeprefix("model.layers.") for name in trained(model)}
    maps = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    assert places == {f"{i}.{m}" for i in (0, 1) for m in (*maps, *(f"mlp.{n}_proj" for n in ("gate", "up", "down")))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_the_start_it_changes_nothing_and_is_drawn_from_the_seed(tmp_path: Path, dtype: torch.dtype) -> None:
    write_language_model(tmp_path / "model")
    wanted = recipe(tmp_path, {})
    whole = wanted.model_copy(update={"model": wanted.model.model_copy(update={"lora": None})})
    ids = torch.tensor([[1, 4, 7, 9]])
    torch.manual_seed(1)
    model: Any = build_model(wanted, [], dtype, PLAIN)
    plain: Any = build_model(whole, [], dtype, PLAIN)
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    again = dict(build_model(wanted, [], dtype, PLAIN).named_parameters())
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert all(torch.equal(parameter, again[name]) for name, parameter in model.named_parameters())


def test_merging_leaves_the_names_of_a_model_that_never_had_one(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    wanted = recipe(tmp_path, {"r": 2}, task="classification")
    whole = wanted.model_copy(update={"model": wanted.model.model_copy(update={"lora": None})})
    model: Any = build_model(wanted, ["a", "b"], torch.float64, PLAIN).eval()
    assert {"bert.pooler", "classifier"} == {
        name.partition(".modules_to_save.")[0] for name in trained(model) if "modules_to_save" in name
    }
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 if parameter.requires_grad else 0.0)
    ids = torch.tensor([[101, 2204, 102]])
    before = model(input_ids=ids).logits
    merged = merge(model)
    torch.testing.assert_close(merged(input_ids=ids).logits, before, rtol=0, atol=1e-12)
    assert (
        dict(merged.named_parameters()).keys()
        == dict(build_model(whole, ["a", "b"], torch.float64, PLAIN).named_parameters()).keys()
    )


@pytest.mark.parametrize(
    ("lora", "tied", "message"),
    [
        ({"target_modules": ["q_prj"]}, True, "target_modules.0 = 'q_prj': the model has no .* did you mean `q_proj`"),
        ({"target_modules": ["q_proj", "zz"]}, True, "target_modules.1 = 'zz': the model has no module .*; there are "),
        ({"modules_to_save": ["score"]}, True, "modules_to_save.0 = 'score': the model has no module of that name"),
        ({"target_modules": ["lm_head"]}, True, "the head and the token embeddings are one matrix here"),
        ({"modules_to_save": ["embed_tokens"]}, True, "the head and the token embeddings are one matrix here"),
        ({"target_modules": ["lm_head"]}, False, "is the head, which the fused loss reads as one matrix"),
    ],
)
def test_a_module_that_cannot_be_adapted_is_an_error(
    tmp_path: Path, lora: dict[str, Any], tied: bool, message: str
) -> None:
    write_language_model(tmp_path / "model", tie_word_embeddings=tied)
    with pytest.raises(ValueError, match=message):
        build_model(recipe(tmp_path, lora), [], torch.float32, PLAIN)


def test_an_adapter_is_no_model_to_start_from(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"is an adapter; `fleetune export .* FOLDER --merge` makes a model of it"):
        model_location(str(tmp_path))


def test_the_head_may_be_adapted_where_the_model_makes_its_own_logits(tmp_path: Path) -> None:
    write_language_model(tmp_path / "model", tie_word_embeddings=False)
    wanted = recipe(tmp_path, {"target_modules": ["lm_head"]}, kernels="reference")
    model: Any = build_model(wanted, [], torch.float32, PLAIN)
    assert trained(model) == {"lm_head.lora_A.default.weight", "lm_head.lora_B.default.weight"}
