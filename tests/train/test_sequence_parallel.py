"""Slices of sequences: nothing lost at a border, masks of the whole; tests/integration has the ranks themselves."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import recipe_values, write_language_model, write_prompts

from fleetune.schema import Recipe, RecipeError
from fleetune.train import sequence_parallel
from fleetune.train.batches import MicroBatch, collate_tokens
from fleetune.train.data import Split
from fleetune.train.distributed import World
from fleetune.train.sequence_parallel import WHOLE, check_shared, share_of, share_sequences

LENGTHS = (5, 3, 6, 2)


def split() -> Split:
    """Row i's tokens are 10 * i + 1 and so on; its first one teaches nothing, and its weight is i + 1."""
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)])
    ids = np.concatenate([10 * i + 1 + np.arange(length) for i, length in enumerate(LENGTHS)])
    supervised = np.concatenate([np.arange(length) > 0 for length in LENGTHS]).astype(np.uint8)
    weights = np.arange(1, 5, dtype=np.float32)
    return Split(ids.astype(np.int32), offsets, None, None, weights, np.arange(4), None, supervised)


def whole(packed: bool, size: int = 4) -> MicroBatch:
    packs = [np.array([0, 1, 3]), np.array([2])] if packed else [np.array([i]) for i in range(4)]
    return collate_tokens(split(), packs, 0, size, packed=packed)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("packed", [False, True])
def test_slices_together_are_the_sequences(packed: bool, size: int) -> None:
    batch = whole(packed)
    shares = [share_of(batch, place, size) for place in range(size)]

    def together(tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(tensors, dim=1)

    assert torch.equal(together([share.inputs["input_ids"] for share in shares]), batch.inputs["input_ids"])
    assert torch.equal(together([share.labels for share in shares]), batch.labels)
    assert torch.equal(together([share.weights for share in shares]), batch.weights)
    positions = shares[0].inputs[WHOLE]
    assert torch.equal(together([share.inputs["position_ids"] for share in shares]), positions)
    expected = batch.inputs["position_ids"] if packed else torch.arange(8).expand(4, 8)
    assert torch.equal(positions, expected)


def test_the_last_token_of_a_slice_learns_the_first_of_the_next() -> None:
    first, second = (share_of(whole(packed=True, size=2), place, 2) for place in range(2))
    assert first.inputs["input_ids"][0].tolist() == [1, 2, 3, 4, 5]
    assert second.inputs["input_ids"][0].tolist() == [11, 12, 13, 31, 32]
    assert first.labels[1].tolist() == [22, 23, 24, 25, 26]
    assert second.inputs["input_ids"][1, 0] == 26


def test_examples_and_tokens_are_counted_once_and_learnt_tokens_where_they_are() -> None:
    batch = whole(packed=True)
    shares = [share_of(batch, place, 4) for place in range(4)]
    assert sum(share.examples for share in shares) == batch.examples == 4
    assert sum(share.tokens for share in shares) == batch.tokens == sum(LENGTHS)
    learnt = [share.labels.flatten()[share.supervised] for share in shares]
    assert all((labels > 0).all() for labels in learnt)
    assert sum(map(len, learnt)) == sum(LENGTHS) - len(LENGTHS)


# ---------------------------------------------------------------- masks and heads


@pytest.mark.parametrize("family", ["causal", "sliding"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_mask_is_that_of_whole_sequences(packed: bool, family: str) -> None:
    from transformers import MistralConfig
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask, sdpa_mask

    make: Any = create_causal_mask if family == "causal" else create_sliding_window_causal_mask
    config = MistralConfig(hidden_size=8, num_attention_heads=2, sliding_window=3, attn_implementation="sdpa")
    positions = torch.arange(8)[None] if not packed else torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0]])

    def mask_of(positions: torch.Tensor) -> Any:
        embeds = torch.zeros(1, positions.shape[1], 8)
        return make(config, embeds, None, None, positions)  # by place: names differ between releases

    given: dict[str, Any] = {"batch_size": 1, "q_length": 4, "kv_length": 4, "device": torch.device("cpu")}
    if family == "sliding":
        from transformers.masking_utils import sliding_window_causal_mask_function

        given |= {"mask_function": sliding_window_causal_mask_function(3), "local_size": 3}
    else:
        from transformers.masking_utils import causal_mask_function

        given |= {"mask_function": causal_mask_function}
    found = sequence_parallel._mask(sdpa_mask, sequence_parallel._Reading(positions), **given)
    expected = mask_of(positions)
    assert (found is None) == (expected is None) == (family == "causal" and not packed)
    assert expected is None or torch.equal(found, expected)


