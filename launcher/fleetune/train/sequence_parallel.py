"""Sequence parallelism: neighbouring ranks share their sequences, each with a slice of the tokens (DeepSpeed Ulysses).

All but attention looks at tokens one by one. Attention exchanges: each rank gives its slice of the heads that are
another's, and gets the whole sequence for its own heads; its output goes the way back (Jacobs et al. 2023, arXiv
2309.14509). DeepSpeed's own wrapper drops every mask, which packs need where attention is not FlashAttention's, and
takes one batch size, so the exchange stands here.

Each rank's loss is of its own tokens, and the exchange's backward pass is the exchange: gradients add up over all
ranks as those of data parallelism do.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fleetune.schema import RecipeError
from fleetune.train.batches import IGNORED, MicroBatch
from fleetune.train.distributed import World
from fleetune.train.head import CLOSE, apart

WHOLE = "whole_position_ids"  # (B, L) of the sequences whose slices the model reads; attention gets it as a keyword


def share_of(micro: MicroBatch, place: int, size: int) -> MicroBatch:
    """The slice number `place` of `size` of every sequence, whose width `size` divides; labels are shifted already.

    No padding mask: behind the end of a causal sequence nobody is seen. Examples, and tokens with the padding left out,
    are counted by the first slice for all.
    """
    ids = micro.inputs["input_ids"]
    width, rest = divmod(ids.shape[1], size)
    assert not rest
    positions = micro.inputs.get("position_ids")
    if positions is None:
        positions = torch.arange(ids.shape[1]).expand_as(ids).contiguous()

    def cut(tensor: torch.Tensor) -> torch.Tensor:  # (B, L) -> (B, L / size)
        return tensor[:, place * width : (place + 1) * width].contiguous()

    labels = cut(micro.labels)
    return replace(
        micro,
        inputs={"input_ids": cut(ids), "position_ids": cut(positions), WHOLE: positions},
        labels=labels,
        weights=cut(micro.weights),
        tokens=0 if place else micro.tokens,
        examples=0 if place else micro.examples,
        supervised=torch.nonzero(labels.flatten() != IGNORED).squeeze(1),
    )


# ---------------------------------------------------------------- the model


@dataclass
class _Reading:
    """What the masks of the forward pass that runs are made for; None: of what the model reads, as ever."""

    positions: torch.Tensor | None = None


def check_attention(kind: str, size: int) -> None:
    """Raises RecipeError for attention that stands in the model's own code, where nothing can come between."""
    if size > 1 and kind == "eager":
        raise RecipeError(
            f"training.sequence_parallel_size = {size}: this model's attention is eager, which cannot share its heads "
            "among ranks; set model.attn_implementation"
        )


