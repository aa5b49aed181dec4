"""What a language model's teacher says, stored by token: as the teacher itself where all classes are, unbiased where
they are drawn, in its place in every pack; refused where it does not belong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import Job, make_run, work_together
from safetensors.torch import load_file
from taught import teach_on_two_ranks
from tiny import recipe_values, write_language_model, write_prompts

from fleetune.batch import Batch
from fleetune.recipe import dump_recipe
from fleetune.schema import Recipe, RecipeError
from fleetune.train import teach as teach_module
from fleetune.train.batches import collate_tokens
from fleetune.train.data import prepare
from fleetune.train.distributed import World
from fleetune.train.metrics_log import read_metrics
from fleetune.train.model import load_tokenizer
from fleetune.train.prepare import prepare_recipe
from fleetune.train.teach import begin, end, write
from fleetune.train.teacher import load_teachers
from fleetune.train.teacher_cache import open_cache

ROWS, TEMPERATURE = 37, 2.0
ALONE = World(0, 1, 0, torch.device("cpu"))


def teach(recipe: Recipe, folder: Path, **chosen: int) -> None:
    begin(recipe, folder, **chosen)
    assert write(recipe, folder, ALONE)
    end(folder)


def recipe(folder: Path, name: str = "tokens", teacher: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    given = {"model_name_or_path": str(folder / "teacher")} if teacher is None else teacher
    losses = [{"kind": "cross_entropy"}, {"kind": "distillation", "temperature": TEMPERATURE}]
    values = recipe_values(folder, name, **{"losses": losses, "teacher": given, **sections})
    return Recipe.model_validate({**values, "task": "causal_lm"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All classes of each token, four of them, and 200 draws; in three parts each."""
    folder = tmp_path_factory.mktemp("tokens")
    write_language_model(folder / "model")
    write_language_model(folder / "teacher", seed=1, hidden_size=48, head_dim=12, initializer_range=0.3)
    write_prompts(folder / "train.jsonl", ROWS)
    write_prompts(folder / "validation.jsonl", 8, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teach_module, "PART", 16)
        teach(recipe(folder), folder / "all", top_k=10**6)
        teach(recipe(folder), folder / "four", top_k=4)
        teach(recipe(folder), folder / "drawn", samples=200)
    return folder


def cached(folder: Path, name: str, tail: str = "zero") -> Any:
    return open_cache(recipe(folder, teacher={"cache": str(folder / name), "tail": tail}).teacher, 1.0)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def batch(folder: Path) -> Any:
    """Two packs of several rows, out of order."""
    found = recipe(folder)
    tokenizer = load_tokenizer(found)
    split = prepare(found, tokenizer).splits["train"]
    return collate_tokens(split, [np.array([30, 2, 17]), np.array([5])], 0, packed=True)


@pytest.fixture(scope="module")
def truth(folder: Path, batch: Any) -> torch.Tensor:
    """The living teacher's log-probabilities of the tokens that are learnt."""
    found = recipe(folder)
    tokenizer = load_tokenizer(found)
    (live,) = load_teachers(found, [], tokenizer, Batch(4, 1, 1, 4), ALONE)
    logits = live(batch).head.logits().flatten(0, 1)[batch.supervised]  # type: ignore[union-attr]
    return torch.log_softmax(logits / TEMPERATURE, -1)


def test_every_token_of_a_pack_has_its_own_classes(folder: Path, batch: Any, truth: torch.Tensor) -> None:
    stored = cached(folder, "four")(batch).stored
    top = truth.topk(4)
    assert torch.equal(stored.ids, top.indices.sort(-1).values)
    torch.testing.assert_close(stored.log_probs, truth.gather(1, stored.ids), rtol=0, atol=1.1e-3)
    assert stored.weights is None
    assert stored.tail == "zero"
    assert cached(folder, "four", "uniform")(batch).stored.tail == "uniform"