@pytest.mark.parametrize(("heads", "keys"), [(4, 4), (8, 2), (8, 1), (12, 6)])
def test_four_ranks_have_all_heads_of_whole_sequences(heads: int, keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks one after the other: each attends as a list of what all of them send."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    size, length, width = 4, 8, 5
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, count, length, width) for count in (heads, keys, keys))
    module = SimpleNamespace(num_key_value_groups=heads // keys, is_causal=True)
    expected, _ = sdpa_attention_forward(module, query, key, value, None)  # type: ignore[arg-type]

    seen: list[torch.Tensor] = []
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: size)
    for rank in range(size):
        parts = iter((query, key.repeat_interleave(_copies(keys), 1), value.repeat_interleave(_copies(keys), 1), None))

        def exchange(blocks: torch.Tensor, group: Any, rank: int = rank, parts: Any = parts) -> torch.Tensor:
            sent = next(parts)
            if sent is None:  # the output on its way back: here it stays
                seen.append(torch.cat(list(blocks), dim=1))
                return blocks
            slices = sent.chunk(size, dim=2)  # of each rank
            return torch.stack([one.chunk(size, dim=1)[rank] for one in slices])

        monkeypatch.setattr(sequence_parallel, "_exchange", exchange)
        mine = [tensor.chunk(size, dim=2)[rank] for tensor in (query, key, value)]
        positions = torch.arange(length).expand(2, length)
        sequence_parallel._attend(
            sdpa_attention_forward,
            None,
            module,
            *mine,
            None,
            whole_position_ids=positions,  # type: ignore[arg-type]
        )
        assert module.num_key_value_groups == heads // keys
    torch.testing.assert_close(torch.cat(seen, dim=2), expected)


def _copies(keys: int) -> int:
    return int(np.lcm(keys, 4)) // keys


# ---------------------------------------------------------------- what is refused

WORLD = World(1, 2, 1, torch.device("cpu"))


def test_attention_that_cannot_be_replaced_is_refused() -> None:
    model = SimpleNamespace(config=SimpleNamespace(_attn_implementation="eager"))
    with pytest.raises(RecipeError, match=r"^training\.sequence_parallel_size = 2: this model's attention is eager"):
        share_sequences(model, 2, WORLD)


@pytest.mark.parametrize(
    ("attention", "size", "said"),
    [("sdpa", 3, "does not divide the model's attention heads; it has 4"), ("eager", 2, "attention is eager")],
)
def test_a_model_that_does_not_fit_is_refused_before_anything_starts(
    attention: str, size: int, said: str, tmp_path: Path
) -> None:
    from fleetune.train.prepare import prepare_recipe

    write_language_model(tmp_path / "model")
    for split in ("train", "validation"):
        write_prompts(tmp_path / f"{split}.jsonl", 4)
    model = {"attn_implementation": attention}
    values = recipe_values(tmp_path, "x", model=model, training={"sequence_parallel_size": size})
    recipe = Recipe.model_validate({**values, "task": "causal_lm"})
    with pytest.raises(ValueError, match=rf"^training\.sequence_parallel_size = {size}: .*{re.escape(said)}"):
        prepare_recipe(recipe)


@pytest.mark.parametrize("mixes", [False, True])
def test_a_model_that_mixes_tokens_outside_of_attention_is_refused(
    mixes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here by a running sum, which a slice begins anew."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: None)

    def forward(input_ids: torch.Tensor, **_: Any) -> Any:
        values = input_ids.float()
        return SimpleNamespace(logits=values.cumsum(1)[..., None] if mixes else values[..., None])

    config = SimpleNamespace(vocab_size=50, model_type="mixer")
    if not mixes:
        check_shared(forward, 2, config, WORLD)
        return
    with pytest.raises(
        RecipeError, match=r"^training\.sequence_parallel_size = 2: slices of a mixer model's sequences"
    ):
        check_shared(forward, 2, config, WORLD)
