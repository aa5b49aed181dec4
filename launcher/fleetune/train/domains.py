"""The losses between the source and the target: what they compare, and the discriminators that some of them learn.

MMD and its kin are no sums over rows. They are taken over the rows that all ranks have at one place in the window, or
over the whole window, and divided by the number of micro-batches; `fleetune_kernels` gathers the features and gives
each rank the exact gradient of its own, with no collective in the backward pass. The discriminators' loss and the
entropy are sums over rows like any other.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from fleetune.losses import OF_DOMAINS, Coral, Dann, Entropy, Jmmd, Lmmd, Mmd, layers_of
from fleetune.schema import Recipe, losses_of
from fleetune.train import distributed
from fleetune.train.alignment import Outputs
from fleetune.train.batches import MicroBatch
from fleetune.train.model import ModelError
from fleetune.train.terms import Features, Statistic, Term, divided, precise
from fleetune_kernels.mmd import coral, jmmd, lmmd, mmd

DISCRIMINATORS = "discriminators"  # of the model's module, by the loss's place in the recipe
PROBABILITIES = 0.92**2  # jmmd's bandwidth for them (TLLib's jan.py)

# ---------------------------------------------------------------- what is compared


def head_of(model: nn.Module, num_labels: int) -> nn.Linear | None:
    """The last linear map, which makes the logits."""
    maps = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == num_labels]
    return maps[-1] if maps else None


def check_layers(recipe: Recipe, model: Any) -> None:
    """Raises ValueError, which names the key, for what the model does not have."""
    for index, loss in enumerate(losses_of(recipe)):
        for layer in layers_of(loss):
            key = f"losses.{index}.{'layers' if isinstance(loss, Jmmd) else 'layer'} = {layer!r}"
            depth = getattr(model.config, "num_hidden_layers", 0)
            if isinstance(layer, int) and getattr(model.config, "is_encoder_decoder", False):
                raise ValueError(f"{key}: a {model.config.model_type} model has two rows of layers; name a module")
            if isinstance(layer, int) and layer >= depth:
                raise ValueError(f"{key}: there is no such layer; the model has layers 0 to {depth - 1}")
            if layer == "pooled" and head_of(model, model.config.num_labels) is None:
                raise ValueError(f"{key}: a {model.config.model_type} model ends in no linear map; name a layer")
            # A list of modules is none that runs.
            names = [name for name, one in model.named_modules() if not isinstance(one, nn.ModuleList | nn.ModuleDict)]
            if isinstance(layer, str) and "." in layer and layer not in names:
                near = ", ".join(f"`{name}`" for name in difflib.get_close_matches(layer, names, 2, 0.0))
                raise ValueError(f"{key}: the model has no such module; there is e.g. {near}")


def layer_of(
    layer: int | str,
    logits: torch.Tensor,  # (B, C)
    hidden_states: Any,  # the embedding's, then each layer's (B, L, D)
    read: Mapping[str, torch.Tensor],  # (B, D) or (B, L, D)
    attention_mask: torch.Tensor,  # (B, L)
) -> torch.Tensor:  # (B, D), in fp32
    """Raises ModelError: a module by its name does not run, or gives something else."""
    if layer == "logits":
        return precise(logits)
    if layer == "probabilities":
        return precise(logits).softmax(-1)
    if isinstance(layer, str) and layer not in read:
        raise ModelError(f"losses: the layer {layer} is a module that the model has and does not run; name another")
    states = precise(read[layer] if isinstance(layer, str) else hidden_states[layer + 1])
    if states.dim() == 2:
        return states
    if states.shape[:-1] != attention_mask.shape:
        raise ModelError(
            f"losses: the layer {layer} gives {tuple(states.shape)}, for {tuple(attention_mask.shape)} tokens; "
            "should be one whose output has features for each row, or for each of its tokens"
        )
    mask = attention_mask[:, :, None].to(states.dtype)
    return (states * mask).sum(1) / mask.sum(1)


def collect(layers: list[int | str], outputs: Outputs, batch: MicroBatch) -> Features:
    assert outputs.logits is not None
    source, target = slice(0, batch.examples), slice(batch.examples, batch.examples + batch.targets)
    mask = batch.inputs["attention_mask"]
    found = [layer_of(layer, outputs.logits, outputs.hidden_states, outputs.read, mask) for layer in layers]
    return Features(
        [layer[source] for layer in found],
        [layer[target] for layer in found],
        batch.labels[source],
        batch.weights[source],
        precise(outputs.logits.detach()[target]).softmax(-1),
        batch.everyone,
    )


# ---------------------------------------------------------------- the terms


def domain_term(loss: Any, index: int, kernels: str, *, weighted: bool) -> Term:
    """Of one of OF_DOMAINS, the recipe's loss number `index`; `weighted`: whether examples have unequal weights."""
    assert loss.kind in OF_DOMAINS
    if isinstance(loss, Entropy):
        return Term(loss.kind, loss.weight, _target_rows, _entropy, loss.schedule)
    if isinstance(loss, Dann):
        name = f"losses_{index}"
        forward = functools.partial(_told_apart, name)
        return Term(loss.kind, loss.weight, _rows_weight, forward, loss.schedule, reversal=name)
    statistic = Statistic(
        functools.partial(collect, layers_of(loss)),
        functools.partial(_compare, loss, kernels, weighted),
        2 if isinstance(loss, Coral) or getattr(loss, "estimator", "biased") != "biased" else 1,
    )
    return Term(
        loss.kind,
        loss.weight,
        functools.partial(_micro_batches, 0 if loss.accumulate else statistic.least),
        functools.partial(_over_ranks, statistic),
        loss.schedule,
        statistic if loss.accumulate else None,
    )


