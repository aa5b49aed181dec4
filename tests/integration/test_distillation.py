"""Distillation by real ranks: every loss from a teacher, cut in any way, under ZeRO 0 to 3, broken off and taken up."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Job, make_run, train_together, work_together
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import recipe_values, write_model, write_rows
from torch.nn import functional

from fleetune import runs
from fleetune.train.model import load_tokenizer
from fleetune.verify import Difference, difference, exact_metrics

ROWS, GLOBAL_BATCH = 33, 16  # the last window has one row: of two ranks, one has none
WHOLE = ((1, 1), 0)  # ranks x micro-batches, ZeRO stage
CUTS = [((1, 8), 0), ((2, 4), 0), ((2, 4), 1), ((2, 4), 2), ((2, 4), 3), ((1, 8), 3)]
TEMPERATURE, SHARES = 3.0, (0.75, 0.25)
# Of two layers, 32 wide; its teachers have three, 48 wide, and two, 32 wide.
LOSSES: list[dict[str, Any]] = [
    {"kind": "cross_entropy", "weight": 0.5},
    {"kind": "distillation", "weight": 0.7, "temperature": TEMPERATURE},
    {"kind": "hidden_states", "weight": 0.3},
    {"kind": "hidden_states", "weight": 0.2, "distance": "cosine", "layer_map": "last"},
    {"kind": "embedding", "weight": 0.1},
    {"kind": "attention", "weight": 0.4, "compare": "values", "relation_heads": 2},
    {"kind": "attention", "weight": 0.6, "compare": "maps", "layer_map": [[0, 1]]},
]
NAMES = ["cross_entropy", "distillation", "hidden_states", "hidden_states_2", "embedding", "attention", "attention_2"]


def _recipe(folder: Path, name: str, stage: int, **sections: Any) -> dict[str, Any]:
    teachers = [
        {
            "model_name_or_path": str(folder / f"teacher-{i}"),
            "weight": share,
            "deepspeed": {"zero_stage": 3 * (stage == 3)},
        }
        for i, share in enumerate(SHARES)
    ]
    base = {
        "model": {"model_name_or_path": str(folder / "model"), "attn_implementation": "eager"},
        "losses": LOSSES,
        "teachers": teachers,
        "deepspeed": {"zero_stage": stage},
        "data": {"weight_column": "weight"},
    }
    return recipe_values(folder, name, **{**base, **sections})


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoModelForSequenceClassification

    folder = tmp_path_factory.mktemp("distillation")
    write_model(folder / "model")
    for i, (seed, config) in enumerate(((1, {"hidden_size": 48, "num_hidden_layers": 3}), (2, {}))):
        path = write_model(folder / f"teacher-{i}", seed=seed, **config)
        torch.manual_seed(seed)
        AutoModelForSequenceClassification.from_pretrained(path, initializer_range=0.3).save_pretrained(path)
    write_rows(folder / "train.jsonl", ROWS)
    write_rows(folder / "validation.jsonl", 2, seed=1)
    return folder


# ---------------------------------------------------------------- the gradient


@dataclass(frozen=True)
class Found:
    difference: Difference  # from one rank, one micro-batch, no ZeRO
    losses: dict[str, float]


@pytest.fixture(scope="module")
def gradients(workspace: Path) -> tuple[dict[tuple[str, tuple[int, int], int], Found], dict[str, torch.Tensor]]:
    jobs: dict[tuple[str, tuple[int, int], int], Job] = {}
    for (ranks, micro_batches), stage in (WHOLE, *CUTS):
        training = {
            "global_batch_size": GLOBAL_BATCH,
            "per_device_train_batch_size": GLOBAL_BATCH // ranks // micro_batches,
            "gradient_accumulation_steps": micro_batches,
        }
        name = f"gradient-{ranks}x{micro_batches}-zero{stage}"
        run = make_run(_recipe(workspace, name, stage, training=training), ranks)
        for window, batch in (("whole", 0), ("short", -1)):
            out = run.path / f"{window}.safetensors"
            jobs[window, (ranks, micro_batches), stage] = Job(str(run.path), str(out), batch)
    truth = make_run(_recipe(workspace, "gradient-fp64", 0), 1)
    jobs["whole", (0, 0), 0] = Job(str(truth.path), str(truth.path / "whole.safetensors"), 0, float64=True)
    work_together([(size, [job for key, job in jobs.items() if max(1, key[1][0]) == size]) for size in (1, 2)])
    found, references = {}, {}
    for key, job in jobs.items():
        path = Path(str(job.gradient))
        tensors = load_file(path)
        reference = references.setdefault(key[0], tensors)
        with safe_open(path, "pt") as file:
            found[key] = Found(difference(reference, tensors), json.loads(file.metadata()["losses"]))
    return found, load_file(Path(str(jobs["whole", (0, 0), 0].gradient)))


@pytest.mark.parametrize("window", ["whole", "short"])
@pytest.mark.parametrize(("cut", "stage"), CUTS)
def test_no_cut_changes_the_gradient(gradients: Any, window: str, stage: int, cut: tuple[int, int]) -> None:
    found = gradients[0][window, cut, stage]
    assert found.difference.whole <= 1e-6, found.difference
    assert found.difference.worst <= 1e-6, found.difference
    assert list(found.losses) == NAMES
    # A small divergence is a small difference of sums near 1, known to fp32's own rounding.
    assert found.losses == pytest.approx(gradients[0][window, *WHOLE].losses, rel=1e-5, abs=1e-8)


def test_the_reference_is_the_formulas_in_plain_pytorch(workspace: Path, gradients: Any) -> None:
    """Every loss by its definition, over the whole batch at once, in fp64."""
    from transformers import AutoModelForSequenceClassification

    found, tensors = gradients
    run = runs.Run(workspace / "runs" / "gradient-fp64")
    with safe_open(run.path / "whole.safetensors", "pt") as file:
        order = json.loads(file.metadata()["rows"])
    lines = (workspace / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(lines[row]) for row in order]
    inputs = load_tokenizer(run.recipe())([row["text"] for row in rows], padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    labels = torch.tensor([row["label"] for row in rows])
    weights = torch.tensor([row["weight"] for row in rows], dtype=torch.float64)
    ask = {"output_hidden_states": True, "output_attentions": True}

    def load(name: str) -> Any:
        path = workspace / name
        return AutoModelForSequenceClassification.from_pretrained(path, attn_implementation="eager").double()

    torch.manual_seed(0)  # the head's, by training.seed
    student = load("model")
    projections = {
        name: torch.nn.Parameter(torch.zeros_like(tensor))
        for name, tensor in tensors.items()
        if name.startswith("projections")
    }
    torch.manual_seed(0)
    for parameter in projections.values():
        drawn = torch.nn.Linear(parameter.shape[1], parameter.shape[0], bias=False)
        parameter.data.copy_(drawn.weight)
    values: list[torch.Tensor] = []
    hook = [
        layer.attention.self.value.register_forward_hook(lambda m, i, out: values.append(out))
        for layer in student.bert.encoder.layer
    ]
    s = student(**inputs, **ask)
    del hook
    mask = inputs["attention_mask"].double()
    tokens = mask * weights[:, None]

    def relation(v: torch.Tensor) -> torch.Tensor:
        each = v.unflatten(-1, (2, -1)).transpose(1, 2)
        scores = each @ each.mT / each.shape[-1] ** 0.5
        return scores.masked_fill(mask[:, None, None, :] == 0, -torch.inf).softmax(-1)

    def kl(t: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        there = t > 0
        log_t, log_p = (torch.where(there, each, 1.0).log() for each in (t, p))
        return (t * (log_t - log_p)).sum(-1).mean(1)

    def mean(each: torch.Tensor) -> torch.Tensor:
        return (each * tokens).sum() / tokens.sum()

    total = dict.fromkeys(NAMES[2:], torch.zeros((), dtype=torch.float64))
    targets = torch.zeros(len(rows), 2, dtype=torch.float64)
    for number, share in enumerate(SHARES):
        teacher, taught = load(f"teacher-{number}"), list[torch.Tensor]()
        for layer in teacher.bert.encoder.layer:
            layer.attention.self.value.register_forward_hook(lambda m, i, out, taught=taught: taught.append(out))
        with torch.no_grad():
            t = teacher(**inputs, **ask)
        targets += share * (t.logits / TEMPERATURE).softmax(-1)
        last = len(taught) - 1
        pairs = {0: [(0, 1), (1, 2)], 1: [(0, 0), (1, 1)]}[number]

        def drawn(loss: int, i: int, j: int, number: int = number) -> torch.Tensor:
            name = f"projections.losses_{loss}_teacher_{number}_{i}_{j}.weight"
            state: torch.Tensor = s.hidden_states[i + 1]
            return state @ projections[name].T if name in projections else state

        for i, j in pairs:
            each = (drawn(2, i, j) - t.hidden_states[j + 1]).square().mean(-1)
            total["hidden_states"] = total["hidden_states"] + share * mean(each) / len(pairs)
        each = 1 - functional.cosine_similarity(drawn(3, 1, last), t.hidden_states[-1], dim=-1)
        total["hidden_states_2"] = total["hidden_states_2"] + share * mean(each)
        each = (drawn(4, -1, -1) - t.hidden_states[0]).square().mean(-1)
        total["embedding"] = total["embedding"] + share * mean(each)
        total["attention"] = total["attention"] + share * mean(kl(relation(taught[-1]), relation(values[-1])))
        total["attention_2"] = total["attention_2"] + share * mean(kl(t.attentions[1], s.attentions[0]))
    ce = functional.cross_entropy(s.logits, labels, reduction="none")
    total["cross_entropy"] = (weights * ce).sum() / weights.sum()
    soft = (targets * (targets.log() - (s.logits / TEMPERATURE).log_softmax(-1))).sum(-1)
    total["distillation"] = TEMPERATURE**2 * (weights * soft).sum() / weights.sum()

    weighted = {name: loss["weight"] * total[name] for name, loss in zip(NAMES, LOSSES, strict=True)}
    measured = found["whole", (0, 0), 0].losses
    assert {name: value.item() for name, value in weighted.items()} == pytest.approx(measured, rel=1e-9)
    torch.stack(list(weighted.values())).sum().backward()
    parameters = {**dict(student.named_parameters()), **projections}
    truth = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()}
    assert difference(truth, tensors).whole <= 1e-9


# ---------------------------------------------------------------- whole runs


def test_a_distilled_run_is_the_same_under_every_stage_and_its_model_has_no_projections(workspace: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    alike = {"training": {"max_steps": 3}}  # the last step has the short window
    checkpointing = {"model": {**_recipe(workspace, "", 3)["model"], "gradient_checkpointing": True}}
    made = {
        (0, 1): make_run(_recipe(workspace, "whole-0", 0, **alike), 1),
        (2, 2): make_run(_recipe(workspace, "whole-2", 2, **alike), 2),
        (3, 2): make_run(_recipe(workspace, "whole-3", 3, **alike, **checkpointing), 2),
    }
    for ranks in (1, 2):
        train_together([run for key, run in made.items() if key[1] == ranks], ranks)
    metrics = {key: exact_metrics(run.path) for key, run in made.items()}
    first = metrics.pop((0, 1))
    for other in metrics.values():
        for step, values in first.items():
            numbers = {key: value for key, value in values.items() if isinstance(value, float)}
            assert {key: other[step][key] for key in numbers} == pytest.approx(numbers, rel=1e-4), step
    losses = [first[step]["train/distillation"] for step in sorted(first) if "train/distillation" in first[step]]
    assert losses[-1] < losses[0]
    for run in made.values():
        model, found = AutoModelForSequenceClassification.from_pretrained(run.model, output_loading_info=True)
        assert not any(found.values()), found
        assert model.config.num_hidden_layers == 2
        assert "Distilled from" in (run.model / "README.md").read_text(encoding="utf-8")


def test_a_run_that_goes_on_is_the_run_that_was_never_broken_off(workspace: Path) -> None:
    """The projections' weights and moments are in the checkpoint: the losses of later steps show it."""
    settings = {"checkpoint": {"save_steps": 2}, "training": {"lr_scheduler_type": "constant"}}
    unbroken, broken = (make_run(_recipe(workspace, name, 2, **settings), 2) for name in ("unbroken", "broken"))
    train_together([unbroken], 2)
    recipe = broken.recipe_file.read_text(encoding="utf-8")
    broken.recipe_file.write_text(recipe.replace("max_steps: 6", "max_steps: 3"), encoding="utf-8")
    train_together([broken], 2)
    broken.recipe_file.write_text(recipe, encoding="utf-8")
    train_together([broken], 2)
    assert exact_metrics(broken.path)[6] == exact_metrics(unbroken.path)[6]
    first, second = (load_file(run.model / "model.safetensors") for run in (unbroken, broken))
    assert all(torch.equal(first[name], second[name]) for name in first)
