"""Keys that are right each by itself and cannot stand together. Nothing here imports torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fleetune.data_section import Data
from fleetune.losses import OF_A_TEACHER, OF_DOMAINS, CrossEntropy, Distillation, Jmmd, Mmd, layers_of
from fleetune.model_section import Model
from fleetune.schema import (
    DATA_SUFFIXES,
    METRICS,
    Recipe,
    has_validation,
    has_weights,
    losses_of,
    metrics_of,
    sources_of,
    teachers_of,
)


def combinations(recipe: Recipe) -> Iterator[tuple[str, Any, str]]:
    """Each impossible combination as (key path, value, what would be right)."""
    classification = recipe.task == "classification"
    if recipe.task == "regression" and recipe.model.num_labels not in (None, 1):
        yield "model.num_labels", recipe.model.num_labels, "regression has one output: 1, or leave it out"
    if classification and recipe.model.num_labels == 1:
        yield "model.num_labels", 1, "classification needs at least 2 classes; `task: regression` has one output"
    names = recipe.model.label_names
    if names is not None and len(set(names)) != len(names):
        yield "model.label_names", names, "a name stands there twice"
    if names is not None and recipe.model.num_labels not in (None, len(names)):
        yield "model.label_names", names, f"should be {recipe.model.num_labels} names, as model.num_labels says"
    yield from _language_combinations(recipe)
    yield from _loss_combinations(recipe)
    yield from _domain_combinations(recipe)
    legal = (*METRICS[recipe.task], *(("exact_match",) if recipe.evaluation.exact_match else ()), "loss")
    for index, metric in enumerate(recipe.evaluation.metrics or ()):
        if metric not in legal:
            yield f"evaluation.metrics.{index}", metric, f"does not fit task: {recipe.task}; legal: {', '.join(legal)}"
    best = recipe.evaluation.metric_for_best_model
    if best is not None and best not in (*metrics_of(recipe), "loss"):
        yield (
            "evaluation.metric_for_best_model",
            best,
            f"is not computed; legal: {', '.join(dict.fromkeys((*metrics_of(recipe), 'loss')))}",
        )
    validations = [recipe.data.validation, *(domain.validation for domain in recipe.data.source.values())]
    if any(source is not None for source in validations) and recipe.data.validation_fraction is not None:
        yield (
            "data.validation_fraction",
            recipe.data.validation_fraction,
            "there is a validation split already; leave one of the two out",
        )
    if not has_validation(recipe):
        for key in ("eval_steps", "early_stopping_patience", "metric_for_best_model", "generate"):
            if getattr(recipe.evaluation, key) is not None:
                yield (
                    f"evaluation.{key}",
                    getattr(recipe.evaluation, key),
                    "there is no validation data: give data.validation or data.validation_fraction",
                )
    yield from _teacher_combinations(recipe)
    yield from _surgery_combinations(recipe)
    yield from _lora_combinations(recipe)
    yield from _training_combinations(recipe)
    yield from _packing_combinations(recipe)
    yield from _sequence_combinations(recipe)


def _language_combinations(recipe: Recipe) -> Iterator[tuple[str, Any, str]]:
    """Keys of a language model's data elsewhere, and of labelled data in its place."""
    data, plain = recipe.data, Data()
    of_language = ("format", "chat_template", "loss_on", "too_long", "packing")
    of_labels = ("text_pair_column", "label_column", "augmentation")
    for key in of_labels if recipe.task == "causal_lm" else of_language:
        if getattr(data, key) != getattr(plain, key):
            value = [a.kind for a in data.augmentation] if key == "augmentation" else getattr(data, key)
            yield f"data.{key}", value, f"does not fit task: {recipe.task}; leave it out"
    for key in ("generate", "exact_match") if recipe.task != "causal_lm" else ():
        if getattr(recipe.evaluation, key) is not None:
            yield f"evaluation.{key}", ..., f"does not fit task: {recipe.task}; leave it out"
    if recipe.evaluation.exact_match is not None:
        yield from _pattern_faults(recipe, recipe.evaluation.exact_match.pattern)
    if recipe.task == "causal_lm":
        for key in ("num_labels", "label_names"):
            if getattr(recipe.model, key) is not None:
                yield f"model.{key}", getattr(recipe.model, key), "a language model has no labels; leave it out"
        for index, loss in enumerate(recipe.losses):
            if isinstance(loss, CrossEntropy) and loss.class_weights is not None:
                yield f"losses.{index}.class_weights", ..., "is for classification; leave it out"


