"""LoRA by peft: two thin matrices are trained beside each of a model's own, which stay as they are.

y = W x + (lora_alpha / r) B A x, with A drawn at random and B = 0 at the start (Hu et al. 2021, arXiv 2106.09685).
The layers stand inside the model itself, so engine, heads and losses see the class that they know.
"""

from __future__ import annotations

import copy
import difflib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fleetune.lora import Lora
from fleetune.schema import Recipe
from fleetune.train import zero

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_NAME = "default"  # peft's own


def add_lora(model: Any, recipe: Recipe, wanted: Lora, base: str) -> None:
    """Puts the adapter into the model and freezes all the rest; `base` is where its weights are to be found again.

    The first matrices are drawn from training.seed, on every rank alike. Raises ValueError for modules that are not
    there, and for those that the model's head is tied to.
    """
    from peft import LoraConfig, inject_adapter_in_model

    _check_names(model, recipe, wanted)
    dtype, device = model.dtype, next(model.parameters()).device
    config = LoraConfig(
        task_type="CAUSAL_LM" if recipe.task == "causal_lm" else "SEQ_CLS",
        r=wanted.r,
        lora_alpha=wanted.lora_alpha,
        lora_dropout=wanted.lora_dropout,
        target_modules=wanted.target_modules,
        modules_to_save=saved_whole(model, recipe) or None,
        use_rslora=wanted.use_rslora,
        revision=recipe.model.revision,
    )
    seed = int(np.random.SeedSequence([recipe.training.seed], spawn_key=(2,)).generate_state(1)[0])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        inject_adapter_in_model(config, model, ADAPTER_NAME)
    config.base_model_name_or_path = base
    for parameter in model.parameters():  # peft makes fp32 of half precisions, and the engine has one for all
        if parameter.requires_grad and not zero.is_partitioned(parameter) and device.type != "meta":
            parameter.data = parameter.data.to(dtype)


def saved_whole(model: Any, recipe: Recipe) -> list[str]:
    """The modules that are trained whole beside the adapter, by the ends of their names."""
    wanted = recipe.model.lora.modules_to_save if recipe.model.lora is not None else []
    return sorted({*wanted, *_head_names(model, recipe)})


def _head_names(model: Any, recipe: Recipe) -> list[str]:
    """The modules whose weights are fresh in a classifier: what stands outside of its base, and BERT's pooler."""
    if recipe.task == "causal_lm":
        return []
    inside = [name for name, _ in model.base_model.named_children() if name == "pooler"]
    outside = [name for name, child in model.named_children() if any(True for _ in child.parameters())]
    return [name for name in outside if name != model.base_model_prefix] + inside


def _check_names(model: Any, recipe: Recipe, wanted: Lora) -> None:
    modules = [name for name, _ in model.named_modules() if name]
    ends = sorted({name.rpartition(".")[2] for name in modules if not name.rpartition(".")[2].isdigit()})
    linear = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
    targets = wanted.target_modules if isinstance(wanted.target_modules, list) else []
    for key, names, legal in (("target_modules", targets, linear), ("modules_to_save", wanted.modules_to_save, ends)):
        for index, name in enumerate(names):
            place = f"model.lora.{key}.{index} = {name!r}"
            found = [module for module in modules if module == name or module.endswith(f".{name}")]
            if not found:
                near = difflib.get_close_matches(name, ends, n=1, cutoff=0.5)
                hint = f"did you mean `{near[0]}`?" if near else f"there are {', '.join(legal)}"
                raise ValueError(f"{place}: the model has no module of that name; {hint}")
            _check_embeddings(model, recipe, place, [model.get_submodule(module) for module in found])


def _check_embeddings(model: Any, recipe: Recipe, place: str, chosen: list[nn.Module]) -> None:
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and getattr(model.config, "tie_word_embeddings", False)
    if tied and any(module in (head, embeddings) for module in chosen):
        raise ValueError(f"{place}: the head and the token embeddings are one matrix here, and would come apart")
    if recipe.kernels != "reference" and head in chosen and place.startswith("model.lora.target_modules"):
        raise ValueError(
            f"{place}: is the head, which the fused loss reads as one matrix; use kernels: reference, or train it "
            "whole by modules_to_save"
        )


def trained_whole(module: Any) -> Any:
    """What runs in a module's place: its copy that is trained, where the adapter has one."""
    copies = getattr(module, "modules_to_save", None)
    return copies[ADAPTER_NAME] if isinstance(copies, nn.ModuleDict) else module


def has_adapter(model: nn.Module) -> bool:
    return hasattr(model, "peft_config")


def adapter_names(model: nn.Module) -> set[str]:
    """The parameters that an adapter's folder holds: all that are not the frozen model's own."""
    return {name for name, _ in model.named_parameters() if ADAPTER_NAME in name.split(".")}


def save_adapter(model: Any, state: dict[str, torch.Tensor], folder: Path) -> None:
    """As peft and Transformers read it, with the config of the whole model beside."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    # Without the default peft asks the model hub whether the vocabulary has grown, and a node may have no network.
    kept = get_peft_model_state_dict(model, state, adapter_name=ADAPTER_NAME, save_embedding_layers=False)
    tensors = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in kept.items()}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    model.peft_config[ADAPTER_NAME].save_pretrained(folder)
    config = copy.deepcopy(model.config)
    config.dtype = model.dtype
    config.__dict__.pop("quantization_config", None)  # how it was trained stands in the recipe
    config.save_pretrained(folder)


def is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).exists()


def load_adapter(model: Any, folder: Path) -> None:
    """The trained values from RUN/model. Raises ValueError where they are not of this model and its adapter."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    state = {
        name.removeprefix("base_model.model."): tensor
        for name, tensor in load_file(folder / "adapter_model.safetensors").items()
    }
    result = set_peft_model_state_dict(model, state, adapter_name=ADAPTER_NAME)
    missing = adapter_names(model) & set(result.missing_keys)
    if missing or result.unexpected_keys:
        names = ", ".join(sorted(missing or result.unexpected_keys)[:3])
        raise ValueError(f"{folder}: is no adapter of this model: {'lacks' if missing else 'has also'} {names}")


def merge(model: Any) -> Any:
    """The model with W + (lora_alpha / r) B A in W's place, and nothing of the adapter left."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper):
            parent, _, leaf = name.rpartition(".")
            if isinstance(module, BaseTunerLayer):
                module.merge(safe_merge=True)
                plain: Any = module.get_base_layer()
            else:
                plain = trained_whole(module)
            setattr(model.get_submodule(parent), leaf, plain)
    del model.peft_config
    return model
