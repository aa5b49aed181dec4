"""Surgery: which layers, which values, that what is saved loads again, family by family; and freezing, by dotted names
with *, nothing else and never everything."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fleetune.model_section import Model
from fleetune.train.surgery import FAMILIES, freeze, layers_of, operate, plan_layers, value_projections

LAYERS = 6
ROWS = 40
SHARED = {"vocab_size": ROWS, "hidden_size": 16, "intermediate_size": 24, "pad_token_id": 0, "num_attention_heads": 2}
DECODER = {
    **SHARED,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OWN: dict[str, dict[str, Any]] = {
    "distilbert": {"vocab_size": ROWS, "dim": 16, "hidden_dim": 24, "n_layers": LAYERS, "n_heads": 2},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3},
    "qwen3": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    "mistral": {"sliding_window": 4},
    "gemma2": {"sliding_window": 4, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 4, "query_pre_attn_scalar": 8, "sliding_window_pattern": 3},
}
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
LANGUAGE_MODELS = (*DECODERS, "bert", "roberta")


def config_of(family: str, **more: Any) -> Any:
    from transformers import AutoConfig

    if family in DECODERS:
        values = DECODER
    elif family == "distilbert":
        values = {"pad_token_id": 0}
    else:
        values = {**SHARED, "num_hidden_layers": LAYERS}
    return AutoConfig.for_model(family, **{**values, **OWN.get(family, {}), **more})


def make(family: str, language_model: bool = False, seed: int = 3, **more: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if language_model and family not in DECODERS:
        more = {"is_decoder": True, **more}
    kind = AutoModelForCausalLM if language_model else AutoModelForSequenceClassification
    torch.manual_seed(seed)
    model = kind.from_config(config_of(family, **more)).eval()
    with torch.no_grad():  # apart from what a fresh one would have
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def wanted(**keys: Any) -> Model:
    return Model.model_validate({"model_name_or_path": "none", **keys})


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def logits(model: Any) -> torch.Tensor:
    tokens = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [13, 14, 15, 16, 17, 18, 19, 20]])
    with torch.no_grad():
        found = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    assert isinstance(found, torch.Tensor)
    return found


def reloaded(model: Any, folder: Path) -> Any:
    """From what was saved, which fits to the last key."""
    model.save_pretrained(folder)
    again, report = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return again.eval()


# ---------------------------------------------------------------- which layers


@pytest.mark.parametrize(
    ("keys", "plan"),
    [
        ({"keep_layers": [0, 2, 4]}, [0, 2, 4]),
        ({"keep_layers": {"every": 2}}, [0, 2, 4]),
        ({"keep_layers": {"every": 9}}, [0]),
        ({"keep_layers": {"first": 2}}, [0, 1]),
        ({"keep_layers": {"last": 6}}, [0, 1, 2, 3, 4, 5]),
        ({"keep_layers": {"last": 2}}, [4, 5]),
        ({"drop_layers": [4, 3]}, [0, 1, 2, 5]),
        ({"insert_layers": [{"at": 6}]}, [0, 1, 2, 3, 4, 5, None]),
        ({"keep_layers": [1], "insert_layers": [{"at": 0, "copy_of": 5}]}, [5, 1]),
        ({"keep_layers": [1], "insert_layers": [{"at": 2}, {"at": 1, "copy_of": 1}]}, [1, 1, None]),
        ({"drop_layers": [0], "insert_layers": [{"at": 0}, {"at": 1}, {"at": 7}]}, [None, None, 1, 2, 3, 4, 5, None]),
    ],
)
def test_the_layers_after_the_change(keys: dict[str, Any], plan: list[int | None]) -> None:
    assert plan_layers(wanted(**keys), LAYERS) == plan


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"keep_layers": [0, 6]},
            "model.keep_layers.1 = 6: there is no such layer; the model has layers 0 to 5",
        ),
        ({"keep_layers": {"first": 7}}, "model.keep_layers.first = 7: the model has 6 layers"),
        ({"keep_layers": {"last": 7}}, "model.keep_layers.last = 7: the model has 6 layers"),
        ({"drop_layers": [7]}, "model.drop_layers.0 = 7: there is no such layer; the model has layers 0 to 5"),
        ({"drop_layers": [0, 1, 2, 3, 4, 5]}, "model.drop_layers = [0, 1, 2, 3, 4, 5]: drops every layer"),
        (
            {"insert_layers": [{"at": 0, "copy_of": 6}]},
            "model.insert_layers.0.copy_of = 6: there is no such layer; the model has layers 0 to 5",
        ),
        (
            {"keep_layers": [3], "insert_layers": [{"at": 3}, {"at": 1}]},
            "model.insert_layers.0.at = 3: leaves a gap; 2 is the first place that is free",
        ),
    ],
)
def test_a_layer_that_is_not_there_is_named(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        operate(make("bert"), wanted(**keys), 0)
    assert str(caught.value) == said


def test_a_family_that_is_not_known_is_named_with_those_that_are() -> None:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    model = GPT2ForSequenceClassification(GPT2Config(vocab_size=9, n_embd=8, n_layer=2, n_head=1, pad_token_id=0))
    with pytest.raises(
        ValueError, match=r"^model\.drop_layers = \[1\]: the layers of a gpt2 model are not known; known"
    ):
        operate(model, wanted(drop_layers=[1]), 0)
    resized: Any = operate(model, wanted(resize_embeddings=16), 0)
    assert len(resized.get_input_embeddings().weight) == 16


# ---------------------------------------------------------------- every family

CHANGES: dict[str, dict[str, Any]] = {
    "keep": {"keep_layers": [0, 2, 3, 5]},
    "insert": {"drop_layers": [1, 4], "insert_layers": [{"at": 0, "copy_of": 4}, {"at": 3, "copy_of": 3}, {"at": 5}]},
    "all": {
        "keep_layers": {"every": 2},
        "insert_layers": [{"at": 1}],
        "resize_embeddings": 64,
        "reset": ["*.1.*weight", "*embed*"],
    },
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_changed_classifier_is_what_is_saved(family: str, change: str, tmp_path: Path) -> None:
    model: Any = operate(make(family), wanted(**CHANGES[change]), 0)
    assert torch.equal(logits(reloaded(model, tmp_path)), logits(model))
    assert len(layers_of(model)) == model.config.num_hidden_layers == (4 if change != "insert" else 7)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_a_changed_language_model_writes_with_a_cache_what_it_writes_without(
    family: str, change: str, tmp_path: Path
) -> None:
    model: Any = operate(make(family, language_model=True), wanted(**CHANGES[change]), 0)
    again = reloaded(model, tmp_path)
    assert torch.equal(logits(again), logits(model))
    start = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    how: dict[str, Any] = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
    plain = model.generate(**start, **how, use_cache=False)
    for one in (model, again):
        assert one.generate(**start, **how, use_cache=True).tolist() == plain.tolist()


@pytest.mark.parametrize("tie", [False, True])
def test_the_heads_rows_follow_the_embeddings(tie: bool, tmp_path: Path) -> None:
    model = make("llama", language_model=True, tie_word_embeddings=tie)
    before = state(model)
    bigger: Any = operate(model, wanted(resize_embeddings=48), 0)
    embeddings, head = bigger.get_input_embeddings().weight, bigger.get_output_embeddings().weight
    assert (embeddings is head) == tie
    assert embeddings.shape == head.shape == (48, 16)
    assert bigger.config.vocab_size == 48
    assert torch.equal(embeddings[:ROWS], before["model.embed_tokens.weight"])
    assert torch.equal(head[:ROWS], before["lm_head.weight"])
    assert 0.01 < embeddings[ROWS:].std() < 0.03  # drawn as the model draws
    assert torch.equal(logits(reloaded(bigger, tmp_path)), logits(bigger))
    smaller: Any = operate(bigger, wanted(resize_embeddings=32), 0)
    assert torch.equal(smaller.get_output_embeddings().weight, before["lm_head.weight"][:32])


@pytest.mark.parametrize("family", FAMILIES)
def test_value_projections_are_each_layers(family: str) -> None:
    model = make(family)
    found = value_projections(model)
    assert len(found) == len(layers_of(model)) == LAYERS
    names = {module: name for name, module in model.named_modules()}
    assert all(names[module].rpartition(".")[2] in ("value", "v_lin", "v_proj") for module in found)
    assert len(set(found)) == LAYERS


# ---------------------------------------------------------------- which values


def layer(values: dict[str, torch.Tensor], number: int) -> dict[str, torch.Tensor]:
    prefix = f"bert.encoder.layer.{number}."
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_layers_that_stay_keep_their_weights_and_a_copy_is_one_of_its_own() -> None:
    model = make("bert")
    before = state(model)
    keys = {"keep_layers": [1, 3], "insert_layers": [{"at": 1, "copy_of": 5}, {"at": 3, "copy_of": 3}]}
    changed = operate(model, wanted(**keys), 0)
    after = state(changed)
    for number, origin in enumerate((1, 5, 3, 3)):
        assert same(layer(after, number), layer(before, origin))
    rest = {name for name in after if ".layer." not in name}
    assert all(torch.equal(after[name], before[name]) for name in rest)
    with torch.no_grad():
        layers_of(changed)[3].get_parameter("output.dense.weight").zero_()
    assert same(layer(state(changed), 2), layer(before, 3))


def test_moving_takes_no_memory() -> None:
    model = make("llama", language_model=True)
    pointers = {value.data_ptr() for value in model.state_dict().values()}
    changed = operate(model, wanted(keep_layers={"last": 3}), 0)
    assert {value.data_ptr() for value in changed.state_dict().values()} < pointers


def test_what_is_fresh_is_drawn_from_the_seed_as_the_model_draws_it() -> None:
    keys = {"insert_layers": [{"at": 2}], "reset": ["*.layer.5.*", "bert.pooler.*", "classifier.weight"]}
    before = state(make("bert"))
    one, again, other = (state(operate(make("bert"), wanted(**keys), seed)) for seed in (0, 0, 1))
    assert same(one, again)
    drawn = {name for name in one if not torch.equal(one[name], other[name])}
    for number in (2, 5):
        fresh = layer(one, number)
        assert drawn >= {f"bert.encoder.layer.{number}.{n}" for n in fresh if n.endswith("dense.weight")}
        assert not any(value.any() for name, value in fresh.items() if name.endswith("bias"))
        assert (fresh["output.LayerNorm.weight"] == 1).all()
        assert 0.015 < fresh["output.dense.weight"].std() < 0.025
    assert drawn >= {"bert.pooler.dense.weight", "classifier.weight"}
    assert torch.equal(one["classifier.bias"], before["classifier.bias"])
    assert same(layer(one, 6), layer(before, 5))
    assert all(".layer.2." in n or ".layer.5." in n or n.startswith(("bert.pooler.", "classifier.")) for n in drawn)


def test_the_state_of_the_global_generator_does_not_matter_and_stays() -> None:
    first = state(operate(make("bert"), wanted(reset=["*"]), 4))
    model = make("bert")
    torch.manual_seed(99)
    expected = torch.rand(3)
    torch.manual_seed(99)
    assert same(first, state(operate(model, wanted(reset=["*"]), 4)))
    assert torch.equal(torch.rand(3), expected)


def test_a_reset_without_a_match_is_named() -> None:
    with pytest.raises(ValueError) as caught:
        operate(make("bert"), wanted(reset=["classifier.*", "*.pooller.*"]), 0)
    assert str(caught.value) == (
        "model.reset.1 = '*.pooller.*': no parameter has such a name; there is `bert.pooler.dense.bias`"
    )


def test_names_are_those_after_the_change() -> None:
    with pytest.raises(ValueError, match=r"model\.reset\.0 = '\*\.layer\.3\.\*': no parameter has such a name"):
        operate(make("bert"), wanted(keep_layers={"first": 3}, reset=["*.layer.3.*"]), 0)


def test_a_fresh_layer_is_of_the_kind_of_the_one_below_it() -> None:
    model = make("gemma3_text")
    kinds = copy.copy(model.config.layer_types)
    assert kinds == ["sliding_attention", "sliding_attention", "full_attention"] * 2
    keys = {"keep_layers": [1, 2, 5], "insert_layers": [{"at": 0}, {"at": 2}, {"at": 4}]}
    changed: Any = operate(model, wanted(**keys), 0)
    full, sliding = "full_attention", "sliding_attention"
    assert changed.config.layer_types == [sliding, sliding, sliding, full, full, full]
    attentions: list[Any] = [layer.get_submodule("self_attn") for layer in layers_of(changed)]
    assert [attention.is_sliding for attention in attentions] == [True] * 3 + [False] * 3
    assert [attention.layer_idx for attention in attentions] == [0, 1, 2, 3, 4, 5]


def test_types_and_modes_stay() -> None:
    model = make("llama", language_model=True).to(torch.bfloat16)
    changed: Any = operate(model, wanted(insert_layers=[{"at": 0}], reset=["lm_head.*"]), 0)
    assert {parameter.dtype for parameter in changed.parameters()} == {torch.bfloat16}
    assert not changed.training
    assert operate(changed.train(), wanted(drop_layers=[0]), 0).training
    assert changed.generation_config.eos_token_id == 2


def test_without_memory_it_is_the_same_shapes() -> None:
    from transformers import AutoModelForSequenceClassification

    keys = CHANGES["all"] | {"insert_layers": [{"at": 1}, {"at": 3, "copy_of": 0}]}
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config_of("qwen2"))
    shapes = {name: value.shape for name, value in operate(model, wanted(**keys), 0).named_parameters()}
    real = operate(make("qwen2"), wanted(**keys), 0)
    assert shapes == {name: value.shape for name, value in real.named_parameters()}


def test_nothing_asked_is_nothing_done() -> None:
    model = make("bert")
    assert operate(model, wanted(), 0) is model


def test_the_saved_config_has_what_was_changed(tmp_path: Path) -> None:
    changed: Any = operate(make("distilbert"), wanted(keep_layers={"first": 2}, resize_embeddings=64), 0)
    changed.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["n_layers"], saved["vocab_size"]) == (2, 64)


def test_a_changed_model_learns() -> None:
    model: Any = operate(make("gemma2"), wanted(**CHANGES["insert"]), 0)
    tokens = torch.tensor([[5, 6, 7, 8, 9, 10]])
    model(input_ids=tokens, labels=torch.tensor([1])).loss.backward()
    assert all(parameter.grad is not None for parameter in layers_of(model).parameters())
    assert isinstance(model, nn.Module)


# ---------------------------------------------------------------- freezing


def small() -> nn.Module:
    layers = nn.ModuleDict(
        {"embeddings": nn.Embedding(4, 3), "layer": nn.ModuleList(nn.Linear(3, 3) for _ in range(11))}
    )
    return nn.ModuleDict({"encoder": layers, "classifier": nn.Linear(3, 2)})


def frozen(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ([], set()),
        (["*.embeddings.*"], {"encoder.embeddings.weight"}),
        (["encoder.layer.1.*"], {"encoder.layer.1.weight", "encoder.layer.1.bias"}),
        (["classifier.bias", "*.layer.0.weight"], {"classifier.bias", "encoder.layer.0.weight"}),
        (["*.layer.10.*", "*.layer.10.bias"], {"encoder.layer.10.weight", "encoder.layer.10.bias"}),
    ],
)
def test_the_parameters_that_match_are_frozen(patterns: list[str], names: set[str]) -> None:
    net = small()
    assert freeze(net, patterns) == len(names)
    assert frozen(net) == names


def test_a_pattern_without_a_match_is_named_with_the_nearest_and_nothing_is_frozen() -> None:
    net = small()
    with pytest.raises(ValueError) as caught:
        freeze(net, ["classifier.*", "*.embedings.*"])
    assert str(caught.value) == (
        "model.freeze.1 = '*.embedings.*': no parameter has such a name; there is `encoder.embeddings.weight`"
    )
    assert frozen(net) == set()


def test_a_name_is_matched_as_it_is_written() -> None:
    with pytest.raises(ValueError, match=r"model\.freeze\.0 = '\*\.Embeddings\.\*': no parameter has such a name"):
        freeze(small(), ["*.Embeddings.*"])
    with pytest.raises(ValueError, match="no parameter has such a name"):
        freeze(small(), ["embeddings"])


def test_freezing_everything_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.freeze = \['encoder\.\*', 'class\*'\]: freezes every parameter"):
        freeze(small(), ["encoder.*", "class*"])