def _pattern_faults(recipe: Recipe, pattern: str) -> Iterator[tuple[str, Any, str]]:
    key = "evaluation.exact_match.pattern"
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        yield key, pattern, f"is no regular expression: {error}"
        return
    if groups != 1:
        yield key, pattern, f"should have one group, in round brackets, and has {groups}"
    if recipe.data.format == "text" or recipe.data.loss_on == "all":
        yield key, pattern, "needs answers: rows of another format than text, and data.loss_on: assistant"


def _loss_combinations(recipe: Recipe) -> Iterator[tuple[str, Any, str]]:
    wrong, right = ("cross_entropy", "mse") if recipe.task == "regression" else ("mse", "cross_entropy")
    kinds = [loss.kind for loss in losses_of(recipe)]
    for index, loss in enumerate(recipe.losses):
        if loss.kind == wrong:
            yield (
                f"losses.{index}.kind",
                loss.kind,
                f"does not fit task: {recipe.task}; use {right}",
            )
        weights = loss.class_weights if isinstance(loss, CrossEntropy) else None
        if weights is not None and recipe.model.num_labels not in (None, len(weights)):
            yield (
                f"losses.{index}.class_weights",
                weights,
                f"should be {recipe.model.num_labels} numbers, as model.num_labels says",
            )
        if weights is not None and not any(weights):
            yield f"losses.{index}.class_weights", weights, "at least one should be above 0"
        if kinds.index(loss.kind) != index and loss.kind in ("cross_entropy", "mse", "distillation", "embedding"):
            yield f"losses.{index}.kind", loss.kind, "stands in the list twice; give one of them the weight"
    if all(kind.endswith("_penalty") for kind in kinds):
        yield "losses", kinds, f"penalties alone teach nothing: add {right}"
    elif all(kind.endswith("_penalty") or kind in OF_DOMAINS for kind in kinds):
        yield "losses", kinds, f"nothing here teaches the task: add {right}"


_DOMAIN = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_NOT_OF_A_DOMAIN = ("source", "all", "validation", "test")  # of all domains together, where metrics are told by name


def _name_faults(key: str, names: list[str]) -> Iterator[tuple[str, Any, str]]:
    for name in names:
        if not _DOMAIN.fullmatch(name):
            yield key, names, f"{name!r} should be a name of letters, digits, '_' and '-'"
        if name in _NOT_OF_A_DOMAIN:
            yield key, names, f"{name!r} is what reports call all domains' together; give this one another name"


def _source_combinations(recipe: Recipe) -> Iterator[tuple[str, Any, str]]:
    """Of data.source, which stands in the place of data.train, or does not."""
    data = recipe.data
    if not data.source and data.train is None:
        yield "data.train", None, "should be what the model learns from: {path: ...}, or data.source of several domains"
    if not data.source:
        return
    if recipe.task == "causal_lm":
        yield "data.source", list(data.source), "does not fit task: causal_lm; give data.train"
    for key in ("train", "validation", "test"):
        if getattr(data, key) is not None:
            yield f"data.{key}", ..., "data.source stands in its place; leave one of the two out"
    yield from _name_faults("data.source", list(data.source))
    for name in data.source:
        if name in data.target:
            yield "data.source", list(data.source), f"{name!r} names a domain of data.target too, which is another"


