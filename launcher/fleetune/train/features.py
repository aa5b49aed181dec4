"""What a pretrained encoder makes of texts: the mean over each text's tokens of the last hidden state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fleetune.model_section import Model
from fleetune.train.batches import collate, evaluation_batches
from fleetune.train.data import PIECE, Split, encode
from fleetune.train.model import ModelError, check_length, load

BATCH_SIZE = 64


@dataclass(frozen=True)
class Encoder:
    tokenizer: Any
    model: nn.Module  # frozen, in eval mode, in fp32
    device: torch.device
    max_length: int


def load_encoder(model: Model, max_length: int) -> Encoder:
    """Without its head, on the GPU where there is one. Raises ModelError."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer, logging

    logging.set_verbosity_error()  # a head that is left out is meant
    config = load(AutoConfig, model)
    check_length(config, max_length, "the model")
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"model.model_name_or_path = {model.model_name_or_path!r}: has an encoder and a decoder; should have one"
        )
    tokenizer = load(AutoTokenizer, model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load(AutoModel, model, dtype=torch.float32).requires_grad_(False).eval().to(device)
    return Encoder(tokenizer, loaded, device, max_length)


def mean_pooled(
    encoder: Encoder, texts: list[str], tell: Callable[[int, int], None] = lambda done, total: None
) -> torch.Tensor:  # (rows, D) in fp32, on the CPU
    """`tell` is given how many are done, of how many, after every batch."""
    return split_features(encoder, _tokenised(encoder, texts), tell)


@torch.inference_mode()
def split_features(
    encoder: Encoder, split: Split, tell: Callable[[int, int], None] = lambda done, total: None
) -> torch.Tensor:  # (rows, D) in fp32, on the CPU
    """As mean_pooled, of what the encoder's tokenizer made of texts. Rows of like length are run together."""
    pad = encoder.tokenizer.pad_token_id or 0  # what it is makes no difference: it is masked
    features: torch.Tensor | None = None
    done = 0
    for rows in evaluation_batches(split.lengths, BATCH_SIZE, 1, 0):
        inputs = {name: tensor.to(encoder.device) for name, tensor in collate(split, rows, pad).inputs.items()}
        hidden_states = encoder.model(**inputs).last_hidden_state  # (B, L, D)
        mask = inputs["attention_mask"][:, :, None].to(hidden_states.dtype)
        means = ((hidden_states * mask).sum(1) / mask.sum(1)).cpu()
        if features is None:
            features = means.new_empty(len(split), means.shape[1])
        features[torch.from_numpy(rows.copy())] = means
        done += len(rows)
        tell(done, len(split))
    assert features is not None
    return features.clone()  # no inference tensor, which autograd and in-place work would refuse


def _tokenised(encoder: Encoder, texts: list[str]) -> Split:
    ids: list[Any] = []
    for start in range(0, len(texts), PIECE):
        ids += encode(encoder.tokenizer, [texts[start : start + PIECE]], encoder.max_length)["input_ids"]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in ids], dtype=np.int64)])
    none = np.zeros(len(ids), dtype=np.int64)
    return Split(np.concatenate(ids).astype(np.int32), offsets, None, none, None, np.arange(len(ids)), None)
