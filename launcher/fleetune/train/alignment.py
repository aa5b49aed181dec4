"""What a student is drawn to inside its teachers: which layer to which, and the projections between their widths.

A projection is a matrix W (D_teacher, D_student) that is learnt with the student (TinyBERT, arXiv 1909.10351). It is a
module of the student's own, inside the engine and the checkpoint, and left out of the model that is saved.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from fleetune.losses import Attention, Embedding, HiddenStates, layers_of
from fleetune.schema import Recipe, losses_of
from fleetune.train.head import Head, has_fused_head
from fleetune.train.surgery import FAMILIES, value_projections

T = TypeVar("T")
PROJECTIONS = "projections"  # of the student's module, by Match.name
EMBEDDING = -1  # as a layer's number


@dataclass(frozen=True)
class StoredTokens:
    """A stored teacher's classes of the R tokens that a batch learns, in their order there."""

    ids: torch.Tensor  # (R, k)
    log_probs: torch.Tensor  # (R, k) at the loss's temperature; -inf marks an empty place
    weights: torch.Tensor | None  # (R, k) shares of the draws, where they were drawn
    tail: str  # zero | uniform | sampled
    vocabulary: int  # of the head's rows those that count


@dataclass(frozen=True)
class Outputs:
    """Of one forward pass; all but the logits only where they are asked for."""

    logits: torch.Tensor | None  # (B, C), of language models (B, L, V); None where `head` stands for them
    hidden_states: tuple[torch.Tensor, ...] = ()  # the embedding's, then each layer's (B, L, D)
    attentions: tuple[torch.Tensor, ...] = ()  # each layer's (B, H, L, L)
    values: tuple[torch.Tensor, ...] = ()  # each layer's (B, L, D_v), before they are cut into heads
    projected: dict[str, torch.Tensor] = field(default_factory=dict)  # (B, L, D of the teacher), by Match.name
    head: Head | None = None  # of language models
    stored: StoredTokens | None = None  # of a language model's teacher, in its place
    read: dict[str, torch.Tensor] = field(default_factory=dict)  # (B, D) or (B, L, D), of the layers that have names
    domain_logits: dict[str, torch.Tensor] = field(default_factory=dict)  # (B,) each discriminator's


@dataclass(frozen=True)
class Asked:
    """What the losses need of both models beside their logits."""

    hidden_states: bool = False
    attentions: bool = False
    values: bool = False

    def keywords(self) -> dict[str, bool]:
        names = {"output_hidden_states": self.hidden_states, "output_attentions": self.attentions}
        return {name: True for name, asked in names.items() if asked}


def asked_by(recipe: Recipe) -> Asked:
    losses = losses_of(recipe)
    compared = {loss.compare for loss in losses if isinstance(loss, Attention)}
    by_number = any(isinstance(layer, int) for loss in losses for layer in layers_of(loss))
    return Asked(
        by_number or any(isinstance(loss, HiddenStates | Embedding) for loss in losses),
        "maps" in compared,
        "values" in compared,
    )


@dataclass(frozen=True)
class Match:
    """One layer of the student, and the layer of a teacher that one of the losses draws it to."""

    loss: int  # its place in the recipe's list
    teacher: int
    student_layer: int
    teacher_layer: int
    widths: tuple[int, int]  # of the student's features and the teacher's
    heads: int  # the student's

    @property
    def name(self) -> str:
        return f"losses_{self.loss}_teacher_{self.teacher}_{self.student_layer}_{self.teacher_layer}"


