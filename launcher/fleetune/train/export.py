"""`python -m fleetune.train.export MODEL OUT [--merge] [--dtype D]`: writes a folder to deploy, and says so in JSON."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fleetune.recipe import dump_recipe
from fleetune.schema import Recipe, RecipeError
from fleetune.train.head import apart
from fleetune.train.lora import is_adapter, merge
from fleetune.train.quantization import is_quantized, unquantized
from fleetune.train.report import print_report
from fleetune.train.trained import load_trained, recipe_and_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROBE = 16  # tokens
CLOSE = {torch.float32: 1e-4}  # relative to the largest logit; of half precisions 0.05


def export(folder: Path, out: Path, merged: bool, dtype: str | None) -> dict[str, Any]:
    """Writes OUT beside and renames it into place: the model's folder, its adapter merged, in another dtype.

    What was written is loaded again as Transformers does, and must say what the trained model says; one that was
    trained over 4-bit weights, what its adapter says over whole ones.

    Raises:
        RecipeError: there is no model, or not one of this kind; OUT stands in the way.
        RuntimeError: the model that was written says other things.
    """
    recipe, path = recipe_and_model(folder)
    adapter = is_adapter(path)
    if merged and not adapter:
        raise RecipeError(f"--merge: {folder} is a whole model already; leave it out")
    if dtype is not None and adapter and not merged:
        raise RecipeError(f"--dtype {dtype}: an adapter is kept as it is; give --merge too")
    if out.exists():
        raise RecipeError(f"{out}: is there already; give the name of a new folder")
    if not out.absolute().parent.is_dir():
        raise RecipeError(f"{out}: there is no folder {out.absolute().parent}")
    beside = out.absolute().parent / f".{out.name}.part"
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(path, beside, ignore=shutil.ignore_patterns("*.safetensors*", "adapter_config.json"))
    try:
        if adapter and not merged:
            shutil.copytree(path, beside, dirs_exist_ok=True)
            found: dict[str, Any] = {}
        else:
            found = _write(recipe, path, beside, dtype)
        _open_to_others(beside)
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return {"folder": str(out), "bytes": size, **found}


def _open_to_others(folder: Path) -> None:
    """As the user's umask says: it is deployed, where a run's folder is private and safetensors' files are, too."""
    mask = os.umask(0o077)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _write(recipe: Recipe, path: Path, beside: Path, dtype: str | None) -> dict[str, Any]:
    trust, wanted = recipe.model.trust_remote_code, None if dtype is None else DTYPES[dtype]
    # Merged, and compared, in the better of both; with QLoRA into the weights that the 4-bit ones were made of.
    better = wanted if wanted == torch.float32 else None
    model = load_trained(unquantized(recipe), path, better, trust=trust)
    truth = _logits(model)
    trained = _logits(load_trained(recipe, path, better, trust=trust)) if is_quantized(recipe) else None
    whole = recipe.model_copy(update={"model": recipe.model.model_copy(update={"lora": None})})
    (merge(model) if is_adapter(path) else model).to(wanted or model.dtype).save_pretrained(beside)
    (beside / "recipe.yaml").write_text(dump_recipe(whole), encoding="utf-8")
    if is_adapter(path):
        card = (beside / "README.md").read_text(encoding="utf-8")
        card = card.replace("library_name: peft", "library_name: transformers", 1)
        card = re.sub(r"(Q?LoRA adapter), fine-tuned from", r"model, with a \1 merged, fine-tuned from", card, count=1)
        (beside / "README.md").write_text(card, encoding="utf-8")
    del model
    written = load_trained(whole, beside, trust=trust)
    difference = float(apart(_logits(written), truth))
    if not difference <= CLOSE.get(written.dtype, 0.05):
        raise RuntimeError(f"the exported model's logits are off by {difference:.1e} of the largest; nothing is kept")
    found = {} if trained is None else {"from_quantized": float(apart(truth, trained))}
    return {
        **found,
        "dtype": str(written.dtype).removeprefix("torch."),
        "parameters": sum(parameter.numel() for parameter in written.parameters()),
        "difference": difference,
    }


@torch.no_grad()
def _logits(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(PROBE, device=next(model.parameters()).device)[None]
    ids = ids % int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    logits: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits.float().cpu()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--merge", action="store_true")
    parser.add_argument("--dtype", choices=DTYPES)
    arguments = parser.parse_args()
    return print_report(lambda: export(arguments.folder, arguments.out, arguments.merge, arguments.dtype))


if __name__ == "__main__":
    sys.exit(main())
