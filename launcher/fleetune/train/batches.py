"""Batches: which rows make a global batch, how it is cut over ranks and micro-batches, and how rows become tensors.

A global batch is composed from (seed, epoch, lengths) alone, never from the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from fleetune.batch import Batch
from fleetune.data_section import Augmentation
from fleetune.train.data import Split, encode
from fleetune.train.sources import Ints

IGNORED = -100  # a label that is none
POOL = 100  # global batches sorted together by length: enough that hardly any padding is left, few enough to stay mixed


def compose_epoch(
    lengths: Ints, global_batch_size: int, seed: int, epoch: int, group_by_length: bool = True
) -> list[Ints]:
    """The epoch's global batches: every row exactly once, in random order, rows of like length together.

    Rows are shuffled, cut into pools of POOL batches, sorted by length within each pool (ties stay shuffled), cut into
    batches, and the batches shuffled. What is left over makes the last, shorter batch. Within a batch rows ascend in
    length, so that neighbouring micro-batches pad alike.
    """
    random = np.random.default_rng(np.random.SeedSequence([seed, epoch]))
    order = random.permutation(len(lengths))
    whole = len(order) - len(order) % global_batch_size
    batches: list[Ints] = []
    pool = POOL * global_batch_size if group_by_length else global_batch_size
    for start in range(0, whole, pool):
        rows = order[start : min(start + pool, whole)]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        batches.extend(rows.reshape(-1, global_batch_size))
    batches = [batches[i] for i in random.permutation(len(batches))]
    if whole < len(order):
        last = order[whole:]
        batches.append(last[np.argsort(lengths[last], kind="stable")])
    return batches


def cut_window(rows: Ints, batch: Batch, rank: int) -> list[Ints]:
    """This rank's micro-batches of a global batch. All ranks get equally many; in a short window some may be empty."""
    return [slot[rank // batch.sequence_parallel_size] for slot in cut_slots(rows, batch)]


def cut_slots(rows: Ints, batch: Batch) -> list[list[Ints]]:
    """The micro-batches of a global batch, one list for each place in the window, of all readers."""
    slots = -(-len(rows) // (batch.micro_batch_size * batch.readers))
    pieces = np.array_split(rows, slots * batch.readers)
    return [pieces[slot * batch.readers : (slot + 1) * batch.readers] for slot in range(slots)]


@dataclass(frozen=True)
class MicroBatch:
    inputs: dict[str, torch.Tensor]  # input_ids, attention_mask (B, L); token_type_ids for pairs; position_ids of packs
    labels: torch.Tensor  # (B,); of language models (B, L): the next token, or -100 where none is learnt
    weights: torch.Tensor  # (B,) the examples' weights; 0 for a filler row; of language models (B, L): their tokens'
    rows: Ints  # (examples,) the rows' numbers in their source
    tokens: int  # without padding
    examples: int  # without filler rows
    supervised: torch.Tensor | None = None  # (R,) where `labels`, flattened, has a token to learn
    targets: int = 0  # so many rows of the target stand behind the examples, without label, and of weight 0
    everyone: tuple[int, ...] = ()  # where there is a target: the examples of every rank at this place in the window

    def to(self, device: torch.device) -> MicroBatch:
        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)

        return replace(
            self,
            inputs={name: move(tensor) for name, tensor in self.inputs.items()},
            labels=move(self.labels),
            weights=move(self.weights),
            supervised=None if self.supervised is None else move(self.supervised),
        )


def collate(
    split: Split, rows: Ints, pad_token_id: int, pad_to_multiple_of: int = 1, augment: Augmenter | None = None
) -> MicroBatch:
    """Pads to the longest row. No rows at all give one filler row of weight 0: every rank must run every collective."""
    if split.supervised is not None:
        return collate_tokens(split, [rows[i : i + 1] for i in range(len(rows))], pad_token_id, pad_to_multiple_of)
    filler = len(rows) == 0
    chosen = np.zeros(1, dtype=np.int64) if filler else rows
    if augment is not None:
        ids, types = augment(chosen), None
    else:
        spans = [slice(split.offsets[i], split.offsets[i + 1]) for i in chosen]
        ids = [split.input_ids[span] for span in spans]
        types = [split.token_type_ids[span] for span in spans] if split.token_type_ids is not None else None
    lengths = np.fromiter((len(row) for row in ids), dtype=np.int64, count=len(ids))
    width = -(-int(lengths.max()) // pad_to_multiple_of) * pad_to_multiple_of
    mask = np.arange(width) < lengths[:, None]  # (B, L)
    input_ids = np.full(mask.shape, pad_token_id, dtype=np.int64)
    input_ids[mask] = np.concatenate(ids)
    inputs = {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}
    if types is not None:
        token_type_ids = np.zeros(mask.shape, dtype=np.int64)
        token_type_ids[mask] = np.concatenate(types)
        inputs["token_type_ids"] = torch.from_numpy(token_type_ids)
    weights = np.ones(len(chosen), dtype=np.float32) if split.weights is None else np.array(split.weights[chosen])
    if filler:
        weights[:] = 0.0
    labels = np.full(len(chosen), IGNORED) if split.labels is None else np.array(split.labels[chosen])
    return MicroBatch(
        inputs,
        torch.from_numpy(labels),
        torch.from_numpy(weights),
        np.array(split.index[chosen]),
        0 if filler else int(lengths.sum()),
        0 if filler else len(chosen),
    )


def with_target(source: MicroBatch, target: MicroBatch, pad_token_id: int, everyone: tuple[int, ...]) -> MicroBatch:
    """Both as one micro-batch, the target's rows behind the source's. A filler row stays alone."""
    if not source.examples:
        return replace(source, everyone=everyone)
    width = max(micro.inputs["input_ids"].shape[1] for micro in (source, target))

    def widened(name: str, tensor: torch.Tensor) -> torch.Tensor:
        value = pad_token_id if name == "input_ids" else 0
        return functional.pad(tensor, (0, width - tensor.shape[1]), value=value)

    return replace(
        source,
        inputs={
            name: torch.cat([widened(name, tensor), widened(name, target.inputs[name])])
            for name, tensor in source.inputs.items()
        },
        labels=torch.cat([source.labels, target.labels.to(source.labels.dtype)]),
        weights=torch.cat([source.weights, torch.zeros_like(target.weights)]),
        tokens=source.tokens + target.tokens,
        targets=target.examples,
        everyone=everyone,
    )


def collate_tokens(
    split: Split, packs: list[Ints], pad_token_id: int, pad_to_multiple_of: int = 1, packed: bool = False
) -> MicroBatch:
    """Of a language model: the rows of each pack one after the other, as one sequence; a filler as `collate` makes it.

    With `packed` there is no attention mask: positions that begin again at 0 part the examples of a sequence, as
    Transformers' varlen attention, FlexAttention and block masks read them, and the padding is one example more.
    """
    filler = not packs
    packs = packs or [np.zeros(1, dtype=np.int64)]
    lengths = np.fromiter((split.lengths[rows].sum() for rows in packs), dtype=np.int64, count=len(packs))
    width = -(-int(lengths.max()) // pad_to_multiple_of) * pad_to_multiple_of
    input_ids = np.full((len(packs), width), pad_token_id, dtype=np.int64)
    labels = np.full_like(input_ids, IGNORED)
    weights = np.zeros(input_ids.shape, dtype=np.float32)
    positions = np.zeros_like(input_ids)
    for b, rows in enumerate(packs):
        start = 0
        for row in rows:
            span = slice(split.offsets[row], split.offsets[row + 1])
            ids, supervised = split.input_ids[span], split.supervised[span]  # type: ignore[index]
            stop = start + len(ids)
            input_ids[b, start:stop] = ids
            labels[b, start : stop - 1] = np.where(supervised[1:], ids[1:], IGNORED)
            weights[b, start:stop] = 1.0 if split.weights is None else split.weights[row]
            positions[b, start:stop] = np.arange(len(ids))
            start = stop
        positions[b, start:] = np.arange(width - start)
    if filler:
        labels[:], weights[:] = IGNORED, 0.0
    places = {"position_ids": positions} if packed else {"attention_mask": np.arange(width) < lengths[:, None]}
    inputs = {name: torch.from_numpy(array.astype(np.int64)) for name, array in places.items()}
    return MicroBatch(
        {"input_ids": torch.from_numpy(input_ids), **inputs},
        torch.from_numpy(labels),
        torch.from_numpy(weights),
        np.array(split.index[np.concatenate(packs)]),
        0 if filler else int(lengths.sum()),
        0 if filler else sum(map(len, packs)),
        torch.from_numpy(np.flatnonzero(labels != IGNORED)),
    )


class Augmenter:
    """Augments and tokenises training rows, each drawn from (seed, epoch, row) alone: any cut draws the same.

    `stream` sets another data set's draws apart.
    """

    def __init__(
        self,
        texts: Any,
        steps: list[Augmentation],
        tokenizer: Any,
        max_length: int,
        seed: int,
        epoch: int,
        stream: tuple[int, ...] = (),
    ) -> None:
        self.texts, self.steps, self.tokenizer, self.max_length = texts, steps, tokenizer, max_length
        self.seed, self.epoch, self.stream = seed, epoch, stream
        self.blank = tokenizer.mask_token or tokenizer.unk_token or ""

    def __call__(self, rows: Ints) -> list[Any]:
        texts = []
        for row, text in zip(rows, self.texts[rows.tolist()]["text"], strict=True):
            random = np.random.default_rng([self.seed, self.epoch, int(row), *self.stream])
            texts.append(augment_text(text, self.steps, self.blank, random))
        return list(encode(self.tokenizer, [texts], self.max_length)["input_ids"])


def augment_text(text: str, steps: list[Augmentation], blank: str, random: np.random.Generator) -> str:
    """Word by word. No step drops or deletes every word: where it would, one of them stays."""
    words = text.split()
    for step in steps:
        hit = random.random(len(words)) < step.probability
        if step.kind != "random_swap" and hit.all() and words:
            hit[random.integers(len(words))] = False
        if step.kind == "word_dropout":
            words = [blank if drop else word for word, drop in zip(words, hit, strict=True)]
        elif step.kind == "random_deletion":
            words = [word for word, drop in zip(words, hit, strict=True) if not drop]
        else:
            for i in np.flatnonzero(hit):
                j = int(random.integers(len(words)))
                words[i], words[j] = words[j], words[i]
    return " ".join(words)


def evaluation_batches(lengths: Ints, batch_size: int, world_size: int, rank: int) -> Iterator[Ints]:
    """Every row once over all ranks, sorted by length; the same number of batches on every rank, some perhaps empty."""
    order = np.argsort(lengths, kind="stable")[::-1]
    pieces = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    pieces += [order[:0]] * (-len(pieces) % world_size)
    yield from pieces[rank::world_size]
