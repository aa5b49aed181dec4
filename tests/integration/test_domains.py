"""Losses between a source and a target by real ranks: exact for any number of them, broken off and taken up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Job, make_run, work_together
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import recipe_values, write_model, write_rows
from torch.nn import functional

from fleetune import runs
from fleetune.train.batches import compose_epoch
from fleetune.train.data import prepare
from fleetune.train.features import load_encoder, split_features
from fleetune.train.model import load_tokenizer
from fleetune.train.source_weights import fitted
from fleetune.train.targets import partners
from fleetune.verify import difference, exact_metrics
from fleetune_kernels import reference_mmd

ROWS, TARGETS, GLOBAL_BATCH = 37, 23, 16  # the last window has 5 rows; the target begins anew within each epoch
LOSSES: dict[str, dict[str, Any]] = {
    "mmd": {"kind": "mmd"},
    "mmd_detached": {"kind": "mmd", "detach_bandwidth": True},
    "mmd_unbiased": {"kind": "mmd", "estimator": "unbiased", "layer": 0, "bandwidth": 0.5, "num_kernels": 3},
    "mmd_linear": {"kind": "mmd", "estimator": "linear", "layer": "logits", "factor": 3.0},
    "jmmd": {"kind": "jmmd", "layers": ["pooled", "probabilities", 1, "bert.encoder.layer.0.output"]},
    "jmmd_given": {"kind": "jmmd", "layers": ["pooled", "logits"], "bandwidths": [None, 2.0]},
    "lmmd": {"kind": "lmmd"},
    "coral": {"kind": "coral"},
    "dann": {"kind": "dann", "weight": 0.3},
    "entropy": {"kind": "entropy"},
}
ACCUMULATED = ["mmd", "mmd_unbiased", "jmmd", "lmmd", "coral"]
WINDOWS = {"whole": 0, "short": -1}
Found = dict[tuple[str, tuple[int, int], str], tuple[dict[str, torch.Tensor], dict[str, float]]]


def _recipe(folder: Path, name: str, cut: tuple[int, int], losses: list[dict[str, Any]], **sections: Any) -> Any:
    ranks, micro_batches = cut
    training = {
        "global_batch_size": GLOBAL_BATCH,
        "per_device_train_batch_size": GLOBAL_BATCH // ranks // micro_batches,
        "gradient_accumulation_steps": micro_batches,
        **sections.pop("training", {}),
    }
    target = {
        "near": {
            "train": {"path": str(folder / "near.jsonl")},
            "validation": {"path": str(folder / "validation.jsonl")},
        },
        "far": {"train": {"path": str(folder / "far.jsonl")}},
    }
    base = {"losses": losses, "training": training, "deepspeed": {"zero_stage": 0}}
    return recipe_values(folder, name, **{**base, **sections, "data": {"target": target, **sections.get("data", {})}})


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("domains")
    write_model(folder / "model", initializer_range=0.2)
    write_model(folder / "dropout", hidden_dropout_prob=0.2)
    write_rows(folder / "train.jsonl", ROWS)
    write_rows(folder / "validation.jsonl", 9, seed=1)
    # Labels that no task has: reading them would end in an error.
    write_rows(folder / "near.jsonl", 15, seed=2, label="never read")
    write_rows(folder / "far.jsonl", TARGETS - 15, seed=3, label=[])
    return folder


# ---------------------------------------------------------------- the gradient


@pytest.fixture(scope="module")
def gradients(workspace: Path) -> Found:
    """By (loss, ranks x micro-batches, window); those of `all` are of the losses that a cut does not change."""
    jobs: dict[tuple[str, tuple[int, int], str], Job] = {}

    def add(name: str, cut: tuple[int, int], losses: list[dict[str, Any]], windows: Any = WINDOWS, **more: Any) -> None:
        run = make_run(_recipe(workspace, f"{name}-{cut[0]}x{cut[1]}", cut, losses, **more), cut[0])
        for window in windows:
            out = str(run.path / f"{window}.safetensors")
            jobs[name, cut, window] = Job(str(run.path), out, WINDOWS[window])

    for name, loss in LOSSES.items():
        for ranks in (1, 2, 4):
            add(name, (ranks, 1), [{"kind": "cross_entropy", "weight": 0.0}, loss])
        add(
            f"{name}-reference",
            (1, 1),
            [{"kind": "cross_entropy", "weight": 0.0}, loss],
            ["whole"],
            kernels="reference",
        )
    together = [LOSSES[name] | {"accumulate": True} for name in ACCUMULATED]
    together += [{"kind": "cross_entropy"}, LOSSES["dann"], LOSSES["entropy"]]
    for cut in ((1, 1), (1, 8), (2, 4), (8, 1)):
        add("all", cut, together)
    for stage in (1, 2, 3):
        add(f"zero{stage}", (2, 4), together, deepspeed={"zero_stage": stage})
    sizes = sorted({cut[0] for _, cut, _ in jobs})
    work_together([(size, [job for key, job in jobs.items() if key[1][0] == size]) for size in sizes])
    found: Found = {}
    for key, job in jobs.items():
        path = Path(str(job.gradient))
        with safe_open(path, "pt") as file:
            found[key] = load_file(path), json.loads(file.metadata()["losses"])
    return found


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", LOSSES)
def test_the_number_of_ranks_changes_nothing(gradients: Found, name: str, ranks: int, window: str) -> None:
    (truth, losses), (found, others) = gradients[name, (1, 1), window], gradients[name, (ranks, 1), window]
    assert difference(truth, found).whole <= 1e-5
    assert others == pytest.approx(losses, rel=1e-5, abs=1e-7)
    assert abs(losses[LOSSES[name]["kind"]]) > 1e-6
    assert max(float(tensor.abs().max()) for tensor in truth.values()) > 1e-5


@pytest.mark.parametrize("name", LOSSES)
def test_the_kernel_gives_the_references_gradient_inside_the_loop(gradients: Found, name: str) -> None:
    (truth, losses), (found, others) = (
        gradients[f"{name}-reference", (1, 1), "whole"],
        gradients[name, (1, 1), "whole"],
    )
    assert difference(truth, found).whole <= 1e-5
    assert others == pytest.approx(losses, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("cut", [(1, 8), (2, 4), (8, 1)])
def test_accumulated_no_cut_changes_the_gradient(gradients: Found, cut: tuple[int, int], window: str) -> None:
    (truth, losses), (found, others) = gradients["all", (1, 1), window], gradients["all", cut, window]
    assert difference(truth, found).whole <= 1e-5
    assert others == pytest.approx(losses, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_gives_the_same_gradient(gradients: Found, stage: int, window: str) -> None:
    (truth, losses), (found, others) = gradients["all", (1, 1), window], gradients[f"zero{stage}", (2, 4), window]
    assert difference(truth, found).whole <= 1e-5
    assert others == pytest.approx(losses, rel=1e-5, abs=1e-7)


def test_one_micro_batch_is_the_same_accumulated_or_not(gradients: Found) -> None:
    for name in ("mmd", "lmmd", "coral"):
        alone, together = gradients[name, (1, 1), "whole"][1], gradients["all", (1, 1), "whole"][1]
        assert together[name] == pytest.approx(alone[name], rel=1e-5)


def test_the_reference_is_the_formulas_in_plain_pytorch(workspace: Path, gradients: Found) -> None:
    """Of the first batch: which rows it has, what is compared of them, and what comes of it."""
    from transformers import AutoModelForSequenceClassification

    recipe = runs.Run(workspace / "runs" / "mmd-1x1").recipe()
    tokenizer = load_tokenizer(recipe)
    data = prepare(recipe, tokenizer)
    lengths = [data.splits[name].lengths for name in ("train", "target.far.train", "target.near.train")]
    rows = compose_epoch(lengths[0], GLOBAL_BATCH, 0, 0)[0]
    drawn = partners(lengths[0], torch.cat([torch.tensor(each) for each in lengths[1:]]).numpy(), 0, 0, True)[rows]
    assert len(set(drawn.tolist())) > 8

    def lines(*names: str) -> list[Any]:
        return [json.loads(line) for name in names for line in (workspace / name).read_text().splitlines()]

    source, target = lines("train.jsonl"), lines("far.jsonl", "near.jsonl")
    texts = [source[row]["text"] for row in rows] + [target[row]["text"] for row in drawn]
    inputs = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(workspace / "model")
    outputs = model(**inputs, output_hidden_states=True)
    pooled = model.bert.pooler(outputs.hidden_states[-1])
    sides = pooled[:GLOBAL_BATCH], pooled[GLOBAL_BATCH:]
    labels = torch.tensor([source[row]["label"] for row in rows])
    probabilities = outputs.logits.softmax(-1)[GLOBAL_BATCH:]
    mask = inputs["attention_mask"][:, :, None].float()
    first = (outputs.hidden_states[1] * mask).sum(1) / mask.sum(1)
    second = (outputs.hidden_states[2] * mask).sum(1) / mask.sum(1)
    expected = {
        "mmd": reference_mmd.mmd(*sides, detach_bandwidth=False),
        "mmd_detached": reference_mmd.mmd(*sides),
        "mmd_unbiased": reference_mmd.mmd(
            first[:GLOBAL_BATCH], first[GLOBAL_BATCH:], estimator="unbiased", bandwidth=0.5, num_kernels=3
        ),
        "lmmd": reference_mmd.lmmd(*sides, labels, probabilities, detach_bandwidth=False),
        "jmmd": reference_mmd.jmmd(
            *(
                [side, outputs.logits.softmax(-1)[span], second[span], first[span]]
                for side, span in zip(sides, (slice(0, 16), slice(16, 32)), strict=True)
            ),
            bandwidth=[None, 0.92**2, None, None],
            detach_bandwidth=False,
        ),
        "jmmd_given": reference_mmd.jmmd(
            *((side, outputs.logits[span]) for side, span in zip(sides, (slice(0, 16), slice(16, 32)), strict=True)),
            bandwidth=[None, 2.0],
            detach_bandwidth=False,
        ),
        "coral": reference_mmd.coral(*sides),
        "entropy": -(probabilities * probabilities.log()).sum(-1).mean(),
    }
    for name, value in expected.items():
        losses = gradients[name, (1, 1), "whole"][1]
        assert losses[LOSSES[name]["kind"]] == pytest.approx(value.item(), rel=1e-5), name
        truth = torch.autograd.grad(value, list(model.parameters()), retain_graph=True, allow_unused=True)
        named = zip(dict(model.named_parameters()).items(), truth, strict=True)
        whole = {key: torch.zeros_like(p) if g is None else g for (key, p), g in named}
        found = gradients[name, (1, 1), "whole"][0]
        assert difference(whole, found).whole <= 1e-5, name


def test_dann_reverses_the_gradient_of_the_model_alone(workspace: Path, gradients: Found) -> None:
    found, losses = gradients["dann", (1, 1), "whole"]
    names = [name for name in found if name.startswith("discriminators.losses_1.")]
    assert len(names) == 4
    assert losses["dann"] == pytest.approx(functional.softplus(torch.zeros(())).item(), abs=0.2)  # it knows nothing yet
    assert any(found[name].abs().max() > 1e-4 for name in names)


# ---------------------------------------------------------------- whole runs

STOPS = (2, 5)
CONSTANT = [{"kind": "cross_entropy"}, LOSSES["mmd"], LOSSES["dann"], LOSSES["jmmd"] | {"accumulate": True}]
MIXED = [{"kind": "cross_entropy"}, LOSSES["mmd"], LOSSES["dann"] | {"schedule": "sigmoid"}, LOSSES["entropy"]]


@pytest.fixture(scope="module")
def trained(workspace: Path) -> dict[str, runs.Run]:
    """Of six steps on two epochs of the source, four passes over the target."""
    lines = [json.loads(line) for line in (workspace / "near.jsonl").read_text(encoding="utf-8").splitlines()]
    for name, keep in (("unlabelled", ("text",)), ("labelled", ("text", "score", "label"))):
        rows = [{key: row[key] for key in keep} for row in lines]
        rows = [row | ({"label": i % 2} if "label" in keep else {}) for i, row in enumerate(rows)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (workspace / f"{name}.jsonl").write_text(text, encoding="utf-8")
    dropout = {"model": {"model_name_or_path": str(workspace / "dropout")}}
    made = {
        f"zero{stage}": make_run(_recipe(workspace, f"run-{stage}", (2, 2), MIXED, deepspeed={"zero_stage": stage}), 2)
        for stage in (0, 1, 2, 3)
    }
    for name in ("labelled", "unlabelled"):
        target = {"near": {"train": {"path": str(workspace / f"{name}.jsonl")}}}
        values = _recipe(workspace, f"run-{name}", (1, 1), MIXED, **dropout)
        values["data"]["target"] = target
        made[name] = make_run(values, 1)
    for name, accumulate in (("one-pass", False), ("two-passes", True)):
        losses = [MIXED[0], *({"kind": kind, "accumulate": accumulate} for kind in ("mmd", "coral"))]
        made[name] = make_run(_recipe(workspace, f"run-{name}", (1, 1), losses, **dropout), 1)
    made |= _weighted_runs(workspace)
    made["zero2-sources"] = _run_of_two_sources(workspace)
    sizes = {name: 2 if name.startswith("zero") else 1 for name in made}
    jobs = {size: [Job(str(run.path)) for name, run in made.items() if sizes[name] == size] for size in (1, 2)}
    first, second = [], []
    for stop, name in ((6, "unbroken"), *((stop, f"broken-{stop}") for stop in STOPS)):
        settings = {"training": {"lr_scheduler_type": "constant"}, "evaluation": {"eval_steps": 1}}
        values = _recipe(workspace, name, (2, 2), CONSTANT, deepspeed={"zero_stage": 2}, **settings)
        made[name] = runs.Run(workspace / "runs" / name)
        short = {**values, "training": {**values["training"], "max_steps": stop}}
        first.append(Job(str(made[name].path), values=short))
        second += [Job(str(made[name].path), values=values)] if stop < 6 else []
    work_together([(1, jobs[1]), (2, [*jobs[2], *first]), (2, second)])
    return made


def _weighted_runs(workspace: Path) -> dict[str, runs.Run]:
    """One by `reweight`, and one by a column of the weights that this comes to."""
    losses = [{"kind": "cross_entropy"}, LOSSES["mmd"], LOSSES["dann"]]
    values = _recipe(workspace, "run-reweighted", (1, 1), losses, reweight={"method": "domain_classifier"})
    reweighted = make_run(values, 1)
    recipe = reweighted.recipe()
    weights = fitted(recipe, prepare(recipe, load_tokenizer(recipe)))
    assert weights.std() > 0.01
    rows = [json.loads(line) for line in (workspace / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = [json.dumps({**row, "weight": weight}) for row, weight in zip(rows, weights.tolist(), strict=True)]
    (workspace / "weighted.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    values = _recipe(workspace, "run-column", (1, 1), losses)
    values["data"] |= {"train": {"path": str(workspace / "weighted.jsonl")}, "weight_column": "weight"}
    return {"reweighted": reweighted, "column": make_run(values, 1)}


def _run_of_two_sources(workspace: Path) -> runs.Run:
    """The rows of `zero2`, cut in two and named."""
    source: dict[str, Any] = {"books": {}, "music": {}}
    for split, cut in (("train", 20), ("validation", 4)):
        lines = (workspace / f"{split}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        for name, part in (("books", lines[:cut]), ("music", lines[cut:])):
            path = workspace / f"{name}-{split}.jsonl"
            path.write_text("".join(part), encoding="utf-8")
            source[name][split] = {"path": str(path)}
    values = _recipe(workspace, "run-sources", (2, 2), MIXED, deepspeed={"zero_stage": 2})
    values["data"] |= {"source": source, "train": None, "validation": None}
    return make_run(values, 2)


def test_several_sources_are_learnt_from_as_their_rows_in_one(trained: dict[str, runs.Run]) -> None:
    """Bit for bit; and evaluated by name beside."""
    one, several = (exact_metrics(trained[name].path) for name in ("zero2", "zero2-sources"))
    by_name = {f"eval/{name}/" for name in ("books", "music")}
    plain = {
        step: {key: value for key, value in values.items() if not any(key.startswith(name) for name in by_name)}
        for step, values in several.items()
    }
    assert plain == one
    report = json.loads(trained["zero2-sources"].eval.read_text(encoding="utf-8"))["validation"]
    assert report["accuracy"] == pytest.approx((4 * report["books/accuracy"] + 5 * report["music/accuracy"]) / 9)


def test_reweighting_is_a_column_of_weights(trained: dict[str, runs.Run]) -> None:
    one, other = trained["reweighted"], trained["column"]
    assert exact_metrics(one.path) == exact_metrics(other.path)
    assert exact_metrics(one.path) != exact_metrics(trained["one-pass"].path)
    assert len(runs.read_jsonl(one.path / "source_weights.jsonl")) == ROWS


def _weights(run: runs.Run) -> dict[str, torch.Tensor]:
    return load_file(run.model / "model.safetensors")


def _numbers(steps: dict[int, dict[str, Any]]) -> dict[str, float]:
    return {f"{key} {step}": v for step, values in steps.items() for key, v in values.items() if isinstance(v, float)}


def test_a_targets_labels_are_never_read(trained: dict[str, runs.Run]) -> None:
    """Not even where they are right: the same text without any gives the same run, bit for bit."""
    one, other = trained["labelled"], trained["unlabelled"]
    assert exact_metrics(one.path) == exact_metrics(other.path)
    first, second = _weights(one), _weights(other)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_second_pass_draws_the_dropout_of_the_first(trained: dict[str, runs.Run]) -> None:
    one, other = (exact_metrics(trained[name].path) for name in ("one-pass", "two-passes"))
    assert _numbers(other) == pytest.approx(_numbers(one), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_stage_trains_alike(trained: dict[str, runs.Run], stage: int) -> None:
    one, other = (exact_metrics(trained[name].path) for name in ("zero0", f"zero{stage}"))
    assert _numbers(other) == pytest.approx(_numbers(one), rel=1e-4, abs=1e-6)


def test_each_domain_is_evaluated_by_its_name_and_the_model_has_no_discriminator(trained: dict[str, runs.Run]) -> None:
    from transformers import AutoModelForSequenceClassification

    run = trained["zero3"]
    report = json.loads(run.eval.read_text(encoding="utf-8"))
    # The same rows under both names.
    assert report["validation"]["near/accuracy"] == report["validation"]["accuracy"]
    last = max(exact_metrics(run.path).items())[1]
    assert last["eval/near/accuracy"] == last["eval/accuracy"]
    assert "far/accuracy" not in report["validation"]
    _, found = AutoModelForSequenceClassification.from_pretrained(run.model, output_loading_info=True)
    assert not any(found.values()), found


@pytest.mark.parametrize("stop", STOPS)
def test_a_run_that_goes_on_is_the_run_that_was_never_broken_off(trained: dict[str, runs.Run], stop: int) -> None:
    """Within an epoch and behind one: both sides' places follow, and so do the discriminator's weights and moments."""
    unbroken, broken = trained["unbroken"], trained[f"broken-{stop}"]
    assert exact_metrics(broken.path)[6] == exact_metrics(unbroken.path)[6]
    first, second = _weights(unbroken), _weights(broken)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_shift_of_each_target_is_told_before_and_after(trained: dict[str, runs.Run]) -> None:
    """By any number of ranks and any stage, of the pretrained weights and of those that are kept; and drawn."""
    first, last = (load_file(trained["zero0"].path / "shift" / f"{when}.safetensors") for when in ("before", "after"))
    assert {name: len(rows) for name, rows in first.items()} == {
        "train": ROWS,
        "target.near.train": 15,
        "target.far.train": TARGETS - 15,
    }
    for name in ("zero1", "zero2", "zero3", "unbroken", "broken-2"):
        other = load_file(trained[name].path / "shift" / "before.safetensors")
        assert all(torch.allclose(rows, other[side], atol=1e-5) for side, rows in first.items()), name
    assert all(not torch.allclose(rows, last[name], atol=1e-3) for name, rows in first.items())
    for name in ("zero0", "zero3", "broken-5"):
        report = json.loads(trained[name].eval.read_text(encoding="utf-8"))
        assert {key: set(moments) for key, moments in report["shift"].items()} == {
            "near": {"before", "after"},
            "far": {"before", "after"},
        }
        assert (trained[name].path / "shift" / "shift.png").exists()


def test_the_features_before_training_are_the_pretrained_encoders(
    workspace: Path, trained: dict[str, runs.Run]
) -> None:
    recipe = trained["zero3"].recipe()
    split = prepare(recipe, load_tokenizer(recipe)).splits["target.far.train"]
    truth = split_features(load_encoder(recipe.model, recipe.data.max_length), split)
    found = load_file(trained["zero3"].path / "shift" / "before.safetensors")
    assert torch.allclose(found["target.far.train"], truth, atol=1e-5)
