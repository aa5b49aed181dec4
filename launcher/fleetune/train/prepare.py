"""What is done once before any rank starts: `python -m fleetune.train.prepare RECIPE` checks the recipe against its
model, data and machine, tokenises into the cache, and prints a JSON report. Exit 2 where something does not fit."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleetune import runs
from fleetune.losses import CrossEntropy
from fleetune.recipe import parse_recipe
from fleetune.schema import Recipe, RecipeError, teachers_of
from fleetune.train.report import print_report

if TYPE_CHECKING:
    from fleetune.train.data import Prepared


def check_machine(recipe: Recipe) -> None:
    """Raises RecipeError for a precision, or kernels, that this machine does not have."""
    import torch

    if recipe.kernels == "triton" and not torch.cuda.is_available():
        raise RecipeError(
            "kernels = 'triton': Triton needs a GPU, and there is none here; use auto, torch or reference"
        )
    if recipe.training.fp16 and not torch.cuda.is_available():
        raise RecipeError(
            "training.fp16 = True: fp16 needs a GPU, and there is none here; use bf16, or neither for fp32"
        )
    if recipe.training.bf16 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise RecipeError("training.bf16 = True: this GPU has no bf16; use fp16, or neither for fp32")


def has_fast_bf16() -> bool:
    """Whether bf16 is worth having here. A CPU without AVX-512 or the like works it out in software, eight times
    slower than fp32 and no better."""
    import torch

    return torch.cuda.is_available() or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def prepare_recipe(recipe: Recipe, elsewhere: bool = False) -> dict[str, Any]:
    """`elsewhere`: it will run on other machines than this one.

    Raises RecipeError, DataError or ModelError, each naming the key.
    """
    from fleetune.train.data import prepare
    from fleetune.train.model import check_weight_files, load_config, load_tokenizer, padding_id
    from fleetune.train.quantization import check_quantization
    from fleetune.train.sequence_parallel import check_attention

    if not elsewhere:
        check_machine(recipe)
    tokenizer = load_tokenizer(recipe)
    prepared = prepare(recipe, tokenizer)
    config = load_config(recipe, prepared.label_names)
    check_weight_files(recipe.model)
    for index, loss in enumerate(recipe.losses):
        if (
            isinstance(loss, CrossEntropy)
            and loss.class_weights is not None
            and len(loss.class_weights) != config.num_labels
        ):
            raise RecipeError(
                f"losses.{index}.class_weights = {loss.class_weights}: should be {config.num_labels} numbers, "
                f"one for each label ({', '.join(prepared.label_names[:10])})"
            )
    if (padding_id(tokenizer) if recipe.task == "causal_lm" else tokenizer.pad_token_id) is None:
        raise RecipeError(
            f"model.model_name_or_path = {recipe.model.model_name_or_path!r}: its tokenizer has no padding token"
        )
    _check_tokens(recipe, config, tokenizer, prepared)
    try:
        check_quantization(recipe, config)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    counted = _check_model(recipe, config)
    check_attention(counted.pop("attention", ""), recipe.training.sequence_parallel_size)
    return {
        **prepared.report,
        **_reweighted(recipe, prepared),
        **_check_teachers(recipe, config, counted["num_hidden_layers"], tokenizer, prepared),
        **counted,
        "has_fast_bf16": has_fast_bf16(),
        "dropout": [
            name for name, value in config.to_dict().items() if "drop" in name and isinstance(value, float) and value
        ],
    }


def _check_tokens(recipe: Recipe, config: Any, tokenizer: Any, prepared: Prepared) -> None:
    """Raises RecipeError where the model has no embedding for a token, or pads with another than the tokenizer."""
    rows, needed = recipe.model.resize_embeddings, max(tokenizer.get_vocab().values()) + 1
    if rows is not None and rows < needed:
        raise RecipeError(f"model.resize_embeddings = {rows}: the tokenizer needs {needed} rows, one for each token")
    # Tokens that occur: a model may lack a row for one that never does (Gemma's for an image).
    highest = max(prepared.report["highest_token"], tokenizer.pad_token_id or 0)
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    if rows is None and isinstance(vocabulary, int) and highest >= vocabulary:
        raise RecipeError(
            f"model.model_name_or_path = {recipe.model.model_name_or_path!r}: has embeddings for {vocabulary} tokens, "
            f"and the tokenizer gives number {highest} ({tokenizer.convert_ids_to_tokens(highest)!r}); set "
            f"model.resize_embeddings to {needed} or more"
        )
    if recipe.task == "causal_lm":
        evaluated = {found for name, found in prepared.report["format"].items() if not name.endswith("train")}
        if recipe.evaluation.exact_match is not None and "text" in evaluated:
            raise RecipeError(
                f"evaluation.exact_match.pattern = {recipe.evaluation.exact_match.pattern!r}: needs answers, and the "
                "rows that are evaluated are plain text"
            )
    elif config.pad_token_id != tokenizer.pad_token_id:
        raise RecipeError(
            f"model.config.pad_token_id = {config.pad_token_id!r}: the tokenizer pads with {tokenizer.pad_token_id} "
            f"({tokenizer.pad_token!r}), and the model must know where a row ends: should be {tokenizer.pad_token_id}"
        )


def _reweighted(recipe: Recipe, prepared: Prepared) -> dict[str, Any]:
    """What the source's weights come to, with a warning where they leave little."""
    if recipe.reweight is None:
        return {}
    from fleetune.train.source_weights import describe, fitted, warning

    described = describe(recipe, fitted(recipe, prepared))
    warnings = [text for text in (prepared.report.get("warning"), warning(described)) if text is not None]
    return {"reweight": described} | ({"warning": "; ".join(warnings)} if warnings else {})