def _domain_combinations(recipe: Recipe) -> Iterator[tuple[str, Any, str]]:
    """Of data.target, and of the losses that need it."""
    data, targets = recipe.data, recipe.data.target
    if targets and recipe.task == "causal_lm":
        yield "data.target", list(targets), "does not fit task: causal_lm; leave it out"
    yield from _source_combinations(recipe)
    yield from _name_faults("data.target", list(targets))
    for name, target in targets.items():
        if data.label_column in target.train.where:
            key = f"data.target.{name}.train.where"
            yield key, target.train.where, f"reads the labels ({data.label_column}) of what is to be unlabelled"
        if target.validation is not None and not has_validation(recipe):
            yield f"data.target.{name}.validation", ..., "is evaluated beside data.validation, which is not there"
    reads_targets = any(loss.kind in OF_DOMAINS for loss in recipe.losses)
    if targets and reads_targets and any(teacher.cache is not None for _, teacher in teachers_of(recipe)):
        yield "data.target", list(targets), "a teacher's cache has no rows of these; let the teacher run"
    if recipe.reweight is not None:
        if not targets:
            yield "reweight.method", recipe.reweight.method, "needs data.target: {NAME: {train: {path: ...}}}"
        if data.weight_column is not None:
            message = "data.weight_column gives the weights already; leave one out"
            yield "reweight.method", recipe.reweight.method, message
    for index, loss in enumerate(recipe.losses):
        if loss.kind not in OF_DOMAINS:
            continue
        key = f"losses.{index}"
        if not targets:
            yield f"{key}.kind", loss.kind, "needs data.target: {NAME: {train: {path: ...}}}"
        of_classes = loss.kind in ("lmmd", "entropy") or "probabilities" in layers_of(loss)
        if recipe.task == "regression" and of_classes:
            what = "kind" if loss.kind in ("lmmd", "entropy") else "layers" if isinstance(loss, Jmmd) else "layer"
            yield f"{key}.{what}", getattr(loss, what), "is for classes"
        if isinstance(loss, Jmmd) and len(set(loss.layers)) < len(loss.layers):
            yield f"{key}.layers", loss.layers, "a layer stands there twice"
        if isinstance(loss, Jmmd) and loss.bandwidths is not None and len(loss.bandwidths) != len(loss.layers):
            yield f"{key}.bandwidths", loss.bandwidths, f"should be one for each of {len(loss.layers)} layers"
        given = loss.bandwidths if isinstance(loss, Jmmd) else [getattr(loss, "bandwidth", None)]
        if getattr(loss, "detach_bandwidth", False) and given and None not in given:
            yield f"{key}.detach_bandwidth", True, "is of the mean distance, and the bandwidth is given: leave one out"
        if isinstance(loss, Mmd | Jmmd) and loss.estimator == "linear" and loss.accumulate:
            message = "compares neighbouring rows, which accumulate: true leaves open; should be biased or unbiased"
            yield f"{key}.estimator", loss.estimator, message
        if isinstance(loss, Mmd | Jmmd) and loss.estimator != "biased" and has_weights(recipe):
            # The unbiased one divides by 1 - sum w², which is 0 where one row has all the weight.
            yield f"{key}.estimator", loss.estimator, "takes no examples' weights; should be biased"


def _teacher_combinations(recipe: Recipe) -> Iterator[tuple[str, Any, str]]:
    teachers = teachers_of(recipe)
    wanting = [(i, loss) for i, loss in enumerate(recipe.losses) if loss.kind in OF_A_TEACHER]
    if recipe.teacher is not None and recipe.teachers:
        yield (
            "teachers",
            [t.model_name_or_path for t in recipe.teachers],
            "there is `teacher` already; use one of the two",
        )
    for index, loss in wanting:
        if not teachers:
            yield f"losses.{index}.kind", loss.kind, "needs a teacher: {model_name_or_path: ...}"
        elif loss.kind == "distillation" and recipe.task == "regression":
            yield f"losses.{index}.kind", loss.kind, "is for classes; a regression's teacher serves hidden_states"
        elif loss.kind == "attention" and recipe.data.packing:
            yield f"losses.{index}.kind", loss.kind, "compares within one example; data.packing: false keeps them apart"
        shares = {teacher.weight for _, teacher in teachers}
        mixed = recipe.task == "causal_lm" and recipe.kernels != "reference" and len(shares) > 1
        if isinstance(loss, Distillation) and loss.combine == "targets" and mixed:
            message = "several teachers of a language model need equal weights for this, or combine: losses"
            yield f"losses.{index}.combine", loss.combine, message
        if loss.kind == "distillation" and loss.beta is not None and loss.divergence != "jsd":
            yield f"losses.{index}.beta", loss.beta, f"is for divergence: jsd, and this is {loss.divergence}"
        if loss.kind == "attention" and loss.relation_heads is not None and loss.compare != "values":
            yield f"losses.{index}.relation_heads", loss.relation_heads, "is for compare: values; leave it out"
    if teachers and not wanting:
        name, teacher = teachers[0]
        legal = ", ".join(OF_A_TEACHER)
        yield name, teacher.model_name_or_path or teacher.cache, f"no loss learns from it; losses that do: {legal}"
    for name, teacher in teachers:
        if teacher.model_name_or_path is None and teacher.cache is None:
            yield name, {}, "needs model_name_or_path, or cache"
        elif teacher.cache is None:
            if teacher.tail != "zero":
                yield f"{name}.tail", teacher.tail, f"is of {name}.cache, and a teacher that runs has no tail"
        else:
            if teacher.model_name_or_path is not None:
                yield (
                    f"{name}.cache",
                    teacher.cache,
                    f"stands in the place of {name}.model_name_or_path: leave that out (null)",
                )
            if teacher.dtype != "auto":
                yield f"{name}.dtype", teacher.dtype, f"is of a teacher that runs, and {name}.cache stands for it"
            if recipe.task == "causal_lm":
                yield from _token_cache_combinations(recipe, name, wanting)
            for index, loss in wanting:
                if loss.kind != "distillation":
                    yield f"losses.{index}.kind", loss.kind, f"needs the teacher itself; {name}.cache has its logits"
            if recipe.data.augmentation:
                kinds = [augmentation.kind for augmentation in recipe.data.augmentation]
                yield "data.augmentation", kinds, f"changes the rows that {name}.cache is of; leave one of the two out"
        if teacher.deepspeed.zero_stage in (1, 2):
            yield f"{name}.deepspeed.zero_stage", teacher.deepspeed.zero_stage, "0 or 3: it has no optimizer to cut"
        if teacher.deepspeed.offload_param != "none" and teacher.deepspeed.zero_stage != 3:
            yield f"{name}.deepspeed.offload_param", teacher.deepspeed.offload_param, "needs zero_stage 3"


