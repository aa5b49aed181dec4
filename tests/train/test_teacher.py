"""A teacher: whose labels and tokens are the student's, in which order its logits come, and how it is held."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import recipe_values, write_language_model, write_model

from fleetune.batch import Batch
from fleetune.schema import Recipe, RecipeError, teachers_of
from fleetune.train import head
from fleetune.train.batches import MicroBatch
from fleetune.train.data import Prepared
from fleetune.train.distributed import World
from fleetune.train.model import ModelError, load_tokenizer
from fleetune.train.teacher import (
    LoadedTeacher,
    check_teacher,
    is_broken,
    label_columns,
    labels_by_number,
    load_teacher_config,
    load_teachers,
    weights_digest,
)

NAMES = ["negative", "positive"]
DATA = Prepared({}, NAMES, {"highest_token": 2919})
ONE = Batch(4, 1, 1, 4)
ALONE = World(0, 1, 0, torch.device("cpu"))
IDS = torch.tensor([[101, 2204, 102], [101, 2919, 102]])
ROWS = MicroBatch(
    {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, torch.zeros(2), torch.ones(2), np.arange(2), 6, 2
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, and a teacher with a classifier of its own."""
    from transformers import AutoModelForSequenceClassification

    path = tmp_path_factory.mktemp("teachers")
    write_model(path / "model")
    write_model(path / "teacher", seed=1)
    classifier = AutoModelForSequenceClassification.from_pretrained(path / "teacher")
    classifier.save_pretrained(path / "teacher")
    return path


def recipe(folder: Path, **teacher: Any) -> Recipe:
    given = {"model_name_or_path": str(folder / "teacher"), **teacher}
    return Recipe.model_validate(recipe_values(folder, "tiny", losses=[{"kind": "distillation"}], teacher=given))


def with_names(folder: Path, names: list[str]) -> Any:
    found = recipe(folder)
    config = load_teacher_config(found, teachers_of(found)[0][1], "teacher", load_tokenizer(found))
    config.id2label = dict(enumerate(names))
    return found, config


def loaded(folder: Path, **teacher: Any) -> LoadedTeacher:
    (found,) = load_teachers(recipe(folder, **teacher), NAMES, load_tokenizer(recipe(folder)), ONE, ALONE)
    return found


# ---------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("names", "columns"),
    [(NAMES, [0, 1]), (["POSITIVE", "Negative"], [1, 0]), (["LABEL_0", "LABEL_1"], [0, 1])],
    ids=["same", "another-order-and-case", "none-of-its-own"],
)
def test_a_label_is_found_by_its_name(folder: Path, names: list[str], columns: list[int]) -> None:
    found, config = with_names(folder, names)
    assert label_columns(found, config, NAMES, "teacher") == columns


def test_labels_that_have_no_names_are_taken_by_number_and_that_is_said(folder: Path) -> None:
    found, unnamed = with_names(folder, ["LABEL_0", "LABEL_1"])
    assert labels_by_number(found, unnamed, NAMES)
    assert not labels_by_number(found, unnamed, ["0", "1"])  # which have none either
    assert not labels_by_number(*with_names(folder, NAMES), NAMES)


@pytest.mark.parametrize(
    "names", [["bad", "good"], ["negative", "neutral", "positive"], ["LABEL_0", "LABEL_1", "LABEL_2"]]
)
def test_other_labels_are_refused_and_both_are_named(folder: Path, names: list[str]) -> None:
    found, config = with_names(folder, names)
    with pytest.raises(ModelError, match=f"teacher.model_name_or_path: .*{names[0]}.*negative, positive"):
        label_columns(found, config, NAMES, "teacher")


def test_logits_come_in_the_order_of_the_datas_labels(folder: Path, tmp_path: Path) -> None:
    turned = write_model(tmp_path / "teacher")
    plain = loaded(folder)
    plain.module.save_pretrained(turned)  # type: ignore[operator]
    config = json.loads((turned / "config.json").read_text(encoding="utf-8"))
    config |= {"id2label": {"0": "positive", "1": "negative"}, "label2id": {"positive": 0, "negative": 1}}
    (turned / "config.json").write_text(json.dumps(config), encoding="utf-8")
    other = loaded(folder, model_name_or_path=str(turned))
    torch.testing.assert_close(other(ROWS).logits, plain(ROWS).logits.flip(-1))


# ---------------------------------------------------------------- tokens


def test_the_students_own_tokenizer_is_known_from_any_folder(folder: Path) -> None:
    found, config = with_names(folder, NAMES)
    check_teacher(found, teachers_of(found)[0][1], "teacher", config, load_tokenizer(found), DATA)


def changed(folder: Path, file: str, key: str, old: str, new: str) -> Path:
    path = write_model(folder) / file
    values = json.loads(path.read_text(encoding="utf-8"))
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
    assert f"{key}{old}" in text
    path.write_text(text.replace(f"{key}{old}", f"{key}{new}"), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("tokenizer.json", ",", '"good":', '"goood":'), r"the student's token 2204, 'good', is none there"),
        (("tokenizer_config.json", '"do_lower_case":', "true", "false"), "not how text is cut into them"),
    ],
)
def test_another_tokenizer_is_refused_with_what_differs(
    folder: Path, tmp_path: Path, change: tuple[str, str, str, str], said: str
) -> None:
    found = recipe(folder, model_name_or_path=str(changed(tmp_path / "teacher", *change)))
    key, teacher = teachers_of(found)[0]
    config = load_teacher_config(found, teacher, key, load_tokenizer(found))
    config.architectures = ["BertForSequenceClassification"]
    with pytest.raises(ModelError, match=f"its tokenizer is not the student's: .*{said}"):
        check_teacher(found, teacher, key, config, load_tokenizer(found), DATA)


