"""`python -m fleetune.train.evaluate_folder FOLDER [--data PATH] [--split S]`: metrics of a trained model as JSON."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleetune.data_section import Source
from fleetune.recipe import local_or_hub
from fleetune.schema import DATA_SUFFIXES, Recipe, RecipeError, target_splits
from fleetune.train.report import print_report

if TYPE_CHECKING:
    from fleetune.train.data import Split

TELL_SECONDS = 10.0  # between two words of how far it is


def _in_trains_place(recipe: Recipe, data: str, split: str | None, names: list[str] | None) -> Recipe:
    """The recipe with this data for train, the model's own labels and nothing dropped. Raises RecipeError."""
    from fleetune.train.cleaning import NORMALISE

    source = Source(path=local_or_hub(data, Path.cwd()), split=split)
    if Path(source.path).is_absolute():
        if not Path(source.path).exists():
            raise RecipeError(f"--data {data}: there is no such file")
        if not source.path.endswith(DATA_SUFFIXES):
            raise RecipeError(f"--data {data}: should be a file that ends in {', '.join(DATA_SUFFIXES)}")
        if split is not None:
            raise RecipeError(f"--split {split}: is for a hub data set, and --data {data} is a file: leave it out")
    changed: dict[str, Any] = {
        "train": source,
        "validation": None,
        "test": None,
        "source": {},
        "target": {},
        "validation_fraction": None,
        "weight_column": None,
        "augmentation": [],
        "cleaning": [step for step in recipe.data.cleaning if step in NORMALISE],
    }
    model = recipe.model.model_copy(update={"label_names": names, "num_labels": None})
    return recipe.model_copy(update={"model": model, "data": recipe.data.model_copy(update=changed)})


def _other_rows(recipe: Recipe, tokenizer: Any) -> Split:
    """The data that stands in train's place, whose faults are told as --data's."""
    from fleetune.train.data import DataError, prepare
    from fleetune.train.labels import DROP_UNLABELLED

    try:
        return prepare(recipe, tokenizer).splits["train"]
    except DataError as error:
        message = str(error).replace("data.train.path = ", "--data ").replace(DROP_UNLABELLED, "")
        raise DataError(re.sub(r"(row \d+ of) train", r"\1 --data", message)) from error


def _rows(
    folder: Path, recipe: Recipe, tokenizer: Any, model: Any, data: str | None, split: str | None
) -> tuple[Split, str, Mapping[str, slice]]:
    """Of a split of the recipe, or of other data; what they are called, and which rows are of a domain of their own."""
    from fleetune.train.data import prepare

    if data is None:
        unlabelled = {name for name in target_splits(recipe) if name.endswith(".train")}
        prepared = prepare(recipe, tokenizer)
        splits = {name: rows for name, rows in prepared.splits.items() if name not in unlabelled}
        held_out = [name for name in splits if name.rpartition(".")[2] in ("test", "validation")]
        name = split or min(held_out, key=lambda name: (name.count("."), name.endswith("validation")), default=None)
        if name is None:
            raise RecipeError(f"{folder}: its recipe has neither test nor validation data; give --data FILE")
        if name not in splits:
            raise RecipeError(f"--split {name}: the recipe has {', '.join(splits)}")
        return splits[name], name, prepared.domains(name)
    names = (
        [model.config.id2label[i] for i in range(model.config.num_labels)] if recipe.task == "classification" else None
    )
    return _other_rows(_in_trains_place(recipe, data, split, names), tokenizer), data, {}


def evaluate_folder(folder: Path, data: str | None, split: str | None) -> dict[str, Any]:
    """Raises RecipeError or DataError; a fault of `data` and `split` names the options."""
    import torch
    from transformers import AutoTokenizer

    from fleetune.train.alignment import Asked, Outputs, run
    from fleetune.train.distributed import World
    from fleetune.train.evaluate import evaluate
    from fleetune.train.generate import end_tokens, exact_match, generator
    from fleetune.train.head import fuse_head
    from fleetune.train.model import padding_id
    from fleetune.train.trained import load_trained, recipe_and_model

    recipe, path = recipe_and_model(folder)
    trusts = recipe.model.trust_remote_code
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trusts)
    model = load_trained(recipe, path, trust=trusts)
    if recipe.task == "causal_lm" and recipe.kernels != "reference":
        fuse_head(model)
    rows, where, of_domains = _rows(folder, recipe, tokenizer, model, data, split)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    autocast = recipe.training.bf16 and recipe.deepspeed.zero_stage == 0  # as in training

    done, told = 0, time.monotonic()

    def forward(inputs: dict[str, torch.Tensor], compute: Callable[[Outputs], torch.Tensor]) -> torch.Tensor:
        nonlocal done, told
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            outputs = run(model, model, inputs, Asked(), compute)
        done += len(inputs["input_ids"])
        if time.monotonic() - told > TELL_SECONDS:
            told = time.monotonic()
            print(f"evaluated {done} of {len(rows)} rows", file=sys.stderr, flush=True)
        return outputs

    world, padding, wanted = World(0, 1, 0, device), padding_id(tokenizer) or 0, recipe.evaluation.exact_match
    metrics = evaluate(forward, rows, recipe, padding, world, of_domains)
    if wanted is not None:
        generate = generator(model, padding, end_tokens(model, tokenizer, []), device, partitioned=False)
        size = recipe.evaluation.per_device_eval_batch_size
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            metrics["exact_match"] = exact_match(wanted, rows, tokenizer, generate, size, world)
    return {"model": str(folder), "data": where, "rows": len(rows), "metrics": metrics}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data")
    parser.add_argument("--split")
    arguments = parser.parse_args()
    return print_report(lambda: evaluate_folder(arguments.folder, arguments.data, arguments.split))


if __name__ == "__main__":
    sys.exit(main())
