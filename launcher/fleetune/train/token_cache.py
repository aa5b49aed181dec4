"""What a language model's teacher says of every token that is learnt: its top classes, or some that were drawn from it.

part-00000.arrow   row: its number in its source; tokens: how many of its are learnt; ids and log_probs: theirs, in the
                   forms of token_codes.py

Log-probabilities are the whole teacher's at the distillation's temperature: of the top k classes of each token, or of R
classes drawn from it with repetition, which make an unbiased target (arXiv 2503.16870). Files are mapped into memory
and decoded row by row as training comes to them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow
import torch
from pyarrow import ipc

from fleetune.train import zero
from fleetune.train.alignment import Outputs, StoredTokens
from fleetune.train.batches import IGNORED, MicroBatch, collate_tokens
from fleetune.train.data import Split
from fleetune.train.sources import Ints
from fleetune.train.token_codes import decode_ids, decode_log_probs, encode_ids, encode_log_probs

Kind = Literal["top", "samples"]


@dataclass(frozen=True)
class Chosen:
    """Which classes of each token are stored."""

    kind: Kind
    count: int
    temperature: float
    vocabulary: int  # of the teacher's head, those that the student has too


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class CachedTokens:
    """In a teacher's place."""

    weight: float
    tail: Literal["zero", "uniform", "sampled"]
    chosen: Chosen
    tables: tuple[pyarrow.Table, ...]
    rows: Ints  # (N,) ascending
    places: Ints  # (N, 2): table and line

    def __call__(self, batch: MicroBatch) -> Outputs:
        """Of the tokens that the batch learns, in their order there."""
        k, device = self.chosen.count, batch.labels.device
        ids, log_probs = [np.zeros((0, k), dtype=np.int64)], [np.zeros((0, k), dtype=np.float32)]
        for row in batch.rows if batch.examples else ():
            table, line = self.places[np.searchsorted(self.rows, row)]
            stored = self.tables[table]
            count = stored["tokens"][int(line)].as_py()
            ids.append(decode_ids(stored["ids"][int(line)].as_py(), count, k))
            log_probs.append(decode_log_probs(stored["log_probs"][int(line)].as_py(), count, k))
        together, values = np.concatenate(ids), np.concatenate(log_probs)
        weights = None
        if self.chosen.kind == "samples":  # each class once, with how often it was drawn
            weights = _shares(together)
            values = np.where(weights > 0, values, -np.inf)
        tokens = StoredTokens(
            torch.from_numpy(together).to(device, non_blocking=True),
            torch.from_numpy(values).to(device, non_blocking=True),
            None if weights is None else torch.from_numpy(weights).to(device, non_blocking=True),
            self.tail,
            self.chosen.vocabulary,
        )
        return Outputs(None, stored=tokens)


def _shares(ids: Ints) -> Any:
    """(N, R) ascending -> at the first place of each class its share of the draws, and 0 at the others."""
    first = np.diff(ids, axis=1, prepend=-1) > 0
    number = np.cumsum(first, axis=1) - 1
    counts = np.zeros(ids.shape, dtype=np.float32)
    np.add.at(counts, (np.arange(len(ids))[:, None], number), 1.0)
    shares = np.take_along_axis(counts, number, axis=1) / ids.shape[1]
    return np.where(first, shares, np.float32(0.0))


def open_tokens(
    paths: list[Path], stored: dict[str, Any], share: float, tail: Literal["zero", "uniform"]
) -> CachedTokens:
    """Of parts that were checked."""
    chosen = Chosen(**stored["chosen"])
    tables = tuple(ipc.open_file(pyarrow.memory_map(str(path))).read_all() for path in paths)
    rows = np.concatenate([table["row"].to_numpy() for table in tables])
    places = np.concatenate(
        [np.stack([np.full(len(table), i), np.arange(len(table))], axis=1) for i, table in enumerate(tables)]
    )
    order = np.argsort(rows)
    how: Literal["zero", "uniform", "sampled"] = "sampled" if chosen.kind == "samples" else tail
    return CachedTokens(share, how, chosen, tables, rows[order], places[order])


# ---------------------------------------------------------------- writing


def said_of_tokens(
    teacher: Any, split: Split, rows: Ints, chosen: Chosen, seed: int, pad_token_id: int, device: torch.device
) -> list[tuple[int, bytes, bytes]]:
    """Of each row, which are run as one batch: its tokens that are learnt, their ids and log-probabilities in code.

    Samples are drawn from `seed` and the row's number. A collective where the teacher is cut over the ranks. Raises
    FloatingPointError for logits that are not finite.
    """
    batch = collate_tokens(split, [rows[i : i + 1] for i in range(len(rows))], pad_token_id)
    outputs = teacher(batch.to(device))
    found = []
    head = () if outputs.head is None else (outputs.head.weight, outputs.head.bias)
    with zero.gathered([weight for weight in head if weight is not None]):
        for at, (row, labels) in enumerate(zip(rows.tolist(), batch.labels, strict=True)):
            learnt = _logits(outputs, at, labels != IGNORED)[:, : chosen.vocabulary].float()
            log_probs = torch.log_softmax(learnt / chosen.temperature, -1)
            if torch.isnan(log_probs).any():
                raise FloatingPointError(f"its logits of training row {int(split.index[row])} are not finite")
            ids = _choose(log_probs, chosen, [seed, int(split.index[row])])
            picked = log_probs.gather(1, ids).cpu().numpy()
            found.append((len(learnt), encode_ids(ids.cpu().numpy()), encode_log_probs(picked)))
    return found


def write_tokens(path: Path, rows: Ints, said: list[tuple[int, bytes, bytes]]) -> None:
    """A part, by rename."""
    arrays = [pyarrow.array(column) for column in (rows, *map(list, zip(*said, strict=True)))]
    table = pyarrow.table(arrays, names=["row", "tokens", "ids", "log_probs"])
    beside = path.with_suffix(".part")
    with ipc.new_file(str(beside), table.schema) as file:
        file.write_table(table)
    put_in_place(beside, path)


def put_in_place(beside: Path, path: Path) -> None:
    """Renames a file that is whole on the disk, so that a power loss leaves none that only seems so."""
    with beside.open("rb+") as file:
        os.fsync(file.fileno())
    beside.replace(path)


def _logits(outputs: Outputs, row: int, learnt: torch.Tensor) -> torch.Tensor:
    """(tokens, V) of one row of the batch, those that are learnt: all of a batch's may be too many to hold."""
    if outputs.head is None:
        assert outputs.logits is not None
        return outputs.logits[row][learnt.to(outputs.logits.device)]
    hidden = outputs.head.hidden_states[row]
    return replace(outputs.head, hidden_states=hidden[learnt.to(hidden.device)]).logits()


def _choose(log_probs: torch.Tensor, chosen: Chosen, seed: list[int]) -> torch.Tensor:
    """(N, k) ascending; drawn from the row's own seed, so that a part that is written again is the same."""
    if chosen.kind == "top":
        return log_probs.topk(chosen.count, -1).indices.sort(-1).values
    random = np.random.default_rng(seed)
    uniform = torch.from_numpy(random.random((len(log_probs), chosen.count), dtype=np.float32)).to(log_probs.device)
    reached = log_probs.exp().cumsum(-1)
    reached = reached / reached[:, -1:]
    drawn = torch.searchsorted(reached, uniform).clamp(max=log_probs.shape[1] - 1)
    return drawn.sort(-1).values