@pytest.mark.parametrize(
    ("config", "sections", "said"),
    [
        ({"architectures": ["BertModel"]}, {}, r"teacher\.model_name_or_path = .*: is no classifier \(BertModel\)"),
        ({"architectures": ["BertModel"]}, {"losses": [{"kind": "embedding"}]}, None),
        (
            {"max_position_embeddings": 16},
            {},
            r"data\.max_length = 32: the teacher \(teacher\) takes at most 16 tokens",
        ),
    ],
)
def test_what_its_config_cannot_do_is_said_before_it_is_loaded(
    folder: Path, config: dict[str, Any], sections: dict[str, Any], said: str | None
) -> None:
    values = recipe(folder).model_dump(mode="json") | sections
    found = Recipe.model_validate(values)
    key, teacher = teachers_of(found)[0]
    tokenizer = load_tokenizer(found)
    its = load_teacher_config(found, teacher, key, tokenizer)
    for name, value in config.items():
        setattr(its, name, value)
    refused = contextlib.nullcontext() if said is None else pytest.raises(ModelError, match=said)
    with refused:
        check_teacher(found, teacher, key, its, tokenizer, DATA)


def test_a_teacher_that_was_trained_again_is_another(folder: Path, tmp_path: Path) -> None:
    def digest(path: Path) -> str:
        found = recipe(folder, model_name_or_path=str(path))
        key, teacher = teachers_of(found)[0]
        return weights_digest(teacher, load_teacher_config(found, teacher, key, load_tokenizer(found)))

    again = write_model(tmp_path / "again", seed=5)
    loaded(folder).module.save_pretrained(tmp_path / "copy")  # type: ignore[operator]
    assert digest(tmp_path / "copy") == digest(folder / "teacher") != digest(again)


# ---------------------------------------------------------------- how it is held


def test_it_is_frozen_without_dropout_in_its_own_dtype(folder: Path) -> None:
    teacher = loaded(folder, dtype="bfloat16")
    assert {p.dtype for p in teacher.module.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in teacher.module.parameters())
    assert not any(module.training for module in teacher.module.modules())
    assert not teacher(ROWS).logits.requires_grad


def test_inputs_that_it_does_not_know_are_not_given_to_it(folder: Path) -> None:
    teacher = loaded(folder)
    more = dataclasses.replace(ROWS, inputs={**ROWS.inputs, "unknown": torch.zeros(1)})
    torch.testing.assert_close(teacher(more).logits, teacher(ROWS).logits)


def test_a_teacher_that_says_what_is_no_number_is_known(folder: Path) -> None:
    teacher, padded = loaded(folder), dataclasses.replace(ROWS, examples=1)
    assert not is_broken(teacher, [ROWS])
    with torch.no_grad():
        teacher.module.get_input_embeddings().weight[2919] = torch.inf  # type: ignore[operator]
    assert is_broken(teacher, [padded, ROWS])
    assert not is_broken(teacher, [padded])  # the second row only fills it up


def test_shares_of_several_teachers_are_of_one(folder: Path) -> None:
    one = {"model_name_or_path": str(folder / "teacher")}
    values = recipe_values(folder, "tiny", losses=[{"kind": "distillation"}], teachers=[{**one, "weight": 3.0}, one])
    found = Recipe.model_validate(values)
    assert [t.weight for t in load_teachers(found, NAMES, load_tokenizer(found), ONE, ALONE)] == [0.75, 0.25]


def test_a_run_of_fleetune_is_its_model_and_one_without_is_refused(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match=r"teacher\.model_name_or_path = .*: is a run that has not written its model"):
        loaded(folder, model_name_or_path=str(run))
    (run / "model").symlink_to(folder / "teacher")
    torch.testing.assert_close(loaded(folder, model_name_or_path=str(run))(ROWS).logits, loaded(folder)(ROWS).logits)


# ---------------------------------------------------------------- of language models


def taught_by(folder: Path, *names: str, **loss: Any) -> Recipe:
    """Granites, which divide their logits, each by a number of its own."""
    for name, scaling in (("one", 2.0), ("other", 4.0)):
        write_language_model(folder / name, family="granite", logits_scaling=scaling)
    return Recipe.model_validate(
        {
            "name": "tiny",
            "task": "causal_lm",
            "model": {"model_name_or_path": str(folder / "one")},
            "data": {"train": {"path": "none"}},
            "losses": [{"kind": "distillation", **loss}],
            "teachers": [{"model_name_or_path": str(folder / name)} for name in names],
        }
    )


def test_teachers_whose_families_scale_logits_differently_cannot_mix_their_targets(tmp_path: Path) -> None:
    mixed = taught_by(tmp_path, "one", "other")
    with pytest.raises(ModelError, match=r"^teachers: .* combine: losses, or kernels: reference$"):
        load_teachers(mixed, [], load_tokenizer(mixed), ONE, ALONE)
    for allowed in (
        taught_by(tmp_path, "one", "one"),
        taught_by(tmp_path, "one", "other", combine="losses"),
        mixed.model_copy(update={"kernels": "reference"}),
    ):
        assert len(load_teachers(allowed, [], load_tokenizer(allowed), ONE, ALONE)) == 2


def test_a_teacher_whose_logits_are_made_in_a_way_of_its_own_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "logit_terms", lambda config: (1.0, None))  # as of a family that is not known
    found = taught_by(tmp_path, "one")
    with pytest.raises(RecipeError, match="a granite model makes its logits in a way of its own"):
        load_teachers(found, [], load_tokenizer(found), ONE, ALONE)
