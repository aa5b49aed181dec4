"""Packs: every row once, never over the length, hardly any room left, the same whatever the ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fleetune.schema import RecipeError
from fleetune.train.packing import check_packs, pack

LENGTHS = st.lists(st.integers(1, 64), min_size=1, max_size=200).map(np.array)


@given(LENGTHS, st.integers(0, 5), st.integers(0, 3))
def test_every_row_stands_in_one_pack_and_none_is_over_full(lengths: np.ndarray, seed: int, epoch: int) -> None:
    packs = pack(lengths, 64, seed, epoch)
    assert sorted(np.concatenate(packs).tolist()) == list(range(len(lengths)))
    assert all(0 < lengths[rows].sum() <= 64 for rows in packs)


@given(LENGTHS)
def test_no_two_packs_would_fit_into_one(lengths: np.ndarray) -> None:
    filled = sorted(int(lengths[rows].sum()) for rows in pack(lengths, 64, 0, 0))
    assert len(filled) == 1 or filled[0] + filled[1] > 64


@given(LENGTHS)
def test_there_are_as_many_in_every_epoch_and_others_together(lengths: np.ndarray) -> None:
    assert len({len(pack(lengths, 64, seed, epoch)) for seed, epoch in ((0, 0), (0, 1), (3, 7))}) == 1


def test_the_seed_and_the_epoch_decide_who_stands_together() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 300)
    first, again = pack(lengths, 64, 1, 2), pack(lengths.copy(), 64, 1, 2)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    others = [pack(lengths, 64, seed, epoch) for seed, epoch in ((1, 3), (2, 2))]
    assert all(any(a.tolist() != b.tolist() for a, b in zip(first, other, strict=True)) for other in others)


@pytest.mark.parametrize("max_length", [128, 512, 2048])
def test_lengths_as_texts_have_them_leave_under_three_percent_of_padding(max_length: int) -> None:
    lengths = np.random.default_rng(0).lognormal(4.5, 0.8, 3000).astype(np.int64).clip(1, max_length)
    packs = pack(lengths, max_length, 0, 0)
    assert 1 - lengths.sum() / (len(packs) * max_length) < 0.03


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}


@pytest.mark.parametrize("rows", [1, 4])
def test_a_model_that_keeps_packs_apart_is_taken_and_one_that_does_not_is_refused(rows: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=64)).eval()
    check_packs(llama, llama.config, rows, torch.device("cpu"))
    opt = OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32)).eval()  # looks at its mask alone
    with pytest.raises(
        RecipeError, match=r"data\.packing = True: a opt model with sdpa attention does not keep packed"
    ):
        check_packs(opt, opt.config, rows, torch.device("cpu"))
