"""Distillation of a linear head from a stored teacher: k classes of each row with their log-probabilities.

    q = softmax(s / tau), s = softcap(scale (x Wᵀ + b)); a_c is the target's weight of class c, p its probability
    kd = tau² sum_c a_c (log p_c - log q_c),  d/ds_c = tau (A q_c - a_c),  A = sum_c a_c
    zero: a = p on the k classes, 0 elsewhere. uniform: what the k lack to 1 is spread evenly over the other classes.
    sampled: R draws from the teacher at tau, a = count / R, p the teacher's own: unbiased for the whole forward KL.

One pass over each chunk of `head.py` makes A q less what is the same for all classes; at the k classes, and at the
label, the gradient is then written over it from logits kept in fp32, rather than added to what was rounded. Memory as
in `linear_distillation.py`, without a teacher's chunk. Sampling as in Anshumann et al. (arXiv 2503.16870).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch

from fleetune_kernels import reference
from fleetune_kernels.arguments import checked
from fleetune_kernels.backends import (
    as_autocast,
    choose,
    integers,
    scalar,
)
from fleetune_kernels.distillation import check_rows, checked_columns
from fleetune_kernels.divergences import Options as DivergenceOptions
from fleetune_kernels.divergences import checked_options
from fleetune_kernels.head import Wanted, walk
from fleetune_kernels.head_terms import check_labelled, counted, only_supervised, picked, register, terms
from fleetune_kernels.labels import check_classes
from fleetune_kernels.linear_cross_entropy import check_head
from fleetune_kernels.linear_distillation import checked_softcap
from fleetune_kernels.reference import Distilled
from fleetune_kernels.softmaxes import softmaxes
from fleetune_kernels.stored_teacher import check_values, checked_teacher


@dataclass(frozen=True)
class Options:
    """What the loss of a row depends on beside its logits, its label and the teacher."""

    vocab_size: int
    tail: str
    temperature: float
    softcap: float  # 0: none
    logit_scale: float
    ignore_index: int
    label_smoothing: float


@checked
def topk_distillation_loss(
    hidden_states: torch.Tensor,
    lm_head_weight: torch.Tensor,
    teacher_ids: torch.Tensor,
    teacher_log_probs: torch.Tensor,
    *,
    teacher_weights: torch.Tensor | None = None,
    tail: str = "zero",
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    bias: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    kd_num_items: torch.Tensor | float | None = None,
    ce_num_items: torch.Tensor | float | None = None,
    mask: torch.Tensor | None = None,
    token_weights: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    rows: torch.Tensor | None = None,
    low_memory: bool = False,
    backend: str = "auto",
) -> Distilled:
    """`Distilled`, scalars in fp32 (fp64 for fp64): the loss; kd and ce, detached, without their weights.

    Divisors, `rows` and `low_memory` as in `linear_distillation_loss`. An empty place may hold any id. The gradients
    are those of the head and its hidden states; the teacher's values are never differentiated.

    Args:
        hidden_states: (..., D), floating-point.
        lm_head_weight: (V, D), in their dtype.
        teacher_ids: (..., k), integer classes, distinct in a row.
        teacher_log_probs: (..., k), of them, at the temperature; -inf marks an empty place.
        teacher_weights: (..., k), count / R of R draws from the teacher; for the tail `sampled` alone.
        tail: zero, uniform or sampled: what the other classes have.
        temperature: tau, a finite number above 0.
        teacher_temperature: at which the log-probabilities were stored, where the caller knows it.
        bias: (V,), of the head.
        labels: (...), integer classes, or `ignore_index` where a row has none.
        kd_weight: multiplies the divergence.
        ce_weight: multiplies the labels' cross-entropy.
        kd_num_items: what the divergence is divided by: a number, or a tensor of one element on the device.
        ce_num_items: what the cross-entropy is divided by, likewise.
        mask: (...) bool, True where a row counts; by default where it has a label, or all.
        token_weights: (...), the weight of each row.
        ignore_index: the label of a row that has none.
        label_smoothing: the share of the target, 0 to 1, that is spread over all classes.
        softcap: c of c tanh(logit / c), which keeps logits between -c and c; None leaves them.
        logit_scale: multiplies the logits, before the cap.
        vocab_size: how many of the head's first rows are classes; the rest is padding.
        rows: (R,), distinct indices of the flattened rows that count in either term, where the host knows them.
        low_memory: whether gradients are formed in the backward pass: less memory, for one more product.
        backend: auto, triton, torch or reference.

    Raises:
        ValueError: an argument that is wrong, by name; a teacher stored at another temperature, which k values cannot
            undo. On a CPU also: a label or an id that is no class (nan on a GPU, where looking would wait for the
            device); rows as in `linear_cross_entropy`; in a row that counts a class twice, log-probabilities above 0
            or negative weights (a loss without meaning on a GPU).
        RuntimeError: a backward pass with create_graph=True.
    """
    hidden_states, lm_head_weight, bias = as_autocast(hidden_states, lm_head_weight, bias)
    width = check_head(hidden_states, lm_head_weight, bias, rows)
    columns = checked_columns(vocab_size, width)
    cap = checked_softcap("softcap", softcap)
    checked_options(DivergenceOptions(columns, temperature, label_smoothing=label_smoothing))
    check_labelled(ce_weight, labels)
    labels = None if labels is None else integers("labels", labels)
    kd_num_items = None if kd_num_items is None else scalar("kd_num_items", kd_num_items, hidden_states)
    ce_num_items = None if ce_num_items is None else scalar("ce_num_items", ce_num_items, hidden_states)
    check_rows(hidden_states, "hidden_states", mask, token_weights, labels)
    check_classes(labels, columns, ignore_index)
    filled = checked_teacher(hidden_states, teacher_ids, teacher_log_probs, teacher_weights, tail, columns)
    if teacher_temperature is not None and teacher_temperature != temperature:
        known = f"the log-probabilities were stored at {teacher_temperature} and cannot be recomputed"
        raise ValueError(f"temperature: {temperature}; {known}")
    which = choose(backend, hidden_states)
    mask, labels = only_supervised(hidden_states, mask, labels, rows, ignore_index)
    check_values(teacher_ids, teacher_log_probs, teacher_weights, mask, columns)
    if which == "reference":
        return reference.topk_distillation_loss(
            hidden_states,
            lm_head_weight,
            teacher_ids.masked_fill(~filled, 0),
            teacher_log_probs,
            teacher_weights=teacher_weights,
            tail=tail,
            temperature=temperature,
            bias=bias,
            labels=labels,
            kd_weight=kd_weight,
            ce_weight=ce_weight,
            kd_num_items=kd_num_items,
            ce_num_items=ce_num_items,
            mask=mask,
            token_weights=token_weights,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            softcap=softcap,
            logit_scale=logit_scale,
            vocab_size=vocab_size,
        )
    weights, divisors = (kd_weight, ce_weight), (kd_num_items, ce_num_items)
    both = terms(hidden_states, mask, labels, token_weights, weights, divisors, ignore_index)
    places = (-1, teacher_ids.shape[-1])
    differentiable = torch.is_grad_enabled()
    loss, sums, *_ = torch.ops.fleetune.topk_distillation(
        hidden_states.reshape(-1, hidden_states.shape[-1]),
        lm_head_weight,
        bias,
        teacher_ids.reshape(places),
        teacher_log_probs.detach().reshape(places),
        None if teacher_weights is None else teacher_weights.detach().reshape(places),
        None if mask is None else mask.reshape(-1),
        None if labels is None else labels.reshape(-1),
        None if token_weights is None else token_weights.detach().reshape(-1),
        rows,
        both.kd_scale,
        both.ce_scale,
        differentiable and hidden_states.requires_grad,
        differentiable and lm_head_weight.requires_grad,
        differentiable and bias is not None and bias.requires_grad,
        low_memory,
        which,
        *asdict(Options(columns, tail, temperature, cap, logit_scale, ignore_index, label_smoothing)).values(),
    )
    return both.distilled(loss, sums)


@torch.library.custom_op("fleetune::topk_distillation", mutates_args=())
def _op(
    hidden: torch.Tensor,  # (N, D)
    head: torch.Tensor,  # (V, D)
    bias: torch.Tensor | None,  # (V,)
    teacher_ids: torch.Tensor,  # (N, k)
    teacher_log_probs: torch.Tensor,  # (N, k)
    teacher_weights: torch.Tensor | None,  # (N, k)
    mask: torch.Tensor | None,  # (N,)
    labels: torch.Tensor | None,  # (N,)
    token_weights: torch.Tensor | None,  # (N,)
    rows: torch.Tensor | None,  # (R,)
    kd_scale: torch.Tensor,  # scalars: what the sums of the two terms are multiplied by
    ce_scale: torch.Tensor,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
    low_memory: bool,
    backend: str,
    vocab_size: int,
    tail: str,
    temperature: float,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss, the sums (2,) of its terms, and the gradients of the loss where they are wanted and known."""
    options = Options(vocab_size, tail, temperature, softcap, logit_scale, ignore_index, label_smoothing)
    wanted = Wanted(want_hidden and not low_memory, want_weight and not low_memory, want_bias and not low_memory)
    rows = counted(mask, labels, rows, ignore_index)
    by_row = (teacher_ids, teacher_log_probs, teacher_weights, mask, labels, token_weights)
    ids, log_probs, shares, mask, labels, weights = (picked(tensor, rows) for tensor in by_row)
    assert ids is not None
    assert log_probs is not None
    count = len(ids)
    weights = kd_scale.new_ones(count) if weights is None else weights.to(kd_scale.dtype)
    mask = torch.ones_like(weights, dtype=torch.bool) if mask is None else mask
    labeled = labels is not None
    labels = torch.full_like(ids[:, 0], ignore_index, dtype=torch.long) if labels is None else labels
    supervised = labels != ignore_index
    kd_coefficients = (weights * kd_scale).masked_fill(~mask, 0.0)
    ce_coefficients = (weights * ce_scale).masked_fill(~supervised, 0.0)
    losses = weights.new_zeros(2, count)

    def turn(logits: torch.Tensor, at: slice) -> None:
        target = _target(
            ids[at], log_probs[at].to(weights.dtype), None if shares is None else shares[at], mask[at], options
        )
        losses[:, at] = _rows(
            logits, wanted.any, target, labels[at], kd_coefficients[at], ce_coefficients[at], labeled, options, backend
        )

    gradients = walk(hidden, head, bias, rows, vocab_size, wanted, turn)
    losses = losses.where(torch.stack([mask, supervised]), 0.0)
    sums = (losses * weights).sum(1)  # no matrix product: autocast would round it
    loss = kd_scale * sums[0] + ce_scale * sums[1]
    return loss, sums, gradients.hidden, gradients.weight, gradients.bias