def test_draws_are_the_teachers_own_and_each_class_stands_once(folder: Path, batch: Any, truth: torch.Tensor) -> None:
    stored = cached(folder, "drawn")(batch).stored
    assert stored.tail == "sampled"
    filled = stored.log_probs > -torch.inf
    assert torch.equal(filled, stored.weights > 0)
    torch.testing.assert_close(stored.weights.sum(1), torch.ones(len(truth)))
    share = torch.zeros_like(truth).scatter_add_(1, stored.ids, stored.weights)
    assert all(len(set(ids[kept].tolist())) == int(kept.sum()) for ids, kept in zip(stored.ids, filled, strict=True))
    # The mean over R draws of 200 is off by sqrt(p (1 - p) / 200) or so; over all classes together by much less.
    assert float((share - truth.exp()).abs().max()) < 5 * (0.25 / 200) ** 0.5
    assert float((share - truth.exp()).mean().abs()) < 1e-6


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[str, Any]:
    """Gradients and runs with the teacher and without, on 1 rank and on 2 with ZeRO-3; one half empty."""
    kinds: dict[str, dict[str, Any]] = {
        "live": {"model_name_or_path": str(folder / "teacher")},
        **{name: {"cache": str(folder / name)} for name in ("all", "four", "drawn")},
    }
    jobs: dict[str, Job] = {}
    for name, teacher in kinds.items():
        plain = recipe(folder, f"gradient-{name}", teacher, training={"global_batch_size": 32}, data={"packing": True})
        run = make_run(plain.model_dump(mode="json"), 1)
        jobs[name] = Job(str(run.path), str(run.path / "gradient.safetensors"))
    for name in ("live", "all"):
        sections = {"deepspeed": {"zero_stage": 3}, "training": {"max_steps": 3, "global_batch_size": 6}}
        run = make_run(recipe(folder, f"run-{name}", kinds[name], **sections).model_dump(mode="json"), 2)
        jobs[f"run-{name}"] = Job(str(run.path))
    soft = [{"kind": "distillation", "temperature": TEMPERATURE}]
    short = {"max_steps": 8, "global_batch_size": 6, "per_device_train_batch_size": 3}
    sections = {"deepspeed": {"zero_stage": 2}, "training": short, "losses": soft}
    run = make_run(recipe(folder, "run-short", kinds["four"], **sections).model_dump(mode="json"), 2)
    jobs["run-short"] = Job(str(run.path))
    alone, both = ([job for name, job in jobs.items() if name.startswith("run-") is two] for two in (False, True))
    work_together([(1, alone), (2, both)])
    gradients = {name: load_file(str(job.gradient)) for name, job in jobs.items() if job.gradient}
    return gradients | {
        name: read_metrics(Path(job.folder) / "metrics.jsonl") for name, job in jobs.items() if not job.gradient
    }


def off(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """Of the whole gradient, to its norm."""
    square = sum(float((found[name] - tensor).square().sum()) for name, tensor in truth.items())
    return float((square / sum(float(tensor.square().sum()) for tensor in truth.values())) ** 0.5)


def test_with_all_classes_the_gradient_is_the_living_teachers(trained: dict[str, Any]) -> None:
    errors = {name: off(trained[name], trained["live"]) for name in ("all", "four", "drawn")}
    print(errors)
    assert errors["all"] < 2e-3  # how finely log-probabilities are stored
    assert errors["all"] < errors["drawn"] < errors["four"] < 1.5


def test_a_run_with_it_goes_as_with_the_teacher_under_zero_3(trained: dict[str, Any]) -> None:
    for one, other in zip(trained["run-all"], trained["run-live"], strict=True):
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=1e-3)
        assert one["data/order"] == other["data/order"]


def test_a_rank_without_tokens_goes_along(trained: dict[str, Any]) -> None:
    """37 rows in batches of 6: the seventh has one, and the second rank nothing; no other loss reaches its head."""
    assert [line["step"] for line in trained["run-short"]] == list(range(1, 9))
    assert all(line["train/loss"] > 0 for line in trained["run-short"])


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"losses": [{"kind": "distillation", "temperature": 3.0}]},
            "is of temperature 2.0, and losses.0.temperature is 3.0",
        ),
        ({"data": {"max_length": 7}}, "is of other data"),
        ({"model": {"model_name_or_path": "small"}}, "is of other tokens"),
    ],
)
def test_one_that_does_not_belong_is_refused(folder: Path, sections: dict[str, Any], message: str) -> None:
    if sections.get("model"):
        (folder / "small").mkdir(exist_ok=True)
        small = write_language_model(folder / "small")
        text = (small / "tokenizer.json").read_text(encoding="utf-8").replace('"film"', '"movie"')
        (small / "tokenizer.json").write_text(text, encoding="utf-8")
        sections = {"model": {"model_name_or_path": str(small)}}
    found = recipe(folder, teacher={"cache": str(folder / "four")}, **sections)
    with pytest.raises(RecipeError, match=message):
        prepare_recipe(found)


def test_a_teacher_that_is_cut_over_the_ranks_says_the_same(folder: Path, tmp_path: Path, batch: Any) -> None:
    teacher = {"model_name_or_path": str(folder / "teacher"), "deepspeed": {"zero_stage": 3}}
    teach_on_two_ranks(recipe(folder, teacher=teacher), tmp_path, rows_of_a_part=16, top_k=4)
    whole, cut = cached(folder, "four")(batch).stored, cached(tmp_path, "taught")(batch).stored
    assert torch.equal(cut.ids, whole.ids)
    torch.testing.assert_close(cut.log_probs, whole.log_probs, rtol=0, atol=1.1e-3)  # a code's width


def test_what_was_broken_off_goes_on_and_gives_the_same_parts(folder: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teach_module, "PART", 16)
        teach(recipe(folder), tmp_path / "again", samples=200)
        whole = {path.name: path.read_bytes() for path in (folder / "drawn").iterdir()}
        assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == whole
        (tmp_path / "again" / "part-00001.arrow").unlink()
        with pytest.raises(RecipeError, match=r"part-00001.arrow is damaged or gone"):
            prepare_recipe(recipe(folder, teacher={"cache": str(tmp_path / "again")}))
        teach(recipe(folder), tmp_path / "again", samples=200)
        assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == whole
        with pytest.raises(RecipeError, match=r"is a cache of kind samples, count 200, temperature 2\.0, vocabulary"):
            teach(recipe(folder), tmp_path / "again", top_k=4)
    assert "cache" in dump_recipe(recipe(folder, teacher={"cache": str(folder / "four")}))
