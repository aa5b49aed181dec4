"""The recipe's section `model`: which weights to begin with, and what is changed in them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from fleetune.lora import Lora
from fleetune.sections import CountOrAuto, NotNegativeInt, Positive, Scalar, Section


def _keep_layers(value: Any) -> Any:
    """One message where the union below would give many."""
    numbers = list(value.values()) if isinstance(value, dict) else value
    right = isinstance(numbers, list) and bool(numbers) and all(type(n) is int and n >= 0 for n in numbers)
    if isinstance(value, dict):
        right = right and len(value) == 1 and set(value) < {"every", "first", "last"} and numbers[0] > 0
    if not right or (isinstance(value, list) and value != sorted(set(value))):
        message = "should be layer numbers from 0, ascending, each once, or one of {every: N}, {first: N}, {last: N}"
        raise PydanticCustomError("keep_layers", message)
    return value


KeepLayers = Annotated[
    list[NotNegativeInt] | dict[Literal["every", "first", "last"], Positive], BeforeValidator(_keep_layers)
]


class Insertion(Section):
    at: NotNegativeInt
    """The place that the new layer has in the end, from 0."""
    copy_of: NotNegativeInt | None = None
    """The layer whose weights it starts with, by its number before any change; fresh weights when absent."""


class Model(Section):
    model_name_or_path: str
    """A hub name, a folder, or package://NAME/FOLDER for a model inside an installed Python package."""
    revision: str | None = None
    """The hub revision of the model and its tokenizer."""
    num_labels: Annotated[int, Field(ge=1)] | None = None
    """Classes; counted from the training data when absent. Regression has one."""
    label_names: list[str] | None = None
    """The classes' names, in the order of their numbers; they stand in the saved config."""
    from_scratch: bool = False
    """Keeps the architecture and the tokenizer and draws fresh weights: the baseline."""
    keep_layers: KeepLayers | None = None
    """The only layers that stay, by number from 0, or {every: 2} (0, 2, 4, ...), {first: 3}, {last: 3}."""
    drop_layers: list[NotNegativeInt] = []
    """The layers that go, by number from 0, in place of keep_layers."""
    insert_layers: list[Insertion] = []
    """Layers that come in, after keep_layers or drop_layers."""
    resize_embeddings: Positive | None = None
    """Rows of the token embeddings, at least the tokenizer's tokens, e.g. a multiple of 64; new ones are fresh."""
    reset: list[str] = []
    """Parameters drawn anew: dotted names as in freeze (`classifier.*`), with the layers' new numbers."""
    freeze: list[str] = []
    """Parameters that do not train: dotted names, * for any run of characters (`*.embeddings.*`, `*.layer.0.*`)."""
    lora: Lora | None = None
    """Trains low-rank matrices beside frozen weights, and saves these alone; all weights are trained when absent."""
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] | None = (
        None
    )
    """What computes attention, by Transformers' names; the model's own choice when absent."""
    gradient_checkpointing: bool = False
    """Recomputes activations in the backward pass: less memory, about a third more time."""
    mlp_tiles: CountOrAuto | None = None
    """For causal_lm: each layer's MLP takes so many slices of the sequence one after another and recomputes each in the
    backward pass, for less memory; auto: of about as many tokens as the model is wide."""
    config: dict[str, Scalar] = {}
    """Values that replace those of the model's own config, e.g. hidden_dropout_prob: 0.0."""
    trust_remote_code: bool = False
    """Lets a model run Python code of its own that lies beside its weights: for authors you trust."""
