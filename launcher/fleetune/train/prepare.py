"""What is done once before any rank starts: `python -m fleetune.train.prepare RECIPE` checks the recipe against its
model, data and machine, tokenises into the cache, and prints a JSON report. Exit 2 where something does not fit."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from fleetune import runs
from fleetune.recipe import parse_recipe
from fleetune.schema import CrossEntropy, Recipe, RecipeError


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


def prepare_recipe(recipe: Recipe) -> dict[str, Any]:
    """Raises RecipeError, DataError or ModelError, each naming the key."""
    import torch

    from fleetune.train.data import prepare
    from fleetune.train.model import load_config, load_tokenizer
    from fleetune.train.objectives import build_penalties
    from fleetune.train.surgery import freeze

    check_machine(recipe)
    tokenizer = load_tokenizer(recipe)
    prepared = prepare(recipe, tokenizer)
    config = load_config(recipe, prepared.label_names)
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
    if tokenizer.pad_token_id is None:
        raise RecipeError(
            f"model.model_name_or_path = {recipe.model.model_name_or_path!r}: its tokenizer has no padding token"
        )

    from transformers import AutoModelForSequenceClassification

    try:
        with torch.device("meta"):  # names and shapes alone
            model = AutoModelForSequenceClassification.from_config(
                config, trust_remote_code=recipe.model.trust_remote_code
            )
    except Exception as error:  # each family has its own way to refuse a config
        raise RecipeError(f"model = {recipe.model.model_name_or_path!r}: cannot be built: {error}") from None
    try:
        freeze(model, recipe.model.freeze)
        build_penalties(recipe, [name for name, p in model.named_parameters() if p.requires_grad])
    except ValueError as error:
        raise RecipeError(str(error)) from None
    parameters = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        **prepared.report,
        "parameters": parameters,
        "trainable_parameters": trainable,
        "has_fast_bf16": has_fast_bf16(),
        "dropout": [
            name for name, value in config.to_dict().items() if "drop" in name and isinstance(value, float) and value
        ],
    }


def main() -> int:
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the report alone goes to stdout
    from fleetune.train.data import DataError
    from fleetune.train.model import ModelError

    file = Path(sys.argv[1])
    try:
        report = prepare_recipe(parse_recipe(file.read_text(encoding="utf-8"), str(file)))
    except (RecipeError, DataError, ModelError) as error:
        print(f"fleetune: error: {error}", file=sys.stderr)
        return runs.WRONG
    json.dump(report, output)
    output.flush()
    return runs.DONE


if __name__ == "__main__":
    sys.exit(main())
