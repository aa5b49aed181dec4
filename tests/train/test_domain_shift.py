"""Source and target in the model's own features, before and after: what is drawn, and what the report says of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import recipe_values

from fleetune import runs
from fleetune.recipe import parse_recipe
from fleetune.schema import Recipe
from fleetune.train import signals
from fleetune.train.alignment import Asked, Outputs
from fleetune.train.data import Prepared, Split
from fleetune.train.distributed import World
from fleetune.train.domain_shift import measure, only, report, samples, store


def make_recipe(tmp_path: Path, **evaluation: Any) -> Recipe:
    import yaml

    target = {name: {"train": {"path": str(tmp_path / f"{name}.jsonl")}} for name in ("near", "far")}
    values = recipe_values(tmp_path, "run", data={"target": target}, evaluation=evaluation)
    return parse_recipe(yaml.safe_dump(values), "test")


def make_split(rows: int) -> Split:
    lengths = np.arange(1, rows + 1)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Split(np.arange(offsets[-1], dtype=np.int32), offsets, None, None, None, 100 + np.arange(rows), None)


def make_data(**rows: int) -> Prepared:
    names = {"train": "train", "near": "target.near.train", "far": "target.far.train"}
    return Prepared({names[name]: make_split(count) for name, count in rows.items()}, [], {})


def test_a_part_of_a_split_has_its_rows() -> None:
    whole = make_split(6)
    part = only(whole, np.array([1, 4]))
    assert part.lengths.tolist() == [2, 5]
    assert part.input_ids.tolist() == [1, 2, 10, 11, 12, 13, 14]
    assert part.index.tolist() == [101, 104]


def test_so_many_rows_of_each_side_as_the_recipe_says_and_always_the_same(tmp_path: Path) -> None:
    recipe, data = make_recipe(tmp_path, shift_rows=5), make_data(train=40, near=30, far=3)
    found, again = samples(recipe, data), samples(recipe, data)
    assert {name: len(split) for name, split in found.items()} == {
        "train": 5,
        "target.near.train": 5,
        "target.far.train": 3,
    }
    assert all(np.array_equal(found[name].index, again[name].index) for name in found)
    assert len(set(found["train"].index.tolist())) == 5


def test_what_cannot_be_compared_is_left_out(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    assert set(samples(recipe, make_data(train=9, near=9, far=1))) == {"train", "target.near.train"}
    assert samples(recipe, make_data(train=9, near=1, far=1)) == {}
    assert samples(make_recipe(tmp_path, shift_rows=None), make_data(train=9, near=9, far=9)) == {}


def make_setup(tmp_path: Path, **config: Any) -> Any:
    """As much of a run as is needed, with a model whose every state is its token's number."""

    def forward(inputs: dict[str, torch.Tensor], compute: Any, asked: Asked) -> torch.Tensor:
        states = inputs["input_ids"][:, :, None].float()
        return compute(Outputs(torch.zeros(0), (-states, states) if asked.hidden_states else ()))  # type: ignore[no-any-return]

    return SimpleNamespace(
        engine=SimpleNamespace(module=SimpleNamespace(config=SimpleNamespace(**config))),
        recipe=make_recipe(tmp_path),
        data=make_data(train=4, near=3, far=2),
        batch=SimpleNamespace(micro_batch_size=2),
        padding_id=0,
        world=World(0, 1, 0, torch.device("cpu")),
        forward=forward,
    )


def test_features_are_the_mean_over_a_texts_tokens_of_the_last_layer(tmp_path: Path) -> None:
    found = measure(make_setup(tmp_path))
    assert {name: rows.tolist() for name, rows in found.items()} == {
        "train": [[0.0], [1.5], [4.0], [7.5]],  # of the tokens 0; 1, 2; 3, 4, 5; 6, 7, 8, 9
        "target.near.train": [[0.0], [1.5], [4.0]],
        "target.far.train": [[0.0], [1.5]],
    }


def test_a_stop_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "stop_requested", lambda: True)
    with pytest.raises(signals.Stopped):
        measure(make_setup(tmp_path))


def test_a_model_without_one_last_layer_has_no_features(tmp_path: Path) -> None:
    assert measure(make_setup(tmp_path, is_encoder_decoder=True)) == {}


@pytest.fixture
def run(tmp_path: Path) -> runs.Run:
    (tmp_path / "run").mkdir()
    return runs.Run(tmp_path / "run")


def features(shift: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    train, near, far = (torch.randn(rows, 4, generator=generator) for rows in (60, 50, 40))
    return {"train": train, "target.near.train": near, "target.far.train": far + shift}


def test_the_report_tells_for_each_target_how_far_it_was_and_is(tmp_path: Path, run: runs.Run) -> None:
    recipe = make_recipe(tmp_path)
    store(run, "before", features(3.0))
    found = report(run, recipe, features(0.0))
    assert set(found) == {"near", "far"}
    assert found["far"]["before"]["rows"] == [60, 40]
    assert found["far"]["before"]["mmd"] > 0.3 > 0.05 > abs(found["far"]["after"]["mmd"])
    assert found["far"]["before"]["p_value"] == pytest.approx(1 / 1001)
    assert found["far"]["after"]["p_value"] > 0.05
    assert found["near"]["before"]["mmd"] == found["near"]["after"]["mmd"]
    assert (run.path / "shift" / "shift.png").read_bytes().startswith(b"\x89PNG")
    assert report(run, recipe, features(0.0)) == found


def test_without_its_beginning_the_report_tells_the_end_alone(tmp_path: Path, run: runs.Run) -> None:
    found = report(run, make_recipe(tmp_path), features(3.0))
    assert set(found["far"]) == {"after"}


def test_where_nothing_was_compared_nothing_is_written(tmp_path: Path, run: runs.Run) -> None:
    store(run, "before", {})
    assert report(run, make_recipe(tmp_path), {}) == {}
    assert list(run.path.iterdir()) == []