def _compare(loss: Any, kernels: str, weighted: bool, features: Features) -> torch.Tensor:
    """The loss of all ranks' rows, with the gradient of this rank's."""
    group = distributed.group()
    sizes = None if group is None else [(rows, rows) for rows in features.everyone]
    ranks: dict[str, Any] = {"group": group, "sizes": sizes, "backend": kernels}
    source, target = features.source, features.target
    if isinstance(loss, Coral):
        value: torch.Tensor = coral(source[0], target[0], **ranks)
        return value
    kernel: dict[str, Any] = {
        "num_kernels": loss.num_kernels,
        "factor": loss.factor,
        "detach_bandwidth": loss.detach_bandwidth,
        **ranks,
    }
    # Where all rows that meet have weight 0 they count alike; a mean of nothing would be no number.
    weights = features.weights.clamp(min=1e-12) if weighted else None
    if isinstance(loss, Lmmd):
        probabilities = features.probabilities
        value = lmmd(source[0], target[0], features.labels, probabilities, bandwidth=loss.bandwidth, **kernel)
    elif isinstance(loss, Jmmd):
        bandwidths = loss.bandwidths or [PROBABILITIES if one == "probabilities" else None for one in loss.layers]
        settings: dict[str, Any] = {"bandwidth": bandwidths, "estimator": loss.estimator, "source_weights": weights}
        value = jmmd(source, target, **settings, **kernel)
    else:
        assert isinstance(loss, Mmd)
        settings = {"bandwidth": loss.bandwidth, "estimator": loss.estimator, "source_weights": weights}
        value = mmd(source[0], target[0], **settings, **kernel)
    return value


def _over_ranks(
    statistic: Statistic, student: Outputs, _: list[Outputs], batch: MicroBatch, num_items: torch.Tensor
) -> torch.Tensor:
    """Every rank has the whole loss and counts it, and the loop adds the ranks up: the value is divided by their
    number, and the gradient, of which each rank has its own share, is not."""
    loss = statistic.value(statistic.collect(student, batch))
    return divided(loss.detach() + len(batch.everyone) * (loss - loss.detach()), num_items)


def _micro_batches(least: int, batch: MicroBatch) -> torch.Tensor:
    """Those that have rows enough, counted on every rank."""
    return torch.tensor(float(sum(batch.everyone) >= least))


def _target_rows(batch: MicroBatch) -> torch.Tensor:
    return torch.tensor(float(batch.targets))


def _entropy(student: Outputs, _: list[Outputs], batch: MicroBatch, num_items: torch.Tensor) -> torch.Tensor:
    """-sum over the target's rows and the classes of p log p, / num_items."""
    assert student.logits is not None
    logits = precise(student.logits[batch.examples : batch.examples + batch.targets])
    log_p = logits.log_softmax(-1)
    return divided(-(log_p.exp() * log_p).sum(), num_items)


