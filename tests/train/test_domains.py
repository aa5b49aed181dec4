"""What is compared of two domains, in models of several families, and what comes of rows without weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from fleetune.schema import Recipe
from fleetune.train.domains import add_domain_heads, check_layers, head_of, layer_of
from fleetune.train.model import ModelError
from fleetune.train.objectives import build_terms
from fleetune.train.terms import Features

SIZES: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
DROPOUTS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "dropout",
    "attention_dropout",
    "seq_classif_dropout",
)
FAMILIES = ("bert", "roberta", "electra", "distilbert", "deberta-v2", "albert", "modernbert", "llama")
LENGTHS = torch.tensor([7, 4, 2, 5])
MASK = (torch.arange(7) < LENGTHS[:, None]).long()  # (4, 7)
IDS = torch.randint(5, 50, (4, 7), generator=torch.Generator().manual_seed(0)) * MASK


def recipe(*losses: dict[str, Any], **more: Any) -> Recipe:
    values = {
        "name": "tiny",
        "task": "classification",
        "model": {"model_name_or_path": "none"},
        "data": {"train": {"path": "none"}, "target": {"far": {"train": {"path": "none"}}}},
        "losses": [{"kind": "cross_entropy"}, *losses],
        **more,
    }
    return Recipe.model_validate(values)


def model(family: str, attention: str = "eager") -> Any:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.for_model(family, **SIZES, intermediate_size=32, num_labels=3, pad_token_id=0)
    for name in DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config, attn_implementation=attention).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_pooled_is_what_the_logits_are_made_of(family: str) -> None:
    made, asked = model(family), recipe({"kind": "mmd"}, {"kind": "dann"})
    plain = made(input_ids=IDS, attention_mask=MASK).logits
    check_layers(asked, made)
    add_domain_heads(made, asked)
    outputs = made(input_ids=IDS, attention_mask=MASK, reversal={"losses_2": 0.5})
    pooled = outputs["read"]["pooled"]
    head = head_of(made, 3)
    assert head is not None
    assert pooled.shape == (4, head.in_features)
    assert torch.equal(outputs.logits, plain)
    assert torch.allclose(head(pooled), outputs.logits, atol=1e-6)
    assert outputs["domain_logits"]["losses_2"].shape == (4,)


def test_a_module_by_its_name_and_a_layer_by_its_number_are_means_over_tokens() -> None:
    made, name = model("bert"), "bert.encoder.layer.1.output"
    add_domain_heads(made, recipe({"kind": "mmd", "layer": name}))
    outputs = made(input_ids=IDS, attention_mask=MASK, output_hidden_states=True)
    given = outputs.logits, outputs.hidden_states, outputs["read"], MASK
    by_name, by_number = layer_of(name, *given), layer_of(1, *given)
    rows = [outputs.hidden_states[2][row, :length].mean(0) for row, length in enumerate(LENGTHS.tolist())]
    assert torch.allclose(by_number, torch.stack(rows), atol=1e-6)
    assert torch.equal(by_name, by_number)


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        ("bert.embeddings.dropout_", "the model has no such module; there is e.g. `bert.embeddings.dropout`"),
        ("bert.encoder.layer", "the model has no such module"),  # a list, which does not run
        (2, "there is no such layer; the model has layers 0 to 1"),
    ],
)
def test_a_layer_that_the_model_does_not_have_is_named(layer: int | str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_layers(recipe({"kind": "mmd", "layer": layer}), model("bert"))


def test_the_layers_of_an_encoder_and_a_decoder_have_no_numbers() -> None:
    from transformers import AutoModelForSequenceClassification, BartConfig

    config = BartConfig(vocab_size=50, d_model=16, encoder_layers=2, decoder_layers=2, num_labels=3)
    with pytest.raises(ValueError, match=r"losses\.1\.layer = 0: a bart model has two rows of layers; name a module"):
        check_layers(recipe({"kind": "mmd", "layer": 0}), AutoModelForSequenceClassification.from_config(config))


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        ("bert.encoder.layer.0.attention.self.dropout", "is a module that the model has and does not run"),
        ("bert.embeddings.position_embeddings", r"gives \(1, 7, 16\), for \(4, 7\) tokens"),
    ],
)
def test_a_module_whose_output_cannot_be_compared_is_named(layer: str, said: str) -> None:
    made = model("bert", "sdpa")
    add_domain_heads(made, recipe({"kind": "mmd", "layer": layer}))
    outputs = made(input_ids=IDS, attention_mask=MASK)
    with pytest.raises(ModelError, match=said):
        layer_of(layer, outputs.logits, (), outputs["read"], MASK)


def test_the_discriminator_learns_while_the_model_gets_the_reversed_gradient() -> None:
    made = model("bert")
    add_domain_heads(made, recipe({"kind": "dann"}))

    def gradients(factor: float) -> dict[str, torch.Tensor]:
        made.zero_grad()
        outputs = made(input_ids=IDS, attention_mask=MASK, reversal={"losses_1": factor})
        functional.softplus(outputs["domain_logits"]["losses_1"]).sum().backward()
        return {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}

    along, against = gradients(-1.0), gradients(0.5)
    assert len(along) > 20
    for name, gradient in along.items():
        factor = 1.0 if name.startswith("discriminators.") else -0.5
        assert torch.allclose(against[name], factor * gradient, atol=1e-7), name


def test_rows_that_all_have_weight_0_count_alike() -> None:
    settings = {"kind": "mmd", "accumulate": True, "bandwidth": 1.0}
    weighted = build_terms(recipe(settings, reweight={"method": "domain_classifier"}), torch.device("cpu"))[1].statistic
    plain = build_terms(recipe(settings), torch.device("cpu"))[1].statistic
    assert weighted is not None
    assert plain is not None
    torch.manual_seed(0)
    sides = [torch.randn(6, 3)], [torch.randn(6, 3) + 1]
    labels, probabilities = torch.zeros(6, dtype=torch.int64), torch.full((6, 3), 1 / 3)

    def value(statistic: Any, weights: torch.Tensor) -> float:
        found: float = statistic.value(Features(*sides, labels, weights, probabilities, (6,))).item()
        return found

    ones = value(plain, torch.ones(6))
    assert value(weighted, torch.zeros(6)) == pytest.approx(ones, rel=1e-5)
    assert value(weighted, torch.ones(6)) == pytest.approx(ones, rel=1e-5)
    some = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    half = Features([sides[0][0][:3]], sides[1], labels[:3], some[:3], probabilities, (6,))
    assert plain.compare(half).item() == pytest.approx(value(weighted, some), rel=1e-5)
