"""MLPs over slices of the sequence: the same values and gradients, of less memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from allocation import peak_bytes

from fleetune.schema import Recipe
from fleetune.train.tiled_mlp import tile_mlps, tiles_of


def llama(**config: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    values = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, **{**values, **config}))


def loss_of(model: Any, tokens: int = 10) -> torch.Tensor:
    ids = torch.arange(2 * tokens).view(2, tokens) % 20
    return model(input_ids=ids, use_cache=False).logits.logsumexp(-1).sum()  # type: ignore[no-any-return]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tiles", [1, 3, 12])  # the last more than there are tokens
def test_values_and_gradients_are_those_of_whole_sequences(tiles: int, checkpointing: bool) -> None:
    plain = llama().double()
    tiled = copy.deepcopy(plain)
    tile_mlps(tiled, tiles)
    if checkpointing:
        tiled.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        tiled.train()
    losses = [loss_of(model) for model in (plain, tiled)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-13, atol=0)
    for loss in losses:
        loss.backward()  # type: ignore[no-untyped-call]
    for (name, expected), (_, found) in zip(plain.named_parameters(), tiled.named_parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=1e-12, msg=name)


def test_a_step_takes_less_memory_at_its_height() -> None:
    """Of two layers eight times as wide inside as outside, in eight tiles."""
    heights = []
    for tiles in (1, 8):
        model = llama(hidden_size=32, intermediate_size=256)
        tile_mlps(model, tiles)
        loss_of(model).backward()  # type: ignore[no-untyped-call]  # the gradients are there before
        heights.append(peak_bytes(lambda model=model: loss_of(model, 512).backward()))
    assert heights[1] < 0.5 * heights[0], heights


def test_each_mlp_runs_equally_often_whatever_the_length() -> None:
    """As ZeRO-3 must: each time, all ranks gather its weights."""
    model = llama()
    tile_mlps(model, 5)
    calls: list[int] = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
    for tokens in (2, 10):
        calls.clear()
        loss_of(model, tokens)
        assert len(calls) == 5


def test_without_gradients_it_runs_once() -> None:
    model = llama()
    tile_mlps(model, 5)
    calls: list[int] = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        loss_of(model)
    assert len(calls) == 1


def test_a_model_without_such_modules_is_refused() -> None:
    from transformers import OPTConfig, OPTForCausalLM

    small = OPTConfig(vocab_size=20, hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ValueError, match=r"^model\.mlp_tiles: the layers of a opt model have no module `mlp`"):
        tile_mlps(OPTForCausalLM(small), 2)


def test_a_model_whose_mlp_takes_more_than_its_input_is_refused() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    bloom = BloomForCausalLM(BloomConfig(vocab_size=20, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="the MLP of a bloom model takes more than its input"):
        tile_mlps(bloom, 2)


@pytest.mark.parametrize(
    ("wanted", "max_length", "size", "tiles"),
    [(None, 4096, 1, 1), (3, 4096, 1, 3), ("auto", 4096, 1, 4), ("auto", 4097, 1, 5), ("auto", 4096, 2, 2)],
)
def test_auto_is_about_as_many_tokens_as_the_model_is_wide(wanted: Any, max_length: int, size: int, tiles: int) -> None:
    recipe = Recipe.model_validate(
        {
            "name": "x",
            "task": "causal_lm",
            "model": {"model_name_or_path": "m", "mlp_tiles": wanted},
            "data": {"train": {"path": "t"}, "max_length": max_length},
            "training": {"sequence_parallel_size": size},
        }
    )
    assert tiles_of(recipe, llama(hidden_size=1024, num_hidden_layers=1).config) == tiles