def share_sequences(model: Any, size: int, world: World) -> None:
    """Lets the model's forward pass read slices: with `whole_position_ids`, its attention is over whole sequences.

    A collective. Transformers' attention of the model's kind, and its masks, are replaced in this process; without that
    keyword they do what they did. Raises RecipeError for attention that is not replaced so.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    kind = model.config._attn_implementation
    check_attention(kind, size)
    attention, mask = AttentionInterface._global_mapping[kind], AttentionMaskInterface._global_mapping[kind]
    group, reading = _group(size, world), _Reading()
    ALL_ATTENTION_FUNCTIONS[kind] = functools.partial(_attend, attention, group)
    ALL_MASK_ATTENTION_FUNCTIONS[kind] = functools.partial(_mask, mask, reading)
    plain = model.forward

    @functools.wraps(plain)
    def forward(*inputs: Any, whole_position_ids: torch.Tensor | None = None, **keywords: Any) -> Any:
        if whole_position_ids is None:
            return plain(*inputs, **keywords)
        reading.positions = whole_position_ids
        # With a mask, and be it of ones, Transformers does not look for packs in a slice.
        ones = torch.ones_like(keywords["input_ids"])
        try:
            return plain(*inputs, attention_mask=ones, **{WHOLE: whole_position_ids}, **keywords)
        finally:
            reading.positions = None

    model.forward = forward


def _group(size: int, world: World) -> dist.ProcessGroup:
    """This rank and those with which it shares sequences: neighbours, which are on one node where they can be."""
    starts = range(0, world.world_size, size)
    groups = [dist.new_group(list(range(start, start + size))) for start in starts]  # all ranks make every one
    found: dist.ProcessGroup = groups[world.rank // size]
    return found


def _mask(plain: Callable[..., Any], reading: _Reading, **keywords: Any) -> Any:
    """Transformers' mask of the family's own pattern (causal, sliding), for whole sequences and the packs in them."""
    if reading.positions is None:
        return plain(**keywords)
    length, pattern = reading.positions.shape[1], keywords["mask_function"]
    keywords |= {"q_length": length, "kv_length": length, "attention_mask": None}
    starts = reading.positions.diff(dim=1) != 1
    if bool(starts.any()):
        examples = torch.nn.functional.pad(starts.cumsum(1), (1, 0))  # (B, L) which example of its pack a token is of

        def within(b: Any, head: Any, q: Any, k: Any) -> Any:
            return pattern(b, head, q, k) & (examples[b, q] == examples[b, k])

        keywords |= {"mask_function": within, "allow_is_causal_skip": False}
    return plain(**keywords)


def _attend(
    plain: Callable[..., Any],
    group: dist.ProcessGroup,
    module: nn.Module,
    query: torch.Tensor,  # (B, H, L / S, D)
    key: torch.Tensor,  # (B, K, L / S, D), K divides H
    value: torch.Tensor,
    attention_mask: Any,
    *,
    whole_position_ids: torch.Tensor | None = None,
    **keywords: Any,
) -> tuple[torch.Tensor, Any]:  # (B, L / S, H, D)
    """One of Transformers' attention functions, over whole sequences for this rank's H / S heads."""
    if whole_position_ids is None:
        return plain(module, query, key, value, attention_mask, **keywords)  # type: ignore[no-any-return]
    size = dist.get_world_size(group)
    copies = math.lcm(key.shape[1], size) // key.shape[1]  # so that every rank has the keys of its own heads
    query, key, value = (
        _whole_sequence(heads, group)
        for heads in (query, key.repeat_interleave(copies, 1), value.repeat_interleave(copies, 1))
    )
    keywords["position_ids"] = whole_position_ids  # by which FlashAttention finds the packs of a single row
    with _grouped(module, query.shape[1] // key.shape[1]):
        output, _ = plain(module, query, key, value, attention_mask, **keywords)  # (B, L, H / S, D)
    return _all_heads(output, group), None


@contextlib.contextmanager
def _grouped(module: Any, heads: int) -> Iterator[None]:
    """While so many heads share a key."""
    own = getattr(module, "num_key_value_groups", None)
    if own is None:
        yield
        return
    module.num_key_value_groups = heads
    try:
        yield
    finally:
        module.num_key_value_groups = own


def _whole_sequence(heads: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """(B, H, L / S, D) of all heads -> (B, H / S, L, D) of this rank's."""
    blocks = torch.stack(heads.chunk(dist.get_world_size(group), 1))  # (S, B, H / S, L / S, D)
    return _exchange(blocks, group).movedim(0, 2).flatten(2, 3)


def _all_heads(output: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """(B, L, H / S, D) of this rank's heads -> (B, L / S, H, D) of all."""
    blocks = torch.stack(output.chunk(dist.get_world_size(group), 1))  # (S, B, L / S, H / S, D)
    return _exchange(blocks, group).movedim(0, 2).flatten(2, 3)


def _exchange(blocks: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """(S, ...): block i goes to the group's rank i, and its block comes here. Its own transpose."""
    found: torch.Tensor = _Exchange.apply(blocks, group)  # type: ignore[no-untyped-call]
    return found


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, blocks: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        blocks = blocks.contiguous()
        found = torch.empty_like(blocks)
        dist.all_to_all_single(found, blocks, group=group)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _exchange(gradients[0], ctx.group), None


# ---------------------------------------------------------------- whether the model lets itself be shared

SHARE = 4  # tokens of each rank in the test


@torch.no_grad()
def check_shared(forward: Callable[..., Any], size: int, config: Any, world: World) -> None:
    """That slices give the logits that whole sequences give, packed or not: a family may mix tokens elsewhere too.

    A collective. Raises RecipeError, on every rank, where they differ.
    """
    length, place = SHARE * size, world.rank % size
    here = slice(place * SHARE, (place + 1) * SHARE)
    ids = torch.arange(length, device=world.device)[None] % config.vocab_size
    plain = torch.arange(length, device=world.device)[None]
    border = length // 2 + 1  # within a slice, with an example before it that reaches over a border
    packed = torch.cat([plain[:, :border], plain[:, : length - border]], dim=1)
    for positions in (plain, packed):
        whole = forward(input_ids=ids, position_ids=positions, use_cache=False).logits[:, here]
        inputs = {"input_ids": ids[:, here], "position_ids": positions[:, here], WHOLE: positions}
        shared = forward(**inputs, use_cache=False).logits
        worst = apart(shared, whole).nan_to_num(nan=math.inf)  # which the reduction may drop
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        if not float(worst) <= CLOSE.get(whole.dtype, 0.05):
            raise RecipeError(
                f"training.sequence_parallel_size = {size}: slices of a {config.model_type} model's sequences do not "
                f"give the logits of the whole (off by {float(worst):.1e} of the largest): its tokens mix elsewhere "
                "too, or it does not keep packs apart"
            )