def matches_of(recipe: Recipe, student: Any, teachers: list[Any]) -> list[Match]:
    """By the models' configs. Raises ValueError, which names the key, where the layers, widths or heads do not fit."""
    found = []
    for index, loss in enumerate(losses_of(recipe)):
        if isinstance(loss, HiddenStates | Attention | Embedding):
            key = f"losses.{index}"
            for config in (student, *teachers):
                known = all(hasattr(config, n) for n in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
                if getattr(config, "is_encoder_decoder", False) or not known:
                    raise ValueError(
                        f"{key}.kind = {loss.kind!r}: a {config.model_type} model has no single row of layers; "
                        "distillation learns from its logits alone"
                    )
            for number, teacher in enumerate(teachers):
                if isinstance(loss, Attention):
                    _check_heads(loss, key, student, teacher)
                elif not loss.projection and student.hidden_size != teacher.hidden_size:
                    raise ValueError(
                        f"{key}.projection = False: the student's features are {student.hidden_size} wide and the "
                        f"teacher's {teacher.hidden_size}: they need a projection"
                    )
                widths = (int(student.hidden_size), int(teacher.hidden_size))
                pairs = [(EMBEDDING, EMBEDDING)] if isinstance(loss, Embedding) else _pairs(loss, key, student, teacher)
                heads = int(student.num_attention_heads)
                found += [Match(index, number, i, j, widths, heads) for i, j in pairs]
    return found


def _pairs(loss: HiddenStates | Attention, key: str, student: Any, teacher: Any) -> list[tuple[int, int]]:
    of_student, of_teacher = int(student.num_hidden_layers), int(teacher.num_hidden_layers)
    if loss.layer_map == "last":
        return [(of_student - 1, of_teacher - 1)]
    if loss.layer_map == "uniform":
        # As deep in its own model, and the last to the last.
        return [(i, max(1, round((i + 1) * of_teacher / of_student)) - 1) for i in range(of_student)]
    for i, j in loss.layer_map:
        for layer, layers, whose in ((i, of_student, "student"), (j, of_teacher, "teacher")):
            if layer >= layers:
                raise ValueError(
                    f"{key}.layer_map = {[list(pair) for pair in loss.layer_map]}: the {whose} has no layer {layer}; "
                    f"its layers are 0 to {layers - 1}"
                )
    return [(i, j) for i, j in loss.layer_map]


def _check_heads(loss: Attention, key: str, student: Any, teacher: Any) -> None:
    if loss.compare == "values":
        for config, whose in ((student, "student"), (teacher, "teacher")):
            if config.model_type not in FAMILIES:
                raise ValueError(
                    f"{key}.compare = 'values': where a {config.model_type} model (the {whose}) has its values is not "
                    f"known; known are {', '.join(FAMILIES)}"
                )
        heads = loss.relation_heads or int(student.num_attention_heads)
        for config, whose in ((student, "student"), (teacher, "teacher")):
            if _value_width(config) % heads:
                raise ValueError(
                    f"{key}.relation_heads = {heads}: does not divide the {whose}'s values, {_value_width(config)} wide"
                )
        return
    if student.num_attention_heads != teacher.num_attention_heads:
        raise ValueError(
            f"{key}.compare = 'maps': the student has {student.num_attention_heads} heads and the teacher "
            f"{teacher.num_attention_heads}; use values, which compares any numbers"
        )
    if student._attn_implementation != "eager":
        raise ValueError(
            f"{key}.compare = 'maps': needs model.attn_implementation: eager; other ways never form the maps "
            f"(this is {student._attn_implementation})"
        )
    for name in ("attention_probs_dropout_prob", "attention_dropout"):
        if getattr(student, name, 0.0):
            raise ValueError(
                f"{key}.compare = 'maps': the student's maps would be compared after dropout; "
                f"set model.config.{name}: 0.0 (it is {getattr(student, name)})"
            )


def _value_width(config: Any) -> int:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(head * (getattr(config, "num_key_value_heads", None) or config.num_attention_heads))


# ---------------------------------------------------------------- the student's module


def add_projections(model: nn.Module, matches: list[Match], recipe: Recipe) -> None:
    """Gives the model a projection for each match of unequal widths, drawn from training.seed.

    They are computed within its own forward pass, where ZeRO-3 has their weights.
    """
    losses = losses_of(recipe)
    wanted = [m for m in matches if m.widths[0] != m.widths[1] and not isinstance(losses[m.loss], Attention)]
    if not wanted:
        return
    like = next(model.parameters())
    torch.manual_seed(recipe.training.seed)
    made = {match.name: nn.Linear(*match.widths, bias=False, dtype=like.dtype) for match in wanted}
    model.add_module(PROJECTIONS, nn.ModuleDict(made))
    plain = model.forward

    def projected(outputs: Any) -> Any:
        outputs["projected"] = {
            match.name: made[match.name](outputs.hidden_states[match.student_layer + 1]) for match in wanted
        }
        return outputs

    def forward(self: nn.Module, *inputs: Any, compute: Callable[..., Any] | None = None, **keywords: Any) -> Any:
        if not keywords.get("output_hidden_states"):
            return plain(*inputs, **keywords, **({} if compute is None else {"compute": compute}))
        if compute is not None:  # of a fused head
            return plain(*inputs, **keywords, compute=lambda head, outputs: compute(head, projected(outputs)))
        return projected(plain(*inputs, **keywords))

    model.forward = types.MethodType(forward, model)


def run(
    forward: Callable[..., Any],
    module: nn.Module,
    inputs: dict[str, Any],
    asked: Asked,
    compute: Callable[[Outputs], T],
) -> T:
    """What `compute` makes of one forward pass by the module's engine, or by itself, with all that is asked for.

    Of a language model with a fused head it runs within the pass, where its head's weight is whole.
    """
    values: list[torch.Tensor] = []
    layers: Iterator[nn.Module] | tuple[()] = iter(value_projections(module)) if asked.values else ()
    hooks = [layer.register_forward_hook(lambda _module, _inputs, output: values.append(output)) for layer in layers]

    def found(outputs: Any, logits: torch.Tensor | None, head: Head | None) -> Outputs:
        return Outputs(
            logits,
            tuple(outputs.hidden_states) if asked.hidden_states else (),
            tuple(outputs.attentions) if asked.attentions else (),
            tuple(values),
            outputs.get("projected") or {},
            head,
            read=outputs.get("read") or {},
            domain_logits=outputs.get("domain_logits") or {},
        )

    keywords = asked.keywords()
    if getattr(module, "can_generate", bool)():
        keywords["use_cache"] = False  # where there is a cache, Transformers does not look for packs
    try:
        if has_fused_head(module):
            result: T = forward(**inputs, **keywords, compute=lambda head, outputs: compute(found(outputs, None, head)))
            return result
        outputs = forward(**inputs, **keywords)
        return compute(found(outputs, outputs.logits, None))
    finally:
        for hook in hooks:
            hook.remove()
