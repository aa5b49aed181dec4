"""A model that is changed under ZeRO-3 on two ranks is the one that is changed on one rank without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import Job, make_run, work_together
from tiny import recipe_values, write_model, write_rows

from fleetune import runs
from fleetune.train.metrics_log import read_metrics

CHANGES: dict[str, dict[str, Any]] = {
    "layers": {"keep_layers": [0, 3], "insert_layers": [{"at": 0, "copy_of": 2}, {"at": 2}, {"at": 4, "copy_of": 3}]},
    "values": {
        "drop_layers": [1],
        "reset": ["*.layer.2.*", "*.pooler.*", "classifier.*"],
        "resize_embeddings": 30592,
        "freeze": ["*.layer.0.*"],
    },
    "other-head": {"model_name_or_path": "finished", "drop_layers": [3]},
    "from-scratch": {"from_scratch": True, "keep_layers": {"every": 2}},
}
LAYOUTS = {"zero-0-1": (0, 1), "zero-3-1": (3, 1), "zero-3-2": (3, 2)}


def write_finished(folder: Path) -> None:
    """A classifier of five classes."""
    from transformers import AutoConfig, AutoTokenizer, BertForSequenceClassification

    BertForSequenceClassification(AutoConfig.from_pretrained(folder / "model", num_labels=5)).save_pretrained(
        folder / "finished"
    )
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(folder / "finished")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], runs.Run]:
    """By change and layout."""
    folder = tmp_path_factory.mktemp("surgery")
    write_model(folder / "model", num_hidden_layers=4)
    write_finished(folder)
    write_rows(folder / "train.jsonl", 43)
    write_rows(folder / "validation.jsonl", 21, seed=1)
    made: dict[tuple[str, str], runs.Run] = {}
    for change, keys in CHANGES.items():
        model = {**keys, "model_name_or_path": str(folder / keys.get("model_name_or_path", "model"))}
        for layout, (stage, world_size) in LAYOUTS.items():
            # A large epsilon: with a small one Adam makes whole steps of gradients that are 0 but for their rounding.
            values = recipe_values(
                folder,
                f"{change}-{layout}",
                model=model,
                deepspeed={"zero_stage": stage},
                training={"max_steps": 4, "adam_epsilon": 1e-4},
            )
            made[change, layout] = make_run(values, world_size)
    groups = {size: [Job(str(made[c, n].path)) for c, n in made if LAYOUTS[n][1] == size] for size in (1, 2)}
    work_together(list(groups.items()))
    return made


def truth_of(change: str) -> str:
    """Transformers draws a whole model in another order on ZeRO-3, surgery or not."""
    return "zero-3-1" if change == "from-scratch" else "zero-0-1"


@pytest.mark.parametrize("layout", ["zero-3-1", "zero-3-2"])
@pytest.mark.parametrize("change", CHANGES)
def test_losses_are_those_of_one_rank_without_zero(
    change: str, layout: str, trained: dict[tuple[str, str], runs.Run]
) -> None:
    truth, found = (read_metrics(trained[change, name].metrics) for name in (truth_of(change), layout))
    assert [step["step"] for step in found] == [1, 2, 3, 4]
    for expected, step in zip(truth, found, strict=True):
        for key in ("train/loss", "train/grad_norm"):
            assert step[key] == pytest.approx(expected[key], rel=1e-4), (expected["step"], key)
    assert found[-1]["eval/loss"] == pytest.approx(truth[-1]["eval/loss"], rel=1e-4)


@pytest.mark.parametrize("change", CHANGES)
def test_the_model_that_is_left_is_the_changed_one(change: str, trained: dict[tuple[str, str], runs.Run]) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    models = []
    for layout in (truth_of(change), "zero-3-2"):
        model, report = AutoModelForSequenceClassification.from_pretrained(
            trained[change, layout].model, output_loading_info=True
        )
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        models.append(model)
    one, other = (model.state_dict() for model in models)
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=2e-4, msg=name)
