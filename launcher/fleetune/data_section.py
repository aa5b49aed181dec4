"""What a recipe may say of its data. Nothing here imports torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fleetune.sections import Positive, Scalar, Section


class Source(Section):
    path: str
    """A hub data set, or a local .tsv, .csv, .json, .jsonl or .parquet file, or a .txt of paragraphs (column text)."""
    name: str | None = None
    """The hub data set's configuration, e.g. sst2."""
    split: str | None = None
    """The hub data set's split; `train` when absent."""
    revision: str | None = None
    """The hub data set's branch, tag or commit."""
    limit: Positive | None = None
    """Takes the first rows only, of those that `where` keeps."""
    where: dict[str, Scalar] = {}
    """Keeps the rows whose columns have these values, e.g. {split: train}."""


class Domain(Section):
    train: Source
    """Labelled rows, which the model learns from together with those of the other domains."""
    validation: Source | None = None
    """Labelled rows. Those of all domains together choose the best checkpoint; `NAME/accuracy` is that of these."""
    test: Source | None = None
    """Labelled rows, evaluated once, together and each domain by its name, with the weights that are kept."""


class Target(Section):
    train: Source
    """Text of the domain, of which each step reads as many rows as of the source. Its labels, if it has any, are never
    read."""
    validation: Source | None = None
    """Labelled rows, evaluated as `NAME/accuracy` beside data.validation's; no weights are chosen by them."""
    test: Source | None = None
    """Labelled rows, evaluated once, with the weights that are kept."""


Cleaning = Literal[
    "unicode_nfc", "unicode_nfkc", "strip_html", "collapse_whitespace", "drop_empty", "drop_duplicates", "drop_leaked"
]


class Augmentation(Section):
    kind: Literal["word_dropout", "random_swap", "random_deletion"]
    """word_dropout puts the tokenizer's mask token, or its unknown one, in a word's place; the others swap, delete."""
    probability: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """For each word."""


class Data(Section):
    train: Source | None = None
    """What the model learns from; of several domains `source` in its place."""
    source: dict[str, Domain] = {}
    """Several domains to learn from, by name, in place of train, validation and test: their rows are drawn as of one
    set, and evaluated together and by name."""
    validation: Source | None = None
    """Evaluated while the model is trained: it chooses the best checkpoint and stops early."""
    test: Source | None = None
    """Evaluated once, with the weights that are kept."""
    target: dict[str, Target] = {}
    """Domains, by name, that the model should work on as well: see the losses between domains. Where there is one, each
    micro-batch has as many of their rows beside its own, drawn as of one set, in fresh order each time that they are
    through; steps, epochs and batch sizes count the source's alone."""
    text_column: str = "text"
    """The column that the model reads."""
    text_pair_column: str | None = None
    """The second text of a pair, such as two sentences to compare."""
    label_column: str = "label"
    """A class, by number or name; for regression a number."""
    weight_column: str | None = None
    """A column of per-example weights; each loss is divided by their sum."""
    validation_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Splits validation off the training data, by seed, where there is no validation split."""
    format: Literal["text", "prompt_completion", "alpaca", "sharegpt", "messages"] | None = None
    """For causal_lm, what a row holds; told by the columns' names when absent."""
    chat_template: str | None = None
    """For causal_lm: how messages become one text, in Jinja, or a .jinja file; the tokenizer's own when absent."""
    loss_on: Literal["assistant", "all"] = "assistant"
    """For causal_lm: which tokens are learnt, those of the answers or every one. Plain text is learnt whole."""
    too_long: Literal["cut_right", "cut_left", "drop"] = "cut_right"
    """For causal_lm, with rows longer than max_length; both ways are counted."""
    packing: bool = False
    """For causal_lm: several rows in one sequence of max_length, none of which sees another."""
    max_length: Annotated[int, Field(ge=2)] = 128
    """Tokens; what is longer is cut, and counted."""
    cleaning: list[Cleaning] = []
    """Steps in the order they run; each reports how many rows it touched. drop_duplicates looks at the training
    rows of all sources together, and at each target's by themselves."""
    augmentation: list[Augmentation] = []
    """Training rows only, drawn anew every epoch by (seed, epoch, row)."""


class Reweight(Section):
    """Weighs the source's rows by how much they look like the target's, before training and without labels."""

    method: Literal["domain_classifier", "kernel_mean_matching"]
    """The odds of a classifier that tells the two apart, each row's by a fit without it; or the weights with which the
    source's mean in the space of mmd's kernel is nearest to the target's (of n rows, 8 n² bytes of memory). On the
    features of the pretrained model."""
    clip: Annotated[float, Field(gt=1.0)] = 10.0
    """The highest weight; their mean is 1."""
