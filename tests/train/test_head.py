"""A head that computes its loss itself: the logits of every family that does something of its own to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import write_language_model
from torch.nn import functional

from fleetune.schema import Recipe, RecipeError
from fleetune.train.head import Head, check_head, fuse_head
from fleetune_kernels import linear_cross_entropy

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 5.0},
    "gpt2": {},
    "phi": {},  # its head has a bias
}
RECIPE = Recipe.model_validate(
    {
        "name": "x",
        "task": "causal_lm",
        "model": {"model_name_or_path": "m"},
        "data": {"train": {"path": "t"}},
    }
)


def fused(folder: Path, family: str, **config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    write_language_model(folder, family=family, initializer_range=0.5, **config)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    fuse_head(model)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_models_own_logits(family: str, tmp_path: Path) -> None:
    model = fused(tmp_path, family, **FAMILIES[family])
    check_head(model, RECIPE, model.config, torch.device("cpu"))
    ids = torch.randint(3, 20, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.roll(-1, 1)

    def loss_of(head: Head, _: Any) -> torch.Tensor:
        return linear_cross_entropy(  # type: ignore[no-any-return]
            head.hidden_states,
            head.weight,
            labels,
            bias=head.bias,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            backend="torch",
        )

    plain = functional.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), labels.flatten())
    without = model(input_ids=ids, compute=loss_of)
    torch.testing.assert_close(without, plain)
    gradients = []
    for loss in (plain, without):
        model.zero_grad()
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, truth in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], truth, rtol=1e-4, atol=1e-6, msg=name)


def test_a_family_that_does_more_to_its_logits_is_refused(tmp_path: Path) -> None:
    model = fused(tmp_path, "llama")
    plain = model.lm_head.forward
    model.lm_head.forward = lambda hidden_states, compute=None: (
        plain(hidden_states) * 1.01 if compute is None else plain(hidden_states, compute)
    )
    with pytest.raises(RecipeError, match="use kernels: reference"):
        check_head(model, RECIPE, model.config, torch.device("cpu"))
