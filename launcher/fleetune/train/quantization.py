"""QLoRA: the frozen weights under an adapter in 4 bits, by bitsandbytes (Dettmers et al. 2023, arXiv 2305.14314).

Each weight of a linear map is the nearest of 16 numbers times its block's scale; a block is of 64 weights, and the
scales are in 8 bits themselves (double quantization), 4.13 bits a weight in all. The map computes in the recipe's
precision, from weights that are made whole for the moment of their use.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fleetune.schema import Recipe
from fleetune.train.lora import saved_whole

BLOCK = 64  # weights with one scale
SCALES = 256  # scales with one scale of their own, in fp32
TABLES = 4 * (16 + 256 + 1)  # bytes of each matrix: the codes' values, the scales' values and their mean


def is_quantized(recipe: Recipe) -> bool:
    return recipe.model.lora is not None and recipe.model.lora.quantization is not None


def unquantized(recipe: Recipe) -> Recipe:
    """The recipe with its base in the model's own dtype: what an adapter is merged into, where it is to be deployed."""
    if recipe.model.lora is None:
        return recipe
    lora = recipe.model.lora.model_copy(update={"quantization": None})
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"lora": lora})})


def check_quantization(recipe: Recipe, config: Any) -> None:
    """Raises ValueError where the recipe's base cannot be quantized here."""
    if not is_quantized(recipe):
        return
    assert recipe.model.lora is not None
    key = f"model.lora.quantization = {recipe.model.lora.quantization!r}"
    missing = [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{key}: needs {' and '.join(missing)}: pip install 'fleetune[qlora]'")
    if getattr(config, "quantization_config", None) is not None:
        name = recipe.model.model_name_or_path
        raise ValueError(f"{key}: {name} is quantized already; give the model that it was made of")


def compute_dtype(recipe: Recipe) -> torch.dtype:
    return torch.bfloat16 if recipe.training.bf16 else torch.float32


def loading(recipe: Recipe, config: Any) -> dict[str, Any]:
    """What Transformers' from_pretrained is given beside the config. Raises ValueError as check_quantization does."""
    if not is_quantized(recipe):
        return {}
    check_quantization(recipe, config)
    # Said at every import, of a faster path for inference that is switched off below.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from transformers import BitsAndBytesConfig

    from fleetune.train.model import auto_model

    assert recipe.model.lora is not None
    with torch.device("meta"):
        plain = auto_model(recipe).from_config(config, trust_remote_code=recipe.model.trust_remote_code)
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=recipe.model.lora.quantization,
        bnb_4bit_compute_dtype=compute_dtype(recipe),
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=_left_alone(plain, recipe),  # it is of 4 bits too, whatever its name says
    )
    return {"quantization_config": settings}


def settle(model: nn.Module) -> None:
    """Makes the quantized maps fit for training, evaluating between, and checkpoints without what is frozen.

    On some CPUs bitsandbytes packs a map's weights anew when it is first evaluated, in a form that has no gradient
    and rounds to bf16, and leaves them so: later steps would learn from something else, without a word.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
            module.register_state_dict_post_hook(_without_constants)


def _without_constants(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Scales and tables are of the frozen weights, and come with these when the model is loaded again."""
    for name in [name for name in state if name.startswith(f"{prefix}weight.")]:
        del state[name]


def quantized_weights(model: nn.Module, recipe: Recipe) -> Iterator[int]:
    """How many weights each matrix has that is held in 4 bits; of the recipe's model before its adapter."""
    from transformers.pytorch_utils import Conv1D

    left = _left_alone(model, recipe)
    for name, module in model.named_modules():
        if type(module) in (nn.Linear, Conv1D) and not any(f"{name}.".startswith(f"{one}.") for one in left):
            yield module.weight.numel()


def quantized_bytes(weights: int) -> int:
    """Of one matrix: codes of 4 bits, a scale of 8 bits for each block, and one of 32 bits for 256 of these."""
    blocks = -(-weights // BLOCK)
    return -(-weights // 2) + blocks + 4 * -(-blocks // SCALES) + TABLES


def _left_alone(model: Any, recipe: Recipe) -> list[str]:
    """The modules that keep their precision: the head, and what is trained whole."""
    head = model.get_output_embeddings() if recipe.task == "causal_lm" else None
    whole = saved_whole(model, recipe)
    return [
        name
        for name, module in model.named_modules()
        if name and (module is head or any(name == one or name.endswith(f".{one}") for one in whole))
    ]
