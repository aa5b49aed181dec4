"""The losses that a recipe may list. Nothing here imports torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from fleetune.sections import Fraction, NotNegative, Positive, Section


def _layer_map(value: Any) -> Any:
    """One message where the union below would give several."""
    if value in ("uniform", "last"):
        return value
    pairs = value if isinstance(value, list) else []
    fits = all(isinstance(p, list) and len(p) == 2 and all(type(i) is int and i >= 0 for i in p) for p in pairs)
    if not pairs or not fits or any(pair in pairs[:i] for i, pair in enumerate(pairs)):
        raise PydanticCustomError(
            "layer_map",
            "should be uniform, last, or pairs of a student's layer and a teacher's, each once: [[0, 1], [1, 3]]",
        )
    return value


class CrossEntropy(Section):
    kind: Literal["cross_entropy"]
    """Minus the logarithm of the right class's probability, or of the next token's."""
    weight: float = 1.0
    """What this loss is multiplied by in the sum of all."""
    label_smoothing: Fraction = 0.0
    """The share of the target that is spread evenly over all classes."""
    class_weights: list[NotNegative] | None = None
    """One weight for each class, as in PyTorch: the mean divides by the sum of the examples' class weights."""


class MeanSquaredError(Section):
    kind: Literal["mse"]
    """For regression: the squared error."""
    weight: float = 1.0
    """What this loss is multiplied by in the sum of all."""


class L1Penalty(Section):
    kind: Literal["l1_penalty"]
    """Draws parameters to 0, and many of them all the way."""
    weight: NotNegative
    """Times the sum of |p|."""
    parameters: list[str] = ["*.weight"]
    """Dotted names, with * for any run of characters."""


class L2Penalty(Section):
    kind: Literal["l2_penalty"]
    """Draws parameters to 0, large ones most."""
    weight: NotNegative
    """Times the sum of p². It goes through Adam's moments, which training.weight_decay does not."""
    parameters: list[str] = ["*.weight"]
    """Dotted names, with * for any run of characters."""


LayerMap = Annotated[Literal["uniform", "last"] | list[list[int]], BeforeValidator(_layer_map)]


class Distillation(Section):
    kind: Literal["distillation"]
    """The teacher's soft targets: temperature² times the divergence of the student's from them."""
    weight: float = 1.0
    """What this loss is multiplied by in the sum of all; it takes nothing off another's weight."""
    temperature: Annotated[float, Field(gt=0.0)] = 2.0
    """Both models' logits are divided by it: above 1, the unlikely classes say more."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "tvd"] = "forward_kl"
    """KL(teacher || student), KL(student || teacher), Jensen-Shannon with beta, or total variation (without tau²)."""
    beta: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """For jsd: the teacher's share of the mixture; half of it when absent."""
    combine: Literal["targets", "losses"] = "targets"
    """Several teachers: one loss against the weighted mean of their soft targets, or the mean of one loss for each."""


class HiddenStates(Section):
    kind: Literal["hidden_states"]
    """Draws the student's layers to the teacher's, token by token."""
    weight: float = 1.0
    """What this loss is multiplied by in the sum of all."""
    distance: Literal["mse", "cosine"] = "mse"
    """Mean squared difference over a token's features, or 1 minus their cosine."""
    layer_map: LayerMap = "uniform"
    """Pairs of a student's layer and a teacher's, from 0: [[0, 1], [1, 3]]; uniform: each to the one as deep in its own
    model; last: the last two. The mean over the pairs counts."""
    projection: bool = True
    """Where the widths differ, a learnt matrix takes the student's features to the teacher's; it is not saved with the
    model."""


class Embedding(Section):
    kind: Literal["embedding"]
    """Draws what the student's embedding gives for each token to the teacher's."""
    weight: float = 1.0
    """What this loss is multiplied by in the sum of all."""
    distance: Literal["mse", "cosine"] = "mse"
    """As for hidden_states."""
    projection: bool = True
    """As for hidden_states."""


class Attention(Section):
    kind: Literal["attention"]
    """KL of where the teacher's heads look, or of how its values relate, from the student's, token by token."""
    weight: float = 1.0
    """What this loss is multiplied by in the sum of all."""
    compare: Literal["maps", "values"] = "values"
    """maps: the attention itself, head by head (needs attn_implementation: eager, equal heads, no attention dropout);
    values: the softmax of the values' products with each other (MiniLM), for any widths and heads."""
    layer_map: LayerMap = "last"
    """As for hidden_states."""
    relation_heads: Positive | None = None
    """For values: into how many heads both models' values are cut; the student's own number when absent."""


Loss = Annotated[
    CrossEntropy | MeanSquaredError | L1Penalty | L2Penalty | Distillation | HiddenStates | Embedding | Attention,
    Field(discriminator="kind"),
]
OF_A_TEACHER = ("distillation", "hidden_states", "embedding", "attention")
OF_LOGITS = ("cross_entropy", "mse", "distillation")