def _rows_weight(batch: MicroBatch) -> torch.Tensor:
    """The source's rows by their weights, the target's by 1."""
    return batch.weights.sum(dtype=torch.float64) + batch.targets


def _told_apart(
    name: str, student: Outputs, _: list[Outputs], batch: MicroBatch, num_items: torch.Tensor
) -> torch.Tensor:
    """The discriminator's cross-entropy over the rows of both sides."""
    scores = precise(student.domain_logits[name])  # (B,) above 0 for the target
    source = functional.softplus(scores) * batch.weights
    target = functional.softplus(-scores[batch.examples : batch.examples + batch.targets])
    return divided(source.sum() + target.sum(), num_items)


# ---------------------------------------------------------------- in the model's module


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return -ctx.factor * gradient, None


def add_domain_heads(model: Any, recipe: Recipe) -> None:
    """Lets the model's own forward pass give its pooled features, and run a discriminator for each `dann`.

    There ZeRO-3 has the discriminators' weights. They are drawn from training.seed. With the keyword `reversal`, each
    discriminator's factor by its name, the outputs have `domain_logits`; without it no discriminator runs.
    """
    losses = losses_of(recipe)
    if not any(layers_of(loss) for loss in losses):
        return
    head, plain = head_of(model, model.config.num_labels), model.forward
    torch.manual_seed(recipe.training.seed)
    compared = {f"losses_{index}": loss for index, loss in enumerate(losses) if isinstance(loss, Dann)}
    made = {name: _discriminator(loss, model, head) for name, loss in compared.items()}
    if made:
        model.add_module(DISCRIMINATORS, nn.ModuleDict(made))

    named = {layer for loss in losses for layer in layers_of(loss) if isinstance(layer, str) and "." in layer}

    def forward(self: nn.Module, *inputs: Any, reversal: dict[str, float] | None = None, **keywords: Any) -> Any:
        read: dict[str, torch.Tensor] = {}
        with _reading(self, head, named, read):
            outputs = plain(*inputs, **keywords)
        mask = keywords["attention_mask"]
        if "pooled" in read:
            read["pooled"] = _of_rows(read["pooled"], mask)
        outputs["read"] = read
        if reversal:
            given = outputs.logits, outputs.get("hidden_states"), read, mask
            outputs["domain_logits"] = {
                name: _scores(made[name], layer_of(loss.layer, *given), reversal[name])
                for name, loss in compared.items()
            }
        return outputs

    model.forward = types.MethodType(forward, model)


@contextlib.contextmanager
def _reading(
    model: nn.Module, head: nn.Module | None, names: set[str], read: dict[str, torch.Tensor]
) -> Iterator[None]:
    """Within it, `read` takes what the head reads, as `pooled`, and what the modules of these names give."""

    def give(name: str, output: Any) -> None:
        read[name] = output if isinstance(output, torch.Tensor) else output[0]

    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: give(name, output))
        for name, module in model.named_modules()
        if name in names
    ]
    if head is not None:
        hooks.append(head.register_forward_pre_hook(lambda _, inputs: give("pooled", inputs)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _discriminator(loss: Dann, model: Any, head: nn.Linear | None) -> nn.Module:
    like, config = next(model.parameters()), model.config
    width: int = config.num_labels  # of logits and probabilities
    if isinstance(loss.layer, int):
        width = config.hidden_size
    elif loss.layer == "pooled":
        assert head is not None
        width = head.in_features
    first, last = (nn.Linear(*sizes, dtype=like.dtype) for sizes in ((width, loss.hidden_size), (loss.hidden_size, 1)))
    return nn.Sequential(first, nn.ReLU(), last)


def _scores(discriminator: nn.Module, features: torch.Tensor, factor: float) -> torch.Tensor:  # (B, D) -> (B,)
    dtype = next(discriminator.parameters()).dtype
    scores: torch.Tensor = discriminator(_Reversed.apply(features, factor).to(dtype))  # type: ignore[no-untyped-call]
    return scores.squeeze(-1)


def _of_rows(features: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:  # -> (B, D)
    """Of models that have logits for every token, (B, L, D), what the last one has, which is the row's."""
    if features.dim() == 2:
        return features
    last = attention_mask.sum(1) - 1
    return features[torch.arange(len(features), device=features.device), last]
