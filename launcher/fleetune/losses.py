"""The losses that a recipe may list. Nothing here imports torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from fleetune.sections import Fraction, NotNegative, NotNegativeInt, Positive, Section


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
    weight: NotNegative = 1.0
    """What this loss is multiplied by in the sum of all."""
    label_smoothing: Fraction = 0.0
    """The share of the target that is spread evenly over all classes."""
    class_weights: list[NotNegative] | None = None
    """One weight for each class, as in PyTorch: the mean divides by the sum of the examples' class weights."""


class MeanSquaredError(Section):
    kind: Literal["mse"]
    """For regression: the squared error."""
    weight: NotNegative = 1.0
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
    weight: NotNegative = 1.0
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
    weight: NotNegative = 1.0
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
    weight: NotNegative = 1.0
    """What this loss is multiplied by in the sum of all."""
    distance: Literal["mse", "cosine"] = "mse"
    """As for hidden_states."""
    projection: bool = True
    """As for hidden_states."""


class Attention(Section):
    kind: Literal["attention"]
    """KL of where the teacher's heads look, or of how its values relate, from the student's, token by token."""
    weight: NotNegative = 1.0
    """What this loss is multiplied by in the sum of all."""
    compare: Literal["maps", "values"] = "values"
    """maps: the attention itself, head by head (needs attn_implementation: eager, equal heads, no attention dropout);
    values: the softmax of the values' products with each other (MiniLM), for any widths and heads."""
    layer_map: LayerMap = "last"
    """As for hidden_states."""
    relation_heads: Positive | None = None
    """For values: into how many heads both models' values are cut; the student's own number when absent."""


# ---------------------------------------------------------------- between the source and the target of data.target


def _layer(value: Any) -> Any:
    """One message where the union below would give several."""
    if value in ("pooled", "logits", "probabilities") or (type(value) is int and value >= 0):
        return value
    raise PydanticCustomError("layer", "should be pooled, logits, probabilities, or a layer's number from 0")


def _layer_or_name(value: Any) -> Any:
    if isinstance(value, str) and "." in value:
        return value
    try:
        return _layer(value)
    except PydanticCustomError as error:
        raise PydanticCustomError("layer", f"{error.message()}, or a module's dotted name") from None


KnownLayer = Annotated[Literal["pooled", "logits", "probabilities"] | NotNegativeInt, BeforeValidator(_layer)]
Layer = Annotated[Literal["pooled", "logits", "probabilities"] | NotNegativeInt | str, BeforeValidator(_layer_or_name)]


class _Scheduled(Section):
    weight: NotNegative = 1.0
    """What this loss is multiplied by in the sum of all, when its schedule has reached the whole of it."""
    schedule: Literal["constant", "linear", "sigmoid"] = "constant"
    """How the weight grows with the share p of training that is done: not at all, as p, or as 2 / (1 + exp(-10 p)) - 1
    (Ganin et al., arXiv 1505.07818)."""


class _Compared(_Scheduled):
    """Of two sets of rows as a whole, and no sum over rows: what is compared is a part of its meaning."""

    accumulate: bool = False
    """false: one loss for each micro-batch, over the rows of all ranks, and their mean over a step: it depends on the
    micro-batch times the ranks. true: one loss over all the rows of a step, however they are cut, for
    one forward pass more: the features first, without gradient, then the same pass with the same dropout, to which the
    loss's gradient by the features is handed (gradient caching, arXiv 2101.06983)."""


class _WithKernels(_Compared):
    num_kernels: Positive = 5
    """Gaussians in the kernel's sum."""
    factor: Annotated[float, Field(gt=0.0)] = 2.0
    """Each Gaussian's variance is so many times that of the one before."""
    detach_bandwidth: bool = False
    """Whether the batch's own mean distance, for bandwidth, is a constant to the gradient, as in the published code.
    The loss can then always be made smaller by shrinking all features, and what the classifier needs shrinks with them:
    from Amazon's reviews of books to DVDs a weight of 0.5 takes the accuracy on DVDs from 0.869 to 0.807."""


