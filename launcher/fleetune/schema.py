"""The recipe's schema: what may stand in it, and how its batch is cut. Nothing here imports torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from fleetune.data_section import Data, Reweight, Source
from fleetune.losses import OF_LOGITS, CrossEntropy, Loss, MeanSquaredError
from fleetune.model_section import Model
from fleetune.sections import CountOrAuto, Fraction, NotNegative, NotNegativeInt, Positive, Section


class RecipeError(ValueError):
    """One or more faults of a recipe, each a line with the file, the key's path, the value and what would be right."""


class Training(Section):
    num_train_epochs: Annotated[float, Field(gt=0.0)] = 3.0
    """Passes over the training data, or a part of one."""
    max_steps: Positive | None = None
    """Optimizer steps; goes before num_train_epochs."""
    per_device_train_batch_size: Positive = 8
    """The micro-batch of one rank, or of the ranks that share sequences; with global_batch_size the most that one may
    have."""
    gradient_accumulation_steps: Positive | None = None
    """Micro-batches of one rank in one optimizer step; 1, or what global_batch_size needs, when absent."""
    global_batch_size: Positive | None = None
    """Examples of one optimizer step over all ranks; keeps the same when the number of ranks changes."""
    sequence_parallel_size: Positive = 1
    """For causal_lm: so many ranks share each sequence, a slice of its tokens each, and in attention some of the heads
    (Ulysses), where one rank has no room for all of it; evaluation reads whole sequences."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 5.0e-5
    """The highest, which the warm-up ends at."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls to 0 after the warm-up, or stays."""
    warmup_ratio: Fraction = 0.0
    """Share of the steps over which the learning rate rises from 0."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """The same in optimizer steps, in place of warmup_ratio."""
    weight_decay: NotNegative = 0.0
    """AdamW's decoupled decay, kept off biases and norms."""
    adam_beta1: Fraction = 0.9
    """How much AdamW keeps at each step of the gradient's running mean."""
    adam_beta2: Fraction = 0.999
    """How much it keeps of the squared gradient's."""
    adam_epsilon: Annotated[float, Field(gt=0.0)] = 1.0e-8
    """Added to the root that AdamW divides by."""
    max_grad_norm: NotNegative = 1.0
    """The gradient's norm over all parameters is clipped to this; 0 leaves it."""
    bf16: bool = False
    """Computes in bf16, and keeps fp32 weights for the optimizer; fp32 on a CPU without bf16 arithmetic."""
    fp16: bool = False
    """On a GPU only, with a dynamic loss scale."""
    group_by_length: bool = True
    """Batches of like length in random order: less padding, every example once an epoch."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of fresh weights, dropout, the order of the data, augmentation and validation_fraction."""
    logging_steps: Positive = 10
    """Optimizer steps between lines of metrics.jsonl and of the log."""
    hang_timeout: Annotated[float, Field(gt=0.0)] | None = None
    """Seconds without a step after which the run is stopped as hanging; learnt from its own steps when absent."""


class DeepSpeed(Section):
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 2
    """What is cut over the ranks: 1 the optimizer's state, 2 also the gradients, 3 also the parameters; 0 nothing."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """Where the optimizer's state and step live; ZeRO 1 to 3."""
    offload_param: Literal["none", "cpu"] = "none"
    """Where idle parameter shards live; ZeRO-3."""


Metric = Literal["accuracy", "f1", "matthews", "pearson", "spearman", "mse", "perplexity", "exact_match", "loss"]


class Generation(Section):
    prompts: Annotated[list[str], Field(min_length=1)]
    """Each a user's turn where there is a chat template, and else the beginning of a text."""
    max_new_tokens: Positive = 64
    """At most; an answer ends by itself."""


class ExactMatch(Section):
    pattern: str
    """A regular expression with one group, e.g. `#### (\\S+)`: what it finds last in the model's answer must be what it
    finds last in the data's."""
    max_new_tokens: Positive = 256
    """At most; an answer ends by itself."""
    limit: Positive | None = None
    """The first rows of a split only: generating takes much longer than training."""


