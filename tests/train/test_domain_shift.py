"""Source and target in the model's own features, before and after: what is drawn, and what the report says of it."""

from __future__ import annotations

import math
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
from fleetune.train import domain_shift, signals
from fleetune.train.alignment import Asked, Outputs
from fleetune.train.data import Prepared, Split
from fleetune.train.distributed import World
from fleetune.train.domain_shift import measure, only, report, samples, store
from fleetune.train.loop import defined
from fleetune.train.shift import two_sample


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


def test_rows_that_are_not_finite_are_left_out_and_counted(
    tmp_path: Path, run: runs.Run, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, broken = make_recipe(tmp_path), features(0.0)
    broken["train"][3, 1] = torch.inf
    broken["target.near.train"][:2] = torch.nan
    broken["target.far.train"][1:] = torch.nan
    store(run, "before", features(0.0))
    found = report(run, recipe, broken)
    assert {name: set(moments) for name, moments in found.items()} == {"near": {"before", "after"}, "far": {"before"}}
    assert found["near"]["after"]["rows"] == [59, 48]
    kept = torch.tensor([row for row in range(60) if row != 3])
    whole = features(0.0)
    alone = two_sample(whole["train"][kept], whole["target.near.train"][2:], 1, 0)
    assert found["near"]["after"]["mmd"] == alone.mmd
    assert [line.partition(" have ")[0] for line in capsys.readouterr().out.splitlines()] == [
        "shift  after training: 1 of the 60 rows of source",
        "shift  after training: 2 of the 50 rows of near",
        "shift  after training: 39 of the 40 rows of far",
    ]
    assert (run.path / "shift" / "shift.png").exists()


def test_where_no_row_is_finite_there_is_nothing_to_report(tmp_path: Path, run: runs.Run) -> None:
    broken = {name: torch.full_like(rows, torch.nan) for name, rows in features(0.0).items()}
    assert report(run, make_recipe(tmp_path), broken) == {}
    assert not (run.path / "shift" / "shift.png").exists()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_features_too_large_for_the_figures_have_none(tmp_path: Path, run: runs.Run) -> None:
    large = {name: rows * 1e30 for name, rows in features(0.0).items()}
    after = report(run, make_recipe(tmp_path), large)["near"]["after"]
    assert math.isnan(after["mmd"])
    assert math.isnan(after["p_value"])
    assert defined(after) == {"mmd": None, "p_value": None, "rows": [60, 50]}


def test_what_cannot_be_drawn_is_said_and_the_figures_stay(
    tmp_path: Path, run: runs.Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def draw(file: Path, panels: Any) -> None:
        file.write_bytes(b"half")
        raise RuntimeError("no font")

    monkeypatch.setattr(domain_shift, "draw_features", draw)
    assert set(report(run, make_recipe(tmp_path), features(0.0))) == {"near", "far"}
    assert "the picture could not be drawn: RuntimeError: no font" in capsys.readouterr().out
    assert [path.name for path in (run.path / "shift").iterdir()] == ["after.safetensors"]


def test_a_beginning_that_cannot_be_read_is_told_and_left_out(
    tmp_path: Path, run: runs.Run, capsys: pytest.CaptureFixture[str]
) -> None:
    store(run, "before", features(0.0))
    (run.path / "shift" / "before.safetensors").write_bytes(b"")
    assert set(report(run, make_recipe(tmp_path), features(0.0))["far"]) == {"after"}
    assert "the features of before training cannot be read" in capsys.readouterr().out