register(_op, "topk_distillation_loss", tensors=12)


class Target(NamedTuple):
    """What the teacher says of a chunk's rows."""

    ids: torch.Tensor  # (r, k): classes; an empty place repeats one of its row, with its share
    shares: torch.Tensor  # (r, k): a at the ids
    log_probs: torch.Tensor  # (r, k), finite
    filled: torch.Tensor  # (r, k)
    others: torch.Tensor  # (r,): how many classes are in no place
    elsewhere: torch.Tensor  # (r,): a in each of those
    mass: torch.Tensor  # (r,): A


def _target(
    ids: torch.Tensor,  # (r, k)
    log_probs: torch.Tensor,  # (r, k)
    weights: torch.Tensor | None,  # (r, k)
    mask: torch.Tensor,  # (r,)
    options: Options,
) -> Target:
    filled = (log_probs != -torch.inf) & mask.unsqueeze(1)  # a nan is no empty place: it makes the loss nan
    log_probs = log_probs.masked_fill(~filled, 0.0)
    shares = (log_probs.exp() if weights is None else weights.to(log_probs.dtype)).masked_fill(~filled, 0.0)
    outside = (ids < 0) | (ids >= options.vocab_size)
    # An id that is no class makes the loss nan, which stops a training run.
    shares = shares.masked_fill(filled & outside, torch.nan)
    ids = ids.long().masked_fill(outside, 0)
    mass, others = shares.sum(1), options.vocab_size - filled.sum(1)
    elsewhere = torch.zeros_like(mass)
    if options.tail == "uniform":
        elsewhere = torch.where(others > 0, (1 - mass).clamp(min=0) / others.clamp(min=1), 0.0)
        mass = mass + others * elsewhere
    # What is written at an empty place is then written at a filled one too, or where nothing is filled, at a class
    # that is no different from others.
    first = filled.byte().argmax(1, keepdim=True)
    usual = torch.where(filled.any(1, keepdim=True), shares.gather(1, first), elsewhere.unsqueeze(1))
    shares = torch.where(filled, shares, usual)
    return Target(torch.where(filled, ids, ids.gather(1, first)), shares, log_probs, filled, others, elsewhere, mass)