def _check_teachers(recipe: Recipe, config: Any, layers: int | None, tokenizer: Any, data: Prepared) -> dict[str, Any]:
    """What the teachers are, as a hash, and which labels had to be guessed; `layers`: the student's, in the end."""
    from fleetune.train.alignment import matches_of
    from fleetune.train.model import check_weight_files
    from fleetune.train.teacher import check_teacher, labels_by_number, load_teacher_config, weights_digest
    from fleetune.train.teacher_cache import check_cache

    configs, digests, guessed = [], [], []
    for key, teacher in teachers_of(recipe):
        if teacher.cache is not None:
            digests.append(check_cache(recipe, teacher, key, data.splits["train"], tokenizer, data.label_names, config))
            continue
        configs.append(load_teacher_config(recipe, teacher, key, tokenizer))
        check_teacher(recipe, teacher, key, configs[-1], tokenizer, data)
        check_weight_files(teacher, key)
        if labels_by_number(recipe, configs[-1], data.label_names):
            order = ", ".join(f"{i} = {name}" for i, name in enumerate(data.label_names[:10]))
            guessed.append(f"{key}: its labels have no names; they are taken for {order}")
        digests.append(weights_digest(teacher, configs[-1]))
    if recipe.model.lora is not None:  # its frozen weights stand in no checkpoint
        digests.append(weights_digest(recipe.model, config))
    if not digests:
        return {"teachers": ""}
    student = copy.deepcopy(config)
    student.num_hidden_layers = layers
    try:
        matches_of(recipe, student, configs)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    digest = hashlib.sha256(" ".join(digests).encode()).hexdigest()[:32]
    return {"teachers": digest} | ({"guessed": "; ".join(guessed)} if guessed else {})


def _check_model(recipe: Recipe, config: Any) -> dict[str, Any]:
    """The parameters of the model that the config describes, from its names and shapes alone.

    Transformers' modelling takes seconds to import, so what was checked is not checked again: an attempt that goes on
    starts that much sooner.
    """
    from fleetune.train.cache import cache_folder

    losses = [loss.model_dump(mode="json") for loss in recipe.losses]
    described = [
        recipe.task,
        config.to_json_string(use_diff=False),
        recipe.model.model_dump(mode="json"),
        losses,
        runs.versions(),
    ]
    key = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:32]
    known = cache_folder().parent / "models" / f"{key}.json"
    if known.exists() and not recipe.model.trust_remote_code:
        with contextlib.suppress(OSError, ValueError):  # damaged: it is counted anew
            return runs.read_json(known)
    found = _count_parameters(recipe, config)
    with contextlib.suppress(OSError):
        known.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        runs.write_json(known, found)
    return found


def _count_parameters(recipe: Recipe, config: Any) -> dict[str, Any]:
    import torch

    from fleetune.train.domains import check_layers
    from fleetune.train.lora import add_lora
    from fleetune.train.model import auto_model
    from fleetune.train.objectives import build_penalties
    from fleetune.train.surgery import freeze, operate
    from fleetune.train.tiled_mlp import mlps_of

    try:
        with torch.device("meta"):
            plain = auto_model(recipe).from_config(config, trust_remote_code=recipe.model.trust_remote_code)
    except Exception as error:  # each family has its own way to refuse a config
        raise RecipeError(f"model = {recipe.model.model_name_or_path!r}: cannot be built: {error}") from None
    try:
        model: Any = operate(plain, recipe.model, recipe.training.seed)
        if recipe.model.lora is not None:
            add_lora(model, recipe, recipe.model.lora, "")
        freeze(model, recipe.model.freeze)
        if recipe.model.mlp_tiles is not None:
            mlps_of(model)
        check_layers(recipe, model)
        build_penalties(recipe, [name for name, p in model.named_parameters() if p.requires_grad])
    except ValueError as error:
        raise RecipeError(str(error)) from None
    return {
        "num_hidden_layers": getattr(model.config, "num_hidden_layers", None),
        "attention": model.config._attn_implementation,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def main() -> int:
    file, elsewhere = Path(sys.argv[1]), "--elsewhere" in sys.argv
    return print_report(lambda: prepare_recipe(parse_recipe(file.read_text(encoding="utf-8"), str(file)), elsewhere))


if __name__ == "__main__":
    sys.exit(main())
