"""What a language model says: alike however prompts are batched, and answers held against the data's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import write_language_model

from fleetune.schema import ExactMatch, Recipe
from fleetune.train.data import Split
from fleetune.train.distributed import World
from fleetune.train.generate import Generate, continued, end_tokens, exact_match, generator, prompt_tokens
from fleetune.train.head import fuse_head

CPU = torch.device("cpu")
WORLD = World(0, 1, 0, CPU)
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} </s>{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = write_language_model(tmp_path_factory.mktemp("generate"), initializer_range=0.5)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def recipe(**sections: Any) -> Recipe:
    values = {
        "name": "x",
        "task": "causal_lm",
        "model": {"model_name_or_path": "m"},
        "data": {"train": {"path": "t"}, "validation": {"path": "v"}},
    }
    return Recipe.model_validate({**values, **sections})


PROMPTS = [[1, 5, 9], [1, 4], [1, 7, 8, 3, 11, 5]]


def test_prompts_of_unequal_length_are_continued_as_each_by_itself(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    generate = generator(model, 2, end_tokens(model, tokenizer, []), CPU, partitioned=False)
    together = generate(PROMPTS, 8)
    alone = [generate([prompt], 8)[0] for prompt in PROMPTS]
    assert len({tuple(each) for each in alone}) == 3
    for mine, by_itself in zip(together, alone, strict=True):
        assert mine[: len(by_itself)] == by_itself
        assert set(mine[len(by_itself) :]) <= {2}


def test_a_fused_head_changes_nothing_in_what_is_said(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, tokenizer = loaded
    model.save_pretrained(tmp_path)
    fused = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    fuse_head(fused)
    ends = end_tokens(model, tokenizer, [])
    said = [generator(each, 2, ends, CPU, partitioned=False)(PROMPTS, 8) for each in (model, fused)]
    assert said[0] == said[1]


def test_a_prompt_is_a_users_turn_where_there_is_a_template(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    plain = prompt_tokens(tokenizer, recipe(), "alpaca", "good film")
    assert plain == tokenizer("good film")["input_ids"]
    data = {"train": {"path": "t"}, "chat_template": TEMPLATE}
    asked = prompt_tokens(tokenizer, recipe(data=data), "alpaca", "good film")
    assert tokenizer.decode(asked).endswith("good film </s> <unk> <unk>")
    assert prompt_tokens(tokenizer, recipe(data=data), "text", "good film") == plain  # as the rows are
    assert prompt_tokens(tokenizer, recipe(data={**data, "chat_template": "none"}), "alpaca", "good film") == plain


def test_every_prompt_of_the_recipe_comes_with_what_is_said(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    wanted = recipe(evaluation={"generate": {"prompts": ["good", "the film was"], "max_new_tokens": 5}})
    generate = generator(model, 2, end_tokens(model, tokenizer, []), CPU, partitioned=False)
    found = continued(wanted, tokenizer, "text", generate)
    assert [prompt for prompt, _ in found] == ["good", "the film was"]
    assert all(text for _, text in found)
    assert continued(recipe(), tokenizer, "text", lambda prompts, n: []) == []


def test_it_stops_at_a_token_that_the_rows_end_in(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    (plain,) = generator(model, 2, end_tokens(model, tokenizer, []), CPU, partitioned=False)([[1, 5, 9]], 8)
    assert len(plain) > 1
    (stopped,) = generator(model, 2, end_tokens(model, tokenizer, plain[:1]), CPU, partitioned=False)([[1, 5, 9]], 8)
    assert stopped == plain[:1]


def test_it_goes_no_further_than_the_models_last_position(loaded: tuple[Any, Any]) -> None:
    model, _ = loaded  # of 64
    generate = generator(model, 2, None, CPU, partitioned=False)
    prompts = [[1] + [5 + i % 7 for i in range(length)] for length in (9, 49, 63, 89)]
    found = generate(prompts, 20)
    assert [len(said) for said in found] == [20] * 4
    assert found == generate([prompt[-44:] for prompt in prompts], 20)  # the end of the question stays
    assert len(generate([[1, 5]], 100)[0]) == 63


def test_a_chat_models_own_settings_do_not_change_what_greedy_is(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, _ = loaded
    model.save_pretrained(tmp_path)
    other = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    other.generation_config.repetition_penalty = 5.0
    said = [generator(each, 2, None, CPU, partitioned=False)(PROMPTS, 20) for each in (model, other)]
    assert said[0] == said[1]


# ---------------------------------------------------------------- exact match


def split_of(tokenizer: Any, pairs: list[tuple[str, str]]) -> Split:
    ids, learnt, offsets = [], [], [0]
    for question, answer in pairs:
        before = tokenizer(question)["input_ids"]
        after = tokenizer(answer, add_special_tokens=False)["input_ids"]
        ids += before + after
        learnt += [0] * len(before) + [1] * len(after)
        offsets.append(len(ids))
    return Split(
        np.array(ids, dtype=np.int32),
        np.array(offsets),
        None,
        None,
        None,
        np.arange(len(pairs)),
        None,
        np.array(learnt, dtype=np.uint8),
    )


PAIRS = [("good film", "very yes"), ("bad", "quite no"), ("the film", "nothing of it"), ("slow sound", "really no")]


def saying(tokenizer: Any, answers: dict[str, str]) -> Generate:
    def generate(prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        asked = tokenizer.batch_decode(prompts, skip_special_tokens=True)
        return [tokenizer(answers[text], add_special_tokens=False)["input_ids"] for text in asked]

    return generate


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize(("limit", "share"), [(None, 2 / 3), (2, 1.0), (1, 1.0)])
def test_the_share_is_of_the_rows_whose_own_answer_has_the_pattern(
    loaded: tuple[Any, Any], batch_size: int, limit: int | None, share: float
) -> None:
    _, tokenizer = loaded
    wanted = ExactMatch(pattern=r"(yes|no)\b", limit=limit)
    answers = {"good film": "no really yes", "bad": "no", "the film": "yes", "slow sound": "very yes"}
    split = split_of(tokenizer, PAIRS)
    found = exact_match(wanted, split, tokenizer, saying(tokenizer, answers), batch_size, WORLD)
    assert found == pytest.approx(share)


def test_where_no_answer_has_the_pattern_there_is_no_share(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    split = split_of(tokenizer, PAIRS[2:3])
    generate = saying(tokenizer, {"the film": "yes"})
    assert np.isnan(exact_match(ExactMatch(pattern="(yes|no)"), split, tokenizer, generate, 4, WORLD))


@pytest.mark.parametrize(
    ("pattern", "reason"), [("(", "is no regular expression"), ("yes", "has 0"), ("(a)(b)", "has 2")]
)
def test_a_pattern_has_one_group(pattern: str, reason: str) -> None:
    from fleetune.combinations import combinations

    ((key, value, message),) = combinations(recipe(evaluation={"exact_match": {"pattern": pattern}}))
    assert (key, value) == ("evaluation.exact_match.pattern", pattern)
    assert re.search(reason, message)