def _token_cache_combinations(recipe: Recipe, name: str, wanting: list[Any]) -> Iterator[tuple[str, Any, str]]:
    """What a few classes of each token do not give."""
    if recipe.kernels == "reference":
        yield "kernels", recipe.kernels, f"makes all logits, and {name}.cache is for the head that makes none; use auto"
    if recipe.teachers:
        caches = [teacher.cache for teacher in recipe.teachers]
        yield "teachers", caches, f"a language model learns from one cache alone: teacher: {{cache: ...}}, not {name}"
    for index, loss in wanting:
        if isinstance(loss, Distillation) and loss.divergence != "forward_kl":
            yield f"losses.{index}.divergence", loss.divergence, f"{name}.cache serves forward_kl alone"


def _surgery_combinations(recipe: Recipe) -> Iterator[tuple[str, Any, str]]:
    model = recipe.model
    if model.keep_layers is not None and model.drop_layers:
        yield "model.drop_layers", model.drop_layers, "model.keep_layers says it already; leave one of the two out"
    places = [insertion.at for insertion in model.insert_layers]
    for key, numbers in (("model.drop_layers", model.drop_layers), ("model.insert_layers.{}.at", places)):
        for index, number in enumerate(numbers):
            if number in numbers[:index]:
                yield key.format(index), number if "{}" in key else numbers, f"{number} stands there twice"


def _lora_combinations(recipe: Recipe) -> Iterator[tuple[str, Any, str]]:
    """What changes the weights that an adapter is put on again when it is loaded, or cannot hold them in 4 bits."""
    model, plain = recipe.model, Model(model_name_or_path="")
    for key in ("from_scratch", "keep_layers", "drop_layers", "insert_layers", "resize_embeddings", "reset"):
        if model.lora is not None and getattr(model, key) != getattr(plain, key):
            value = model.model_dump(mode="json", include={key})[key]
            yield f"model.{key}", value, "changes the model that model.lora's adapter stands on; leave one of them out"
    if model.lora is not None and model.lora.quantization is not None:
        if recipe.deepspeed.zero_stage == 3:
            message = "cannot cut the 4-bit weights of model.lora.quantization; 0, 1 or 2: each rank has them whole"
            yield "deepspeed.zero_stage", 3, message
        if recipe.training.fp16:
            yield "training.fp16", True, "does not go with model.lora.quantization; use bf16, or fp32"