class Mmd(_WithKernels):
    kind: Literal["mmd"]
    """Maximum mean discrepancy between the features of source and target rows (Gretton et al. 2012; Long et al.,
    arXiv 1502.02791). Several layers, each with its own weight, are several of these."""
    layer: Layer = "pooled"
    """pooled: what the model's last linear map reads; logits; probabilities; or what a layer gives, by its number from
    0, or any module that has a dot in its name (bert.encoder.layer.3.attention), averaged over each row's tokens."""
    estimator: Literal["biased", "unbiased", "linear"] = "biased"
    """biased: of all pairs, never below 0 (the V-statistic); takes examples' weights. unbiased: without each row's pair
    with itself, right in the mean on small batches too (the U-statistic). linear: of consecutive rows alone, the
    cheapest and by far the noisiest."""
    bandwidth: Annotated[float, Field(gt=0.0)] | None = None
    """The variance of the middle Gaussian; the mean squared distance between the batch's rows when absent."""


class Jmmd(_WithKernels):
    kind: Literal["jmmd"]
    """Joint MMD: the kernel is the product of several layers' kernels (Long et al., arXiv 1605.06636)."""
    layers: Annotated[list[Layer], Field(min_length=2)] = ["pooled", "probabilities"]
    """At least two, each as mmd's layer."""
    bandwidths: list[Annotated[float, Field(gt=0.0)] | None] | None = None
    """One for each layer, as mmd's bandwidth; null for a mean distance. When absent, 0.85 for probabilities (that of
    the published code's one Gaussian: before anything is learnt they differ by next to nothing, and their mean distance
    would make much of it), and mean distances for all other layers."""
    estimator: Literal["biased", "unbiased", "linear"] = "biased"
    """As for mmd."""


class Lmmd(_WithKernels):
    kind: Literal["lmmd"]
    """Local MMD: class by class, with the model's own probabilities as the target's labels (Zhu et al. 2020)."""
    layer: Layer = "pooled"
    """As for mmd."""
    bandwidth: Annotated[float, Field(gt=0.0)] | None = None
    """As for mmd."""


class Coral(_Compared):
    kind: Literal["coral"]
    """|C_s - C_t|² / (4 D²) of the features' covariances (Sun and Saenko, arXiv 1607.01719)."""
    layer: Layer = "pooled"
    """As for mmd."""


class Dann(_Scheduled):
    kind: Literal["dann"]
    """A discriminator learns to tell source from target rows, and the model, by its reversed gradient, to give it
    nothing to tell them by (Ganin et al., arXiv 1505.07818). The weight is the reversed gradient's; the discriminator's
    own is 1. It is trained and kept in checkpoints with the model, and left out of the model that is saved."""
    layer: KnownLayer = "pooled"
    """As for mmd, but for names."""
    hidden_size: Positive = 128
    """Of the discriminator's one hidden layer."""


class Entropy(_Scheduled):
    kind: Literal["entropy"]
    """The mean entropy of the predictions for target rows: draws boundaries away from them (Grandvalet and Bengio
    2004)."""


Loss = Annotated[
    CrossEntropy
    | MeanSquaredError
    | L1Penalty
    | L2Penalty
    | Distillation
    | HiddenStates
    | Embedding
    | Attention
    | Mmd
    | Jmmd
    | Lmmd
    | Coral
    | Dann
    | Entropy,
    Field(discriminator="kind"),
]
OF_LAYERS = ("hidden_states", "embedding", "attention")
OF_A_TEACHER = ("distillation", *OF_LAYERS)
OF_DOMAINS = ("mmd", "jmmd", "lmmd", "coral", "dann", "entropy")
OF_LOGITS = ("cross_entropy", "mse", "distillation")


def layers_of(loss: Any) -> list[int | str]:
    """What a loss between domains compares."""
    if isinstance(loss, Jmmd):
        return list(loss.layers)
    return [loss.layer] if isinstance(loss, Mmd | Lmmd | Coral | Dann) else []
