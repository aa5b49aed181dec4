"""What a language model says: prompts that it continues, and its answers held against the data's by a pattern."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from fleetune.schema import ExactMatch, Recipe
from fleetune.train import signals
from fleetune.train.batches import evaluation_batches
from fleetune.train.chat_template import template_of
from fleetune.train.conversations import NO_TEMPLATE
from fleetune.train.data import Split
from fleetune.train.distributed import World, any_rank, sum_over_ranks
from fleetune.train.model import most_positions

Generate = Callable[[list[list[int]], int], list[list[int]]]  # prompts, new tokens at most -> what follows each


def generator(
    module: Any, pad_token_id: int, ends: list[int] | None, device: torch.device, *, partitioned: bool
) -> Generate:
    """Greedily, all at once, padded on the left, until one of `ends`. Of a prompt that leaves no room for its answer
    before the model's last position the end is taken.

    A collective on ZeRO-3: each rank goes on until the last is done.
    """
    limit = most_positions(module.config)

    def generate(prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        if limit is not None:
            max_new_tokens = min(max_new_tokens, limit - 1)
            prompts = [prompt[-(limit - max_new_tokens) :] for prompt in prompts]
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), pad_token_id)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            ids[i, width - len(prompt) :] = torch.tensor(prompt)
            mask[i, width - len(prompt) :] = 1
        with torch.no_grad():
            found = module.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max_new_tokens,
                # A chat model's own settings would make it another decoding.
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                no_repeat_ngram_size=0,
                synced_gpus=partitioned,
                pad_token_id=pad_token_id,
                eos_token_id=ends,
            )
        return [row.tolist() for row in found[:, width:].cpu()]

    return generate


def end_tokens(module: nn.Module, tokenizer: Any, learnt: list[int]) -> list[int] | None:
    """Those that end a turn: the model's own, as chat models have several, the tokenizer's, and those that the rows
    end in that the model has learnt from: a base model's template need not end turns as its tokenizer ends texts."""
    own = getattr(getattr(module, "generation_config", None), "eos_token_id", None)
    ends = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id, *learnt]
    return list(dict.fromkeys(token for token in ends if token is not None)) or None


def prompt_tokens(tokenizer: Any, recipe: Recipe, format_: str, text: str) -> list[int]:
    """As a user's turn where there is a chat template, and else the text itself, as the model reads it; `format_`: of
    the rows that it learns from."""
    given = recipe.data.chat_template
    if format_ == "text" or given == NO_TEMPLATE or (given or tokenizer.chat_template) is None:
        ids = list(tokenizer(text)["input_ids"])
        return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
    turn = [{"role": "user", "content": text}]
    template = template_of(tokenizer, given, None)
    rendered = tokenizer.apply_chat_template(turn, chat_template=template, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def continued(recipe: Recipe, tokenizer: Any, format_: str, generate: Generate) -> list[list[str]]:
    """The recipe's prompts, each with what the model says; on every rank. `format_`: of the training rows."""
    wanted = recipe.evaluation.generate
    if wanted is None:
        return []
    prompts = [prompt_tokens(tokenizer, recipe, format_, text) for text in wanted.prompts]
    found = generate(prompts, wanted.max_new_tokens)
    texts = tokenizer.batch_decode(found, skip_special_tokens=True)
    return [[prompt, text] for prompt, text in zip(wanted.prompts, texts, strict=True)]


# ---------------------------------------------------------------- exact match


def exact_match(
    wanted: ExactMatch, split: Split, tokenizer: Any, generate: Generate, batch_size: int, world: World
) -> float:
    """Of the rows whose own answer has the pattern, the share that the model answers alike; nan where none has it.

    Raises:
        Stopped: on every rank, when one of them is asked to stop.
    """
    pattern = re.compile(wanted.pattern)
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    lengths = split.lengths[: wanted.limit]
    for rows in evaluation_batches(lengths, batch_size, world.world_size, world.rank):
        signals.beat("evaluation")
        if any_rank([signals.stop_requested()], world)[0]:
            raise signals.Stopped
        asked = [_question(split, int(row)) for row in (rows if len(rows) else np.zeros(1, dtype=np.int64))]
        answers = generate([question for question, _ in asked], wanted.max_new_tokens)
        if len(rows) == 0:
            continue  # a filler batch only keeps the collectives in step
        said = tokenizer.batch_decode(answers, skip_special_tokens=True)
        right = tokenizer.batch_decode([answer for _, answer in asked], skip_special_tokens=True)
        for mine, truth in zip(said, right, strict=True):
            if (expected := _last(pattern, truth)) is not None:
                sums += torch.tensor([_last(pattern, mine) == expected, 1.0], dtype=torch.float64, device=world.device)
    signals.beat("evaluation")
    matching, counted = sum_over_ranks(sums).tolist()
    return float(matching / counted) if counted else float("nan")


def _question(split: Split, row: int) -> tuple[list[int], list[int]]:
    """The tokens before the last answer, and the answer's."""
    assert split.supervised is not None
    span = slice(split.offsets[row], split.offsets[row + 1])
    ids, learnt = split.input_ids[span], split.supervised[span].astype(bool)
    stop = int(np.flatnonzero(learnt)[-1]) + 1
    before = np.flatnonzero(~learnt[:stop])
    start = int(before[-1]) + 1 if len(before) else 1
    return ids[:start].tolist(), ids[start:stop].tolist()


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    """What the pattern's group finds, at its last place."""
    found = [match.group(1) for match in pattern.finditer(text)]
    return found[-1].strip() if found and found[-1] is not None else None
