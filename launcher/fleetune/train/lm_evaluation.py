"""`python -m fleetune.train.lm_evaluation FOLDER TASKS [--limit N]`: a language model by EleutherAI's lm-eval, as JSON.

The tasks, their prompts and their metrics are lm-eval's own, whose figures others publish; the model is loaded here,
with its adapter and in 4 bits where it was trained so. A task is a name that the installed lm-eval knows, or a YAML
file or a folder of them, which are told by a `/` or `.yaml`: such a file may name Python code beside it (`!function`),
so one is only taken from where the user says it lies, and never by a name alone.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch

from fleetune.schema import RecipeError
from fleetune.train.report import print_report
from fleetune.train.trained import load_trained, recipe_and_model


def lm_evaluate(folder: Path, tasks: str, limit: int | None) -> dict[str, Any]:
    """The metrics of each task, on its first `limit` rows or all.

    Raises:
        RecipeError: lm-eval is not there, the model is of another task, or one of the tasks cannot be had.
    """
    missing = [name for name in ("lm_eval", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise RecipeError(f"--lm-eval {tasks}: needs {' and '.join(missing)}: pip install 'fleetune[lm-eval]'")
    recipe, path = recipe_and_model(folder)
    if recipe.task != "causal_lm":
        raise RecipeError(f"--lm-eval {tasks}: is for language models, and {folder} is of task: {recipe.task}")
    names, manager = _find(tasks)

    import yaml
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    trusts = recipe.model.trust_remote_code
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trusts)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_trained(recipe, path, trust=trusts).to(device)
    autocast = recipe.training.bf16 and recipe.deepspeed.zero_stage == 0  # as in training
    wrapped = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=recipe.evaluation.per_device_eval_batch_size,
        mixed_precision_dtype=torch.bfloat16 if autocast else None,
    )
    try:
        found = simple_evaluate(wrapped, tasks=names, task_manager=manager, limit=limit, log_samples=False)
    except (OSError, ValueError, TypeError, KeyError, ImportError, AttributeError, yaml.YAMLError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise RecipeError(f"--lm-eval {tasks}: {type(error).__name__}: {reason}") from error
    assert found is not None  # on the only rank
    return {"model": str(folder), "tasks": [_told(name, found) for name in found["results"]]}


def _find(tasks: str) -> tuple[list[str], Any]:
    """What lm-eval is asked for, and its index of tasks. Raises RecipeError for what is neither a name nor a file."""
    from lm_eval.tasks import TaskManager

    given = [one.strip() for one in tasks.split(",") if one.strip()]
    if not given:
        raise RecipeError("--lm-eval: name tasks, with commas between them")
    are_paths = {one: "/" in one or one.endswith((".yaml", ".yml")) for one in given}
    names: list[str] = []
    folders = [one for one, is_path in are_paths.items() if is_path and Path(one).is_dir()]
    for one, is_path in are_paths.items():
        if one in folders:
            inside = TaskManager(include_path=one, include_defaults=False).all_subtasks
            if not inside:
                raise RecipeError(f"--lm-eval {one}: the folder has no task in a .yaml file")
            for file in sorted(Path(one).rglob("*.yaml")):
                _parse(one, file)  # lm-eval passes over one that it cannot read
            names += inside
        elif is_path and not Path(one).is_file():
            raise RecipeError(f"--lm-eval {one}: there is no such file or folder")
        else:
            names.append(str(Path(one).resolve()) if is_path else one)
    manager = TaskManager(include_path=folders or None)  # reads lm-eval's own files, which takes seconds
    known = manager.all_tasks
    for one, is_path in are_paths.items():
        if not is_path and one not in known:
            near = difflib.get_close_matches(one, known, n=1, cutoff=0.5)
            hint = f"did you mean `{near[0]}`? " if near else ""
            raise RecipeError(f"--lm-eval {one}: lm-eval knows no such task; {hint}A file is ./NAME.yaml")
    return list(dict.fromkeys(names)), manager


def _parse(given: str, file: Path) -> None:
    import yaml

    try:
        yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)  # its !function and !include stay text
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"--lm-eval {given}: {file} cannot be read: {' '.join(str(error).split())}") from None


def _told(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """A task's or group's rows and metrics: NAME, or NAME/FILTER, as value and standard error where it has one."""
    metrics: dict[str, list[float | None]] = {}
    for key, value in found["results"][name].items():
        metric, _, kind = key.partition(",")
        if not isinstance(value, int | float) or not kind or metric.endswith("_stderr"):
            continue
        error = found["results"][name].get(f"{metric}_stderr,{kind}")
        metrics[metric if kind == "none" else f"{metric}/{kind}"] = [
            float(value),
            float(error) if isinstance(error, int | float) else None,
        ]
    return {"task": name, "rows": found["n-samples"].get(name, {}).get("effective"), "metrics": metrics}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("tasks")
    parser.add_argument("--limit", type=int)
    given = parser.parse_args()
    return print_report(lambda: lm_evaluate(given.folder, given.tasks, given.limit))


if __name__ == "__main__":
    sys.exit(main())
