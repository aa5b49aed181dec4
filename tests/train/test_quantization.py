"""Which weights are held in 4 bits, in how many bytes, and what is said where they cannot be."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import recipe_values, write_language_model, write_model

from fleetune.schema import Recipe
from fleetune.train import memory, quantization, zero
from fleetune.train.model import build_model, load_config
from fleetune.train.quantization import check_quantization, compute_dtype, quantized_bytes, unquantized

PLAIN = {"zero_optimization": {"stage": 0}}
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def recipe(folder: Path, task: str = "causal_lm", bf16: bool = False, **lora: Any) -> Recipe:
    model = {"model_name_or_path": str(folder / "model"), "lora": {"r": 2, "quantization": "nf4", **lora}}
    values = recipe_values(folder, "qlora", model=model, training={"bf16": bf16})
    return Recipe.model_validate({**values, "task": task})


def in_four_bits(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.dtype == torch.uint8}


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_every_linear_map_but_the_head_is_and_the_adapter_is_not(tmp_path: Path, kind: str) -> None:
    write_language_model(tmp_path / "model", tie_word_embeddings=False)
    wanted = recipe(tmp_path, quantization=kind)
    model: Any = build_model(wanted, [], torch.float32, PLAIN)
    found = in_four_bits(model)
    assert len(found) == 2 * 7
    assert all(name.endswith("_proj.base_layer.weight") for name in found)
    assert {parameter.quant_state.quant_type for parameter in found.values()} == {kind}
    whole = build_model(unquantized(wanted), [], torch.float32, PLAIN)
    assert [zero.numel(p) for p in model.parameters()] == [zero.numel(p) for p in whole.parameters()]


@needs_bitsandbytes
def test_what_is_trained_whole_keeps_its_precision(tmp_path: Path) -> None:
    write_language_model(tmp_path / "model")
    model = build_model(recipe(tmp_path, modules_to_save=["mlp"]), [], torch.float32, PLAIN)
    assert {name.rpartition(".base_layer")[0].rpartition(".")[2] for name in in_four_bits(model)} == {
        f"{name}_proj" for name in "qkvo"
    }
    write_model(tmp_path / "bert")
    (tmp_path / "model").rename(tmp_path / "llama")
    (tmp_path / "bert").rename(tmp_path / "model")
    classifier = build_model(recipe(tmp_path, "classification"), ["a", "b"], torch.float32, PLAIN)
    assert all(name.startswith("bert.encoder.layer.") for name in in_four_bits(classifier))


@needs_bitsandbytes
def test_evaluating_changes_neither_the_weights_nor_what_is_learnt(tmp_path: Path) -> None:
    write_language_model(tmp_path / "model")
    model: Any = build_model(recipe(tmp_path), [], torch.float32, PLAIN)
    ids = torch.tensor([[1, 4, 7, 9]])

    def gradient() -> list[torch.Tensor]:
        model.zero_grad()
        model.train()(input_ids=ids, labels=ids).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]

    before = gradient()
    with torch.no_grad():
        evaluated = model.eval()(input_ids=ids).logits
    assert all(torch.equal(one, other) for one, other in zip(before, gradient(), strict=True))
    assert torch.equal(evaluated, model.train()(input_ids=ids).logits)


@needs_bitsandbytes
def test_the_bytes_are_those_that_are_held_and_the_estimate_has_them(tmp_path: Path) -> None:
    write_language_model(tmp_path / "model", hidden_size=128, head_dim=32, intermediate_size=352)
    wanted = recipe(tmp_path)
    model: Any = build_model(wanted, [], torch.float32, PLAIN)
    for parameter in in_four_bits(model).values():
        state = parameter.quant_state
        tensors = (parameter, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
        held = sum(tensor.nbytes for tensor in tensors)
        assert quantized_bytes(zero.numel(parameter)) == held
    measured = memory.measure(wanted, 16, 1, [], load_config(wanted, []))
    assert sorted(measured.quantized) == sorted(zero.numel(p) for p in in_four_bits(model).values())
    assert measured.parameters == sum(map(zero.numel, model.parameters()))
    light, whole = (memory.estimate(wanted, one, 1, "cpu") for one in (measured, replace(measured, quantized=())))
    saved = sum(4 * count - quantized_bytes(count) for count in measured.quantized)
    assert whole.weights - light.weights == saved > whole.weights / 2
    advised = [name for names, _ in memory.lighter(wanted, lambda changed: True) for name in names]
    assert "deepspeed.offload_optimizer=cpu" in advised
    assert not {"deepspeed.zero_stage=3", "deepspeed.offload_param=cpu"} & set(advised)


def test_a_large_models_maps_take_a_little_more_than_half_a_byte_a_weight() -> None:
    assert 8 * quantized_bytes(4096 * 14336) / (4096 * 14336) == pytest.approx(4.127, abs=1e-3)


def test_it_computes_in_the_recipes_precision(tmp_path: Path) -> None:
    assert [compute_dtype(recipe(tmp_path, bf16=bf16)) for bf16 in (False, True)] == [torch.float32, torch.bfloat16]


def test_where_it_cannot_be_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, quantized = SimpleNamespace(), SimpleNamespace(quantization_config={"quant_method": "gptq"})
    check_quantization(unquantized(recipe(tmp_path)), quantized)
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda _: True)
    with pytest.raises(ValueError, match=r"model\.lora\.quantization = 'nf4': .* is quantized already; give the model"):
        check_quantization(recipe(tmp_path), quantized)
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: name != "bitsandbytes" or None)
    with pytest.raises(ValueError, match=r"needs bitsandbytes: pip install 'fleetune\[qlora\]'"):
        check_quantization(recipe(tmp_path), plain)


@pytest.mark.gpu
@needs_bitsandbytes
@pytest.mark.parametrize("bf16", [False, True])
def test_on_a_gpu_it_is_loaded_there_and_learns_what_the_cpu_does(
    tmp_path: Path, bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_language_model(tmp_path / "model", hidden_size=128, head_dim=32, intermediate_size=352)
    wanted, ids = recipe(tmp_path, bf16=bf16), torch.tensor([[1, 4, 7, 9]])
    dtype, gradients = torch.bfloat16 if bf16 else torch.float32, []
    for device in ("cuda", "cpu"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda device=device: device == "cuda")
        model: Any = build_model(wanted, [], dtype, PLAIN).to(device)
        assert {parameter.device.type for parameter in in_four_bits(model).values()} == {device}
        model(input_ids=ids.to(device), labels=ids.to(device)).loss.backward()
        gradients.append(torch.cat([p.grad.flatten().float().cpu() for p in model.parameters() if p.requires_grad]))
    error = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
    assert error < (0.05 if bf16 else 1e-3)