def _training_combinations(recipe: Recipe) -> Iterator[tuple[str, Any, str]]:
    training, deepspeed, data = recipe.training, recipe.deepspeed, recipe.data
    if training.bf16 and training.fp16:
        yield "training.fp16", True, "bf16 is on already; choose one"
    elif training.fp16 and recipe.deepspeed.zero_stage == 0:
        yield "training.fp16", True, "needs deepspeed.zero_stage 1, 2 or 3"
    elif training.fp16 and any(loss.kind.endswith("_penalty") for loss in recipe.losses):
        yield "training.fp16", True, "penalties need bf16 or fp32: fp16 scales its gradients"
    if recipe.checkpoint.mtbf_hours is not None and recipe.checkpoint.save_steps != "auto":
        yield "checkpoint.mtbf_hours", recipe.checkpoint.mtbf_hours, "is for checkpoint.save_steps: auto; leave it out"
    if training.warmup_steps and training.warmup_ratio:
        yield "training.warmup_steps", training.warmup_steps, "training.warmup_ratio says it already; leave one out"
    if training.global_batch_size and training.gradient_accumulation_steps:
        per_rank = training.global_batch_size % training.gradient_accumulation_steps
        if per_rank:
            yield (
                "training.global_batch_size",
                training.global_batch_size,
                f"does not divide by gradient_accumulation_steps = {training.gradient_accumulation_steps}",
            )
    if deepspeed.offload_optimizer != "none" and deepspeed.zero_stage == 0:
        yield "deepspeed.offload_optimizer", deepspeed.offload_optimizer, "needs zero_stage 1, 2 or 3"
    if deepspeed.offload_param != "none" and deepspeed.zero_stage != 3:
        yield "deepspeed.offload_param", deepspeed.offload_param, "needs zero_stage 3"
    if data.text_pair_column is not None and data.augmentation:
        yield (
            "data.augmentation",
            [a.kind for a in data.augmentation],
            "is for one text, not for a pair (data.text_pair_column)",
        )
    label_column = None if recipe.task == "causal_lm" else data.label_column
    columns = [c for c in (data.text_column, data.text_pair_column, label_column, data.weight_column) if c]
    if len(set(columns)) != len(columns):
        yield "data.label_column", data.label_column, f"the columns should differ, these are {', '.join(columns)}"
    for name, source in sources_of(recipe):
        for key in ("name", "split", "revision"):
            if Path(source.path).is_absolute() and getattr(source, key) is not None:
                message = "is for a hub data set, and this is a file: leave it out, or null"
                yield f"data.{name}.{key}", getattr(source, key), message


def _packing_combinations(recipe: Recipe) -> Iterator[tuple[str, Any, str]]:
    attention, rows = recipe.model.attn_implementation, recipe.training.per_device_train_batch_size
    if recipe.data.packing and attention is not None and attention.startswith("flash") and rows > 1:
        message = f"{attention} keeps packed examples apart in a single row only: 1, and a longer data.max_length"
        yield "training.per_device_train_batch_size", rows, message


def _sequence_combinations(recipe: Recipe) -> Iterator[tuple[str, Any, str]]:
    """What cuts sequences into slices: of tokens among ranks, and of an MLP's."""
    key, size = "training.sequence_parallel_size", recipe.training.sequence_parallel_size
    if recipe.task != "causal_lm":
        if size > 1:
            yield key, size, f"does not fit task: {recipe.task}; leave it out"
        if recipe.model.mlp_tiles is not None:
            yield "model.mlp_tiles", recipe.model.mlp_tiles, f"does not fit task: {recipe.task}; leave it out"
    elif size > 1:
        for name, _ in teachers_of(recipe):
            yield key, size, f"{name} reads whole sequences; leave one of the two out"
        if recipe.model.attn_implementation == "eager":
            message = f"cannot share its heads among ranks ({key} = {size}): sdpa, or another way"
            yield "model.attn_implementation", "eager", message


def missing_files(recipe: Recipe) -> Iterator[tuple[str, Any, str]]:
    """What the recipe names on this machine's disk and is not there, in the same form.

    Apart from `combinations`, because a stored recipe can be read where its data is not.
    """
    model = Path(recipe.model.model_name_or_path)
    if model.is_absolute() and not model.exists():
        yield "model.model_name_or_path", str(model), "there is no such folder"
    for name, teacher in teachers_of(recipe):
        for key in ("model_name_or_path", "cache"):
            folder = Path(getattr(teacher, key) or "")
            if folder.is_absolute() and not folder.exists():
                yield f"{name}.{key}", str(folder), "there is no such folder"
    for name, source in sources_of(recipe):
        path = Path(source.path)
        if path.is_absolute() and not path.exists():
            yield f"data.{name}.path", source.path, "there is no such file"
        elif path.is_absolute() and (path.is_dir() or path.suffix not in DATA_SUFFIXES):
            yield f"data.{name}.path", source.path, f"should be a file that ends in {', '.join(DATA_SUFFIXES)}"