def _rows(
    logits: torch.Tensor,  # (r, V): overwritten, where asked for by the gradient
    with_gradient: bool,
    target: Target,
    labels: torch.Tensor,  # (r,)
    kd_coefficients: torch.Tensor,  # (r,), 0 where the row does not count
    ce_coefficients: torch.Tensor,  # (r,)
    labeled: bool,
    options: Options,
    backend: str,
) -> torch.Tensor:
    """The losses (2, r) without the coefficients, of any value where the row does not count."""
    tau, smoothing, spread = options.temperature, options.label_smoothing, options.label_smoothing / options.vocab_size
    spreads = options.tail == "uniform" or (labeled and smoothing > 0)  # something is the same for all classes
    no_class = (labels < 0) | (labels >= options.vocab_size)
    places = torch.cat([target.ids, torch.where(no_class, target.ids[:, 0], labels.long()).unsqueeze(1)], 1)
    # (r, k + 1), before anything is written
    x = reference.capped(
        logits.gather(1, places).to(kd_coefficients.dtype), options.softcap or None, options.logit_scale
    )
    largest, log_sum, log_sum_plain, total = softmaxes(
        logits,
        with_gradient,
        tau * kd_coefficients * target.mass,
        ce_coefficients if labeled else None,
        tau * kd_coefficients * target.elsewhere + ce_coefficients * spread if spreads else None,
        tau,
        options.softcap,
        options.logit_scale,
        backend,
    )
    below = x - largest.unsqueeze(1)
    log_q, log_q_plain = below / tau - log_sum.unsqueeze(1), below - log_sum_plain.unsqueeze(1)
    if with_gradient:
        shares = torch.cat([target.shares, _share_of_label(target, places, no_class).unsqueeze(1)], 1)
        of_label = log_q_plain.exp() - spread - (1 - smoothing) * (places == places[:, -1:]).to(x.dtype)
        gradient = tau * kd_coefficients.unsqueeze(1) * (target.mass.unsqueeze(1) * log_q.exp() - shares)
        gradient = gradient + ce_coefficients.unsqueeze(1) * of_label
        if options.softcap:
            gradient = gradient * (1 - (x / options.softcap).square())
        counts = ((kd_coefficients != 0) | (ce_coefficients != 0)).unsqueeze(1)
        logits.scatter_(1, places, (gradient * options.logit_scale).where(counts, 0.0).to(logits.dtype))
    all_below = total - options.vocab_size * largest
    ce = (smoothing - 1) * log_q_plain[:, -1] - (spread * all_below - smoothing * log_sum_plain if smoothing else 0.0)
    kd = tau**2 * _divergence(target, log_q[:, :-1], all_below / tau - options.vocab_size * log_sum)
    return torch.stack([kd, ce.masked_fill(no_class, torch.nan)])


def _share_of_label(target: Target, places: torch.Tensor, no_class: torch.Tensor) -> torch.Tensor:
    """a at the last place (r,), which may be among the ids, so that both write the same."""
    among = target.filled & (target.ids == places[:, -1:])
    share = torch.where(among.any(1), torch.where(among, target.shares, 0.0).sum(1), target.elsewhere)
    return torch.where(no_class, target.shares[:, 0], share)  # it then repeats the first id


def _divergence(
    target: Target,
    log_q: torch.Tensor,  # (r, k), at the ids
    of_all: torch.Tensor,  # (r,): the sum of log q over all classes
) -> torch.Tensor:
    """sum_c a_c (log p_c - log q_c)."""
    kept = target.filled & (target.shares != 0)
    kd = torch.where(kept, target.shares * (target.log_probs - log_q), 0.0).sum(1)
    of_others = of_all - torch.where(target.filled, log_q, 0.0).sum(1)
    tail = torch.xlogy(target.others * target.elsewhere, target.elsewhere) - target.elsewhere * of_others
    return kd + torch.where(target.elsewhere > 0, tail, 0.0)