class Evaluation(Section):
    metrics: list[Metric] | None = None
    """The loss is always among them; when absent all of the task's: accuracy, f1 and matthews, or pearson, spearman and
    mse, or perplexity."""
    generate: Generation | None = None
    """For causal_lm: prompts that the model continues after each evaluation, shown in Weights & Biases as a table."""
    exact_match: ExactMatch | None = None
    """For causal_lm: the share of rows that the model, generating, answers as the data does."""
    eval_steps: Positive | None = None
    """Optimizer steps between evaluations; once an epoch, and at the end, when absent."""
    per_device_eval_batch_size: Positive = 64
    """Rows that one rank evaluates at once."""
    shift_rows: Annotated[int, Field(ge=2)] | None = 500
    """With data.target: of so many rows of the source and of each target the features are compared before training and
    after it, by MMD with a permutation test, and drawn; null leaves that out."""
    metric_for_best_model: Metric | None = None
    """Chooses the best checkpoint on the validation split; the first of `metrics` when absent."""
    early_stopping_patience: Positive | None = None
    """Stops after so many evaluations without a better metric."""
    early_stopping_threshold: NotNegative = 0.0
    """What counts as better, in the metric's own units."""


class Checkpoint(Section):
    save_steps: CountOrAuto | None = None
    """Optimizer steps between checkpoints, or auto: what loses least, by Young's formula from mtbf_hours and the time
    that a save was measured to take; at each evaluation when absent."""
    mtbf_hours: Annotated[float, Field(gt=0.0)] | None = None
    """For auto: the mean time between failures of the whole job; a cluster's profile gives it. When absent, that of the
    run's nodes with 6.5 failures in 1,000 days of a node."""
    save_total_limit: Positive = 2
    """The last ones that are kept, beside the best."""
    in_background: Annotated[bool, Field(alias="async")] = False
    """The files are written beside the next steps, from a copy in memory, where there is room for one."""


class Retries(Section):
    """On a cluster: how many attempts may end in each way before the run is given up."""

    preemption: NotNegativeInt = 100
    """By a job of higher priority."""
    requeue: NotNegativeInt = 100
    """By a person: `scontrol requeue`."""
    time_limit: NotNegativeInt = 1000
    """By the `time` of the cluster's profile."""
    node_failure: NotNegativeInt = 1000
    """A node that died or was cut off."""
    crash: NotNegativeInt = 3
    """A rank that failed, was killed or hung."""
    without_progress: Positive = 3
    """Attempts one after another that come no step further."""


class Wandb(Section):
    project: str = "fleetune"
    """Where the run is shown; it is made when it is not there."""
    entity: str | None = None
    """A team or user; your key's own when absent."""
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online where a key is there and the server answers, offline otherwise."""
    tags: list[str] = []
    """Words to find the run by."""


class Tracking(Section):
    wandb: Wandb | None = None
    """Streams the metrics to Weights & Biases; without this section they stand in metrics.jsonl alone."""


class TeacherDeepSpeed(Section):
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    """3 cuts the teacher's parameters over the ranks, where one GPU has no room for them; with 0 each rank has all."""
    offload_param: Literal["none", "cpu"] = "none"
    """Where idle parameter shards live; ZeRO-3."""


class Teacher(Section):
    model_name_or_path: str | None = None
    """A model of the same task: a hub name, a folder, a finished run of Fleetune, or package://NAME/FOLDER."""
    cache: str | None = None
    """In its place: the folder in which `fleetune teach` has stored what it says of every training row."""
    tail: Literal["zero", "uniform"] = "zero"
    """Of a cache with a language model's top classes: the others have nothing, or share evenly what is left to 1."""
    revision: str | None = None
    """The hub revision of the model and its tokenizer."""
    weight: Annotated[float, Field(gt=0.0)] = 1.0
    """Its share among several teachers."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What its weights are held in, and computed in; as training.bf16 and fp16 say when auto."""
    deepspeed: TeacherDeepSpeed = TeacherDeepSpeed()
    """How its memory is shared among the ranks."""
    trust_remote_code: bool = False
    """Lets it run Python code of its own that lies beside its weights: for authors you trust."""


