"""What `fleetune check` says of memory: counted from the model's shapes; and of a GPU that is too small.

Against what training really takes it is held by launcher/benchmarks/memory_estimate.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import recipe_values, write_language_model, write_model, write_prompts, write_rows

from fleetune.report import memory_lines
from fleetune.schema import Recipe
from fleetune.train import memory
from fleetune.train.memory import Model, estimate, lighter, report

LLAMA = Model(  # of 8 billion parameters, 2 rows of 4,096 tokens, in bf16
    parameters=8_030_000_000,
    trained=8_030_000_000,
    activations=45_000_000_000,
    layer=1_400_000_000,
    boundary=2 * 4096 * 4096 * 2,
    layers=32,
    head=128_256 * 4096,
    vocabulary=128_256,
    teachers=(),
)


def recipe(folder: Path, task: str = "causal_lm", **sections: Any) -> Recipe:
    return Recipe.model_validate({**recipe_values(folder, "memory", **sections), "task": task})


def zero(stage: int, **training: Any) -> Recipe:
    values = {"global_batch_size": None, "per_device_train_batch_size": 2, "bf16": True, **training}
    return recipe(Path("/"), deepspeed={"zero_stage": stage}, training=values)


def test_each_stage_cuts_what_it_says() -> None:
    found = [estimate(zero(stage), LLAMA, 16, "cuda") for stage in range(4)]
    plain = LLAMA.parameters
    assert [one.optimizer for one in found] == [8 * plain, *[12 * plain // 16] * 3]
    assert [one.gradients for one in found] == [4 * plain, 2 * plain, 4 * plain // 16, 4 * plain // 16]
    assert found[2].weights == 2 * plain
    assert found[3].weights == 2 * plain // 16 + 2_000_000_000
    assert found[0].height > found[1].height > found[3].height
    assert found[2].height > found[3].height


def test_offloading_moves_to_the_node_what_it_names() -> None:
    deepspeed = {"zero_stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"}
    training = {"global_batch_size": None, "bf16": True}
    found = estimate(recipe(Path("/"), deepspeed=deepspeed, training=training), LLAMA, 16, "cuda")
    assert found.optimizer == found.gradients == 0
    assert found.host == (12 + 4) * LLAMA.parameters // 16 + 2 * LLAMA.parameters // 16


def test_checkpointing_keeps_each_layers_input_and_the_inside_of_one() -> None:
    values = {"global_batch_size": None, "per_device_train_batch_size": 2, "bf16": True}
    light = recipe(Path("/"), model={"gradient_checkpointing": True}, training=values)
    kept = LLAMA.activations - 32 * (LLAMA.layer - LLAMA.boundary) + LLAMA.layer
    assert estimate(light, LLAMA, 16, "cuda").activations == kept < LLAMA.activations / 5


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_language_model(tmp_path / "model", num_hidden_layers=4)
    write_prompts(tmp_path / "train.jsonl", 30)
    write_prompts(tmp_path / "validation.jsonl", 10)
    return tmp_path


def test_activations_grow_with_rows_and_layers_and_lora_trains_little(folder: Path) -> None:
    def found(**sections: Any) -> dict[str, Any]:
        return report(recipe(folder, **sections), 2, None)

    one = found(training={"per_device_train_batch_size": 4})
    two = found(training={"per_device_train_batch_size": 8})
    assert two["activations"] == pytest.approx(2 * one["activations"], rel=0.01)
    lora = found(model={"lora": {"r": 2}}, training={"per_device_train_batch_size": 4})
    assert lora["optimizer"] < one["optimizer"] / 4
    assert lora["checkpoint"] < one["checkpoint"] / 4
    assert lora["loss"] < one["loss"]  # a frozen head has no gradient
    assert 20 < one["tokens"] <= 32


def test_the_cheapest_change_that_makes_it_fit_is_named(folder: Path) -> None:
    values = {"per_device_train_batch_size": 8, "global_batch_size": 16}
    light = recipe(folder, training=values, deepspeed={"zero_stage": 2})
    fits = report(light, 2, 1.0)
    assert "change" not in fits
    assert "fits its 1.00 GB" in memory_lines(light, fits)[1]
    tight = report(light, 2, 1.5e-3)
    assert tight["change"] == ["training.per_device_train_batch_size=1"]
    assert tight["changed"] < 1.5e6 < tight["height"]
    assert (
        "does not fit its 0.00 GB; it does with training.per_device_train_batch_size=1" in memory_lines(light, tight)[1]
    )
    hopeless = report(light, 2, 1e-6)
    assert hopeless["change"] == []
    assert "nothing here makes it" in memory_lines(light, hopeless)[1]


def test_what_is_advised_keeps_the_global_batch_and_says_each_key_once() -> None:
    values = {"global_batch_size": None, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    found = list(lighter(recipe(Path("/"), training=values, deepspeed={"zero_stage": 0}), lambda changed: True))
    names = [" ".join(names) for names, _ in found]
    assert len(set(names)) == len(names)
    assert names[:2] == [
        "deepspeed.zero_stage=2",
        "training.per_device_train_batch_size=1 training.gradient_accumulation_steps=16",
    ]
    everything, changed = found[-1]
    assert everything[0] == "deepspeed.zero_stage=3"
    assert sum(name.startswith("deepspeed.zero_stage") for name in everything) == 1
    training = changed.training
    assert (training.per_device_train_batch_size, training.sequence_parallel_size) == (1, 8)
    assert training.gradient_accumulation_steps == 16 * 8  # a step's sequences are read by an eighth of the ranks
    assert changed.model.mlp_tiles == "auto"
    assert changed.deepspeed.offload_param == "cpu"


def test_only_what_is_possible_is_advised(folder: Path) -> None:
    write_language_model(folder / "model", num_hidden_layers=4, hidden_size=8, head_dim=2, intermediate_size=512)
    values = {"per_device_train_batch_size": 1, "global_batch_size": 2}
    heavy = recipe(folder, training=values, deepspeed={"zero_stage": 3}, model={"gradient_checkpointing": True})
    height = report(heavy, 2, 1e-6)["height"] / 1e9
    assert report(heavy, 2, 0.97 * height)["change"] == ["model.mlp_tiles=auto"]
    heavy = heavy.model_copy(update={"model": heavy.model.model_copy(update={"mlp_tiles": 4})})
    height = report(heavy, 2, 1e-6)["height"] / 1e9
    assert report(heavy, 2, 0.97 * height)["change"] == ["training.sequence_parallel_size=2"]
    everything = report(heavy, 2, 0.5 * height)["change"]
    assert everything
    assert everything[-1].startswith("deepspeed.offload_")
    assert "training.sequence_parallel_size=4" not in everything  # of 2 ranks
    for stage in (0, 2):  # offloading needs a stage that comes before it among the changes
        begun = heavy.model_copy(update={"deepspeed": heavy.deepspeed.model_copy(update={"zero_stage": stage})})
        changes = report(begun, 2, 0.5 * height)["change"]
        assert changes[0] == "deepspeed.zero_stage=3"
        assert changes[-1].startswith("deepspeed.offload_")


def test_slices_are_not_advised_to_a_model_whose_attention_cannot_share_heads(folder: Path) -> None:
    values = {"per_device_train_batch_size": 1, "global_batch_size": 2}
    deepspeed = {"zero_stage": 3}
    for attention, offered in (("sdpa", True), ("eager", False)):
        model = {"gradient_checkpointing": True, "mlp_tiles": 1, "attn_implementation": attention}
        heavy = recipe(folder, training=values, deepspeed=deepspeed, model=model)
        height = report(heavy, 2, 1e-6)["height"] / 1e9
        changes = report(heavy, 2, 0.97 * height)["change"]
        assert ("training.sequence_parallel_size=2" in changes) is offered


def test_the_mask_of_packs_is_counted_in_each_layer(folder: Path) -> None:
    data = recipe_values(folder, "memory")["data"]

    def packed(length: int) -> Recipe:
        return recipe(folder, data={**data, "max_length": length, "packing": True})

    short, long = (report(packed(length), 2, None)["activations"] for length in (32, 64))
    rows = packed(32).training.per_device_train_batch_size
    mask = rows * 32**2 * 4 * 4  # four layers' in fp32
    assert long - 2 * short == pytest.approx(2 * mask, rel=0.05)  # four times the pairs; all else twice


def test_a_model_that_cannot_be_counted_is_said_to_be(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*_: Any) -> Model:
        raise NotImplementedError("this family")

    monkeypatch.setattr(memory, "measure", measure)
    found = report(recipe(folder), 1, 1.0)
    assert memory_lines(recipe(folder), found) == [
        "memory    not known of this model: NotImplementedError: this family"
    ]


def test_an_encoder_has_no_head_to_speak_of(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    for split in ("train", "validation"):
        write_rows(tmp_path / f"{split}.jsonl", 30)
    found = report(recipe(tmp_path, task="classification"), 1, None)
    assert found["loss"] == 0
    assert found["activations"] > 0
    assert found["weights"] + found["optimizer"] < found["height"]
