"""RUN/model: what Transformers loads, with a card that says where it came from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fleetune import runs, sizes
from fleetune.recipe import dump_recipe
from fleetune.schema import Recipe, Teacher, sources_of, teachers_of
from fleetune.train.alignment import PROJECTIONS
from fleetune.train.conversations import NO_TEMPLATE
from fleetune.train.data import Prepared
from fleetune.train.domains import DISCRIMINATORS
from fleetune.train.generate import end_tokens
from fleetune.train.lora import has_adapter, save_adapter
from fleetune.train.teacher_cache import read as read_cache

OF_TRAINING = (f"{PROJECTIONS}.", f"{DISCRIMINATORS}.")


def write(
    run: runs.Run,
    recipe: Recipe,
    model: nn.Module,
    state: dict[str, torch.Tensor],
    tokenizer: Any,
    data: Prepared,
    report: dict[str, Any],
) -> None:
    """Safetensors, config, tokenizer, card and recipe, written beside and renamed into place.

    Without the projections to a teacher's widths and the discriminators of domains, which serve training alone; of a
    model with LoRA the adapter.
    """
    beside = run.path / ".model.part"
    shutil.rmtree(beside, ignore_errors=True)
    assert isinstance(model, PreTrainedModel)
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(OF_TRAINING)}
    if has_adapter(model):
        save_adapter(model, kept, beside)
    else:
        model.save_pretrained(beside, state_dict=kept)
    if recipe.task == "causal_lm":
        _store_ends(model, end_tokens(model, tokenizer, data.report["ends"]["train"]), beside)
        given = recipe.data.chat_template
        if given not in (None, NO_TEMPLATE) and data.report["format"]["train"] != "text":
            tokenizer.chat_template = tokenizer.get_chat_template(given)  # one that it has by a name, by its text
    tokenizer.save_pretrained(beside)
    (beside / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    (beside / "README.md").write_text(card(recipe, data, report), encoding="utf-8")
    shutil.rmtree(run.model, ignore_errors=True)
    beside.rename(run.model)


def _store_ends(model: PreTrainedModel, ends: list[int] | None, folder: Path) -> None:
    """Whoever runs the model stops where it learnt to. Into the file: Transformers refuses to save a config that was
    changed in one place and is odd in another, as published ones are."""
    file = folder / "generation_config.json"
    values = runs.read_json(file) if file.exists() else model.generation_config.to_diff_dict()
    runs.write_json(file, {**values, "eos_token_id": ends})


def card(recipe: Recipe, data: Prepared, report: dict[str, Any]) -> str:
    language = recipe.task == "causal_lm"
    lines = ["---", f"library_name: {'transformers' if recipe.model.lora is None else 'peft'}"]
    lines.append(f"pipeline_tag: {'text-generation' if language else 'text-classification'}")
    if not recipe.model.model_name_or_path.startswith(("/", "package://")):
        lines.append(f"base_model: {recipe.model.model_name_or_path}")
    lines += ["tags: [fleetune]", "---", "", f"# {recipe.name}", ""]
    origin = "drawn from scratch in the architecture of" if recipe.model.from_scratch else "fine-tuned from"
    kind = "model" if recipe.model.lora is None else f"{recipe.model.lora.kind} adapter"
    lines += [
        f"A {'language' if language else recipe.task} {kind}, {origin} `{recipe.model.model_name_or_path}`, "
        f"{sizes.count(report['parameters'])} parameters, "
        f"trained by Fleetune for {report['step']} steps; the weights are those of step {report['best_step']}.",
        "",
    ]
    if teachers := [_named(teacher) for _, teacher in teachers_of(recipe)]:
        lines += ["Distilled from " + " and ".join(teachers) + ".", ""]
    if data.label_names:
        lines += ["Labels: " + ", ".join(f"{i} = {name}" for i, name in enumerate(data.label_names)), ""]
    shown = dict.fromkeys([*report["validation"], *report["test"]])
    lines += [
        "## Metrics",
        "",
        "| split | " + " | ".join(shown or {"": None}) + " |",
        "|---" * (1 + len(shown or {"": None})) + "|",
    ]
    for split in ("validation", "test"):
        if report[split]:
            values = [f"{report[split][name]:.4f}" if name in report[split] else "" for name in shown]
            lines.append(f"| {split} | " + " | ".join(values) + " |")
    lines += ["", "## Data", "", "| split | source | rows | tokens |", "|---|---|---|---|"]
    for split, rows in data.report["rows"].items():
        found = [
            " ".join(filter(None, (source.path, source.name, source.split)))
            for name, source in sources_of(recipe)
            if name == split or (name.startswith("source.") and name.endswith(f".{split}"))
        ]
        where = ", ".join(found) or "split off train"
        lines.append(f"| {split} | `{where}` | {rows} | {data.report['tokens'][split]} |")
    for step, touched in data.report["cleaning"].items():
        lines.append(
            f"\nCleaning `{step}` touched "
            + ", ".join(f"{count} rows of {split}" for split, count in touched.items())
            + "."
        )
    versions = ", ".join(f"{name} {version}" for name, version in runs.versions().items())
    lines += ["", "## Versions", "", versions, "", "## Recipe", "", "```yaml", dump_recipe(recipe).rstrip(), "```", ""]
    return "\n".join(lines)


def _named(teacher: Teacher) -> str:
    """A stored one by the model that it was."""
    if teacher.cache is None:
        return f"`{teacher.model_name_or_path}`"
    stored = read_cache(Path(teacher.cache))
    return (
        f"`{stored['teacher']['model_name_or_path']}`, as stored in `{teacher.cache}`" if stored else "a stored teacher"
    )