class Recipe(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    """The run's folder is output_dir/name."""
    task: Literal["classification", "regression", "causal_lm"]
    """What is learnt: one of several classes, a number, or which token comes next."""
    output_dir: str = "runs"
    """The folder of all runs; `runs` in the working folder when absent."""
    model: Model
    """Which model, and what is changed in it."""
    data: Data
    """Which rows, and how they become tokens."""
    losses: list[Loss] = []
    """What is minimised: the sum of these. The task's own loss, mse for regression or cross_entropy, when absent."""
    teacher: Teacher | None = None
    """The model that the losses distillation, hidden_states, embedding and attention learn from."""
    teachers: list[Teacher] = []
    """In place of `teacher`, where there are several."""
    reweight: Reweight | None = None
    """Weights for the rows of data.train, by how much they look like data.target; lmmd and coral take none."""
    kernels: Literal["auto", "triton", "torch", "reference"] = "auto"
    """What computes the losses: Triton on a GPU and chunked PyTorch elsewhere, or the plain formulas (reference)."""
    training: Training = Training()
    """Length, batches, learning rate, precision."""
    deepspeed: DeepSpeed = DeepSpeed()
    """How the memory is shared among the ranks."""
    evaluation: Evaluation = Evaluation()
    """What is measured on held-out data, and how often."""
    checkpoint: Checkpoint = Checkpoint()
    """When the state is saved, to go on from."""
    retries: Retries = Retries()
    """On a cluster: how many attempts a run may take."""
    tracking: Tracking = Tracking()
    """Where metrics go beside metrics.jsonl."""


DATA_SUFFIXES = (".tsv", ".csv", ".json", ".jsonl", ".parquet", ".txt")
METRICS: dict[str, tuple[Metric, ...]] = {
    "classification": ("accuracy", "f1", "matthews"),
    "regression": ("pearson", "spearman", "mse"),
    "causal_lm": ("perplexity",),
}
LOWER_IS_BETTER = ("loss", "mse", "perplexity")
FAILURES_PER_NODE_DAY = 0.0065  # of a research cluster of 16,000 GPUs, 8 a node (arXiv 2410.21680)


# ---------------------------------------------------------------- what follows from a recipe


def losses_of(recipe: Recipe) -> list[Any]:
    """The recipe's losses, or the task's own where it names none."""
    if recipe.losses:
        return list(recipe.losses)
    return [MeanSquaredError(kind="mse") if recipe.task == "regression" else CrossEntropy(kind="cross_entropy")]


def head_warning(recipe: Recipe) -> str | None:
    """Where nothing trains the head, as in the first of two stages of distillation."""
    if any(loss.kind in OF_LOGITS for loss in losses_of(recipe)):
        return None
    return f"no loss reaches the model's head, which stays as it is; those that do: {', '.join(OF_LOGITS)}"


def teachers_of(recipe: Recipe) -> list[tuple[str, Teacher]]:
    """Each teacher with its key's path."""
    single = [] if recipe.teacher is None else [("teacher", recipe.teacher)]
    return single + [(f"teachers.{i}", teacher) for i, teacher in enumerate(recipe.teachers)]


def teacher_to_store(recipe: Recipe) -> tuple[str, Teacher]:
    """The one that `fleetune teach` runs, with its key's path. Raises RecipeError where there is none, or several."""
    teachers = teachers_of(recipe)
    running = [(key, teacher) for key, teacher in teachers if teacher.cache is None]
    if not teachers:
        raise RecipeError("teacher: is not there; `fleetune teach` stores that of teacher: {model_name_or_path: ...}")
    if not running:
        key, teacher = teachers[0]
        raise RecipeError(
            f"{key}.cache = {teacher.cache!r}: is stored already; to store it anew, {key}.cache=null "
            f"{key}.model_name_or_path=..."
        )
    if len(running) > 1:
        names = [teacher.model_name_or_path for _, teacher in running]
        raise RecipeError(f"teachers = {names}: `fleetune teach` stores one; give it a recipe with that one alone")
    return running[0]


def sources_of(recipe: Recipe) -> list[tuple[str, Source]]:
    """Each data set with its key's path below `data`, which is its split's name too."""
    data = recipe.data
    named = [("train", data.train), ("validation", data.validation), ("test", data.test)]
    for key, domains in (("source", data.source), ("target", data.target)):
        for name, domain in domains.items():
            named += [(f"{key}.{name}.{split}", getattr(domain, split)) for split in ("train", "validation", "test")]
    return [(name, source) for name, source in named if source is not None]


def is_source(split: str) -> bool:
    """Whether a split, by its key's path below `data`, is of what is learnt from."""
    return not split.startswith("target.")


def training_sources(recipe: Recipe) -> list[Source]:
    """The labelled data sets that the model learns from."""
    data = recipe.data
    return [domain.train for domain in data.source.values()] if data.train is None else [data.train]


def has_validation(recipe: Recipe) -> bool:
    data = recipe.data
    of_domains = any(domain.validation is not None for domain in data.source.values())
    return data.validation is not None or data.validation_fraction is not None or of_domains


def has_weights(recipe: Recipe) -> bool:
    """Whether training examples may weigh unequally."""
    return recipe.data.weight_column is not None or recipe.reweight is not None


def target_splits(recipe: Recipe) -> list[str]:
    """Those of unlabelled rows that are trained on, in an order that is not the recipe's, which says nothing."""
    return [f"target.{name}.train" for name in sorted(recipe.data.target)]


def metrics_of(recipe: Recipe) -> tuple[Metric, ...]:
    if recipe.evaluation.metrics:
        return tuple(recipe.evaluation.metrics)
    return METRICS[recipe.task] + (("exact_match",) if recipe.evaluation.exact_match else ())


def best_metric_of(recipe: Recipe) -> Metric:
    return recipe.evaluation.metric_for_best_model or metrics_of(recipe)[0]


def hours_between_failures(nodes: int, failures_per_node_day: float = FAILURES_PER_NODE_DAY) -> float:
    """On average, of a whole job: it ends where any of its nodes fails."""
    return 24.0 / (nodes * failures_per_node_day)


def json_schema() -> dict[str, Any]:
    """Of a recipe file: where it `extends` another, what the other may give is not required."""
    schema = Recipe.model_json_schema()
    schema["properties"]["extends"] = {"type": "string", "description": "Another recipe that this one builds on."}
    schema["title"] = "Fleetune recipe"
    del schema["properties"]["losses"]["default"]  # an empty list that is written out is refused
    schema["properties"]["losses"]["minItems"] = 1
    definitions = schema["$defs"]
    # A loss or an augmentation stands in a list, which is replaced as a whole: its keys stay required.
    required = {name: definitions[name].pop("required") for name in ("Model", "Source", "Domain", "Target")}
    whole = {"required": schema.pop("required"), "properties": {}}
    whole["properties"]["model"] = {"required": required["Model"]}
    either = [{"required": ["train"]}, {"required": ["source"]}]
    whole["properties"]["data"] = {"anyOf": either, "properties": {}}
    for split in ("train", "validation", "test"):
        whole["properties"]["data"]["properties"][split] = {"required": required["Source"]}
    splits = {split: {"required": required["Source"]} for split in ("train", "validation", "test")}
    for key, section in (("source", "Domain"), ("target", "Target")):
        domain = {"required": required[section], "properties": splits}
        whole["properties"]["data"]["properties"][key] = {"additionalProperties": domain}
    return {**schema, "if": {"not": {"required": ["extends"]}}, "then": whole}
