"""Supervised fine-tuning rows: their formats, their text, and token by token what of it is learnt."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune.train.conversations import (
    FORMAT_COLUMNS,
    FORMATS,
    Encoded,
    Encoder,
    NothingToLearn,
    check_columns,
    columns_of,
    cut,
    ending,
    find_format,
    show,
)
from fleetune.train.formats import ALPACA, ALPACA_INPUT

TEMPLATES = Path(__file__).parent / "templates"
SPECIAL = {
    "llama3": ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
    "qwen2.5": ["<|endoftext|>", "<|im_end|>", "<|im_start|>"],
    "gemma": ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
    "mistral": ["<s>", "</s>", "[INST]", "[/INST]"],
}
SPECIAL |= dict.fromkeys(
    ("qwen3", "chatml_generation", "drops_answers", "reorders", "late_questions"), SPECIAL["qwen2.5"]
)
END = {"llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "mistral": "</s>"}


@cache
def byte_level(family: str, template: str | None = None, trim_offsets: bool = False) -> Any:
    """A byte-level BPE with a family's special tokens (its BOS and EOS first) and its chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL[family],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = ["user", "system", "assistant", "model", "hello", " there", "how", " are", " you", "fine", "\n\n", " \n"]
    bpe.train_from_iterator(words * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=SPECIAL[family][0], eos_token=SPECIAL[family][1], pad_token=SPECIAL[family][0]
    )
    path = TEMPLATES / f"{family}.jinja"
    tokenizer.chat_template = template if template is not None else path.read_text(encoding="utf-8")
    return tokenizer


@cache
def plain() -> Any:
    """The same without a chat template."""
    tokenizer = byte_level("mistral", template="-")
    tokenizer.chat_template = None
    return tokenizer


@pytest.fixture(scope="session")
def stories(shared_data: Path) -> Any:
    """SentencePiece's kind: a BOS, and a space in front of every text."""
    from transformers import AutoTokenizer

    folder = shared_data / "models" / "stories260k"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    return AutoTokenizer.from_pretrained(folder)


def chat(*contents: str, system: str | None = None) -> dict[str, Any]:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"messages": [{"role": "system", "content": system}] * (system is not None) + messages}


def runs(tokenizer: Any, row: dict[str, Any], format: Any = "messages", **options: Any) -> list[tuple[str, bool]]:
    return show(Encoder(tokenizer, format, **options).encode(row), tokenizer)


def learnt(tokenizer: Any, row: dict[str, Any], format: Any = "messages", **options: Any) -> list[str]:
    return [text for text, is_learnt in runs(tokenizer, row, format, **options) if is_learnt]


def refusal(tokenizer: Any, row: dict[str, Any], format: Any = "messages", **options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        Encoder(tokenizer, format, **options).encode(row)
    return str(caught.value)


# ---------------------------------------------------------------- the families


EXPECTED = {
    "llama3": [
        (
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            False,
        ),
        ("hi there<|eot_id|>", True),
        (
            "<|start_header_id|>user<|end_header_id|>\n\nhow are you?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            False,
        ),
        ("fine<|eot_id|>", True),
    ],
    "qwen2.5": [
        ("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n", False),
        ("hi there<|im_end|>", True),
        ("\n<|im_start|>user\nhow are you?<|im_end|>\n<|im_start|>assistant\n", False),
        ("fine<|im_end|>", True),
        ("\n", False),
    ],
    "qwen3": [
        ("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n", False),
        ("hi there<|im_end|>", True),
        ("\n<|im_start|>user\nhow are you?<|im_end|>\n<|im_start|>assistant\n", False),
        ("<think>\n\n</think>\n\nfine<|im_end|>", True),
        ("\n", False),
    ],
    "gemma": [
        ("<bos><start_of_turn>user\nBe kind.\n\nhello<end_of_turn>\n<start_of_turn>model\n", False),
        ("hi there<end_of_turn>", True),
        ("\n<start_of_turn>user\nhow are you?<end_of_turn>\n<start_of_turn>model\n", False),
        ("fine<end_of_turn>", True),
        ("\n", False),
    ],
    "mistral": [
        ("<s>[INST] hello[/INST]", False),
        (" hi there</s>", True),
        ("[INST] Be kind.\n\nhow are you?[/INST]", False),
        (" fine</s>", True),
    ],
    "chatml_generation": [
        ("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n", False),
        ("hi there<|im_end|>", True),
        ("\n<|im_start|>user\nhow are you?<|im_end|>\n<|im_start|>assistant\n", False),
        ("fine<|im_end|>", True),
        ("\n", False),
    ],
}
TALK = chat("hello", "hi there", "how are you?", "fine", system="Be kind.")
FAMILIES = list(EXPECTED)


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_of_two_turns_the_assistants_are_learnt(family: str, trim_offsets: bool) -> None:
    tokenizer = byte_level(family, trim_offsets=trim_offsets)
    assert runs(tokenizer, TALK) == EXPECTED[family]
    assert Encoder(tokenizer, "messages").encode(TALK).input_ids == (
        tokenizer.apply_chat_template(TALK["messages"], return_dict=False)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_on_all_learns_every_token(family: str) -> None:
    tokenizer = byte_level(family)
    assert runs(tokenizer, TALK, loss_on="all") == [("".join(text for text, _ in EXPECTED[family]), True)]


def test_token_by_token() -> None:
    tokenizer = byte_level("qwen2.5")
    encoded = Encoder(tokenizer, "messages").encode(chat("hello", "fine", system="how"))
    tokens = tokenizer.convert_ids_to_tokens(encoded.input_ids)
    assert list(zip(tokens, encoded.supervised, strict=True)) == [
        ("<|im_start|>", False),
        ("system", False),
        ("Ċ", False),
        ("how", False),
        ("<|im_end|>", False),
        ("Ċ", False),
        ("<|im_start|>", False),
        ("user", False),
        ("Ċ", False),
        ("hello", False),
        ("<|im_end|>", False),
        ("Ċ", False),
        ("<|im_start|>", False),
        ("assistant", False),
        ("Ċ", False),
        ("fine", True),
        ("<|im_end|>", True),
        ("Ċ", False),
    ]


def test_qwens_default_system_prompt_is_not_learnt() -> None:
    shown = runs(byte_level("qwen2.5"), chat("hello", "fine"))
    assert shown[0][0].startswith("<|im_start|>system\nYou are Qwen, created by Alibaba Cloud.")
    assert [text for text, is_learnt in shown if is_learnt] == ["fine<|im_end|>"]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_that_repeats_the_question_and_the_same_answer_twice(family: str) -> None:
    tokenizer = byte_level(family)
    assert [text.strip() for text in learnt(tokenizer, chat("a", "a", "a", "a"))] == [
        "a" + END.get(family, "<|im_end|>"),
        ("<think>\n\n</think>\n\n" if family == "qwen3" else "") + "a" + END.get(family, "<|im_end|>"),
    ]


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=40, deadline=None)
@given(contents=st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=20), min_size=4, max_size=4))
def test_any_content_is_learnt_with_the_end_of_its_turn(family: str, contents: list[str]) -> None:
    special = SPECIAL[family]
    contents = [content if content.strip() else "x" for content in contents]
    contents = ["x" if any(s in c for s in special) or "think>" in c else c for c in contents]
    tokenizer = byte_level(family)
    spoken = learnt(tokenizer, chat(*contents))
    assert len(spoken) == 2
    for text, content in zip(spoken, contents[1::2], strict=True):
        end = END.get(family, "<|im_end|>")
        assert text.endswith(end)
        assert text.removesuffix(end).strip().removeprefix("<think>\n\n</think>").strip() == content.strip()


def test_an_eos_at_the_end_of_the_conversation_is_no_part_of_earlier_turns() -> None:
    """Phi-3's form: where the conversation goes on, a header stands in the place of the EOS, and both begin with <."""
    for end, after in (("<end>", "\n"), ("<|im_end|>", "")):  # a token that ends the turn is the last of it
        template = (
            "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + 'END\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<assistant>' }}{% else %}{{ eos_token }}{% endif %}"
        ).replace("END", end)
        assert learnt(byte_level("qwen2.5"), TALK, chat_template=template) == [
            f"hi there{end}{after}",
            f"fine{end}\n<|im_end|>",
        ]


# ---------------------------------------------------------------- reasoning, tools, weights


def test_a_turn_whose_reasoning_is_dropped_is_not_learnt() -> None:
    row = chat("hello", "<think>\nhm\n</think>\n\nhi there", "how are you?", "<think>\nwell\n</think>\n\nfine")
    tokenizer = byte_level("qwen3")
    assert learnt(tokenizer, row) == ["<think>\nwell\n</think>\n\nfine<|im_end|>"]
    row["messages"][3] = {"role": "assistant", "content": "fine", "reasoning_content": "well"}
    assert learnt(tokenizer, row) == ["<think>\nwell\n</think>\n\nfine<|im_end|>"]
    row["messages"].append({"role": "user", "content": "so"})
    assert "leaves out the assistant's reasoning" in refusal(tokenizer, row)


def test_reasoning_stays_where_the_template_keeps_content_as_it_is() -> None:
    row = chat("hello", "<think>hm</think>hi", "so", "fine")
    assert learnt(byte_level("qwen2.5"), row) == ["<think>hm</think>hi<|im_end|>", "fine<|im_end|>"]


def test_tool_calls_are_learnt_and_what_tools_answer_is_not() -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}, "strict": None}}]
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": "1 + 1?", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
        {"role": "assistant", "content": "It is 2.", "tool_calls": []},
    ]
    expected = ['\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>', "It is 2.<|im_end|>"]
    tokenizer = byte_level("qwen2.5")
    row = {"messages": messages, "tools": tools}
    assert [text.strip() for text in learnt(tokenizer, row)] == [text.strip() for text in expected]
    assert runs(tokenizer, row) == runs(tokenizer, row | {"tools": json.dumps(tools), "messages": json.dumps(messages)})
    assert "strict" not in runs(tokenizer, row)[0][0]
    sharegpt = {
        "conversations": [
            {"from": "human", "value": "1 + 1?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "It is 2."},
        ],
        "tools": json.dumps(tools),
    }
    assert runs(tokenizer, sharegpt, "sharegpt") == runs(tokenizer, row)


def test_a_turn_of_weight_0_is_read_and_not_learnt() -> None:
    row = chat("a", "b", "c", "d")
    row["messages"][1]["weight"] = 0
    assert learnt(byte_level("llama3"), row) == ["d<|eot_id|>"]


def test_openais_content_in_parts_is_text() -> None:
    row = chat("a", "b")
    row["messages"][0]["content"] = [{"type": "text", "text": "a"}]
    assert runs(byte_level("llama3"), row) == runs(byte_level("llama3"), chat("a", "b"))
    row["messages"][0]["content"] = [{"type": "image", "image": "x.png"}]
    assert "`messages[0]` has " in refusal(byte_level("llama3"), row)


# ---------------------------------------------------------------- {% generation %}


def chatml(answer: str) -> str:
    return (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['role'] == 'assistant' %}" + answer + "{% else %}{{ message['content'] + '<|im_end|>' }}"
        "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


def test_an_end_of_turn_outside_of_the_marks_is_learnt() -> None:
    template = chatml("{% generation %}{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>' }}")
    assert runs(byte_level("qwen2.5"), TALK, chat_template=template) == EXPECTED["chatml_generation"]


def test_a_header_inside_of_the_marks_is_not_learnt() -> None:
    template = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}"
        "{{ '<|im_start|>assistant\n' + message['content'] + '<|im_end|>\n' }}{% endgeneration %}"
        "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    assert runs(byte_level("qwen2.5"), TALK, chat_template=template) == EXPECTED["chatml_generation"]


def test_a_turn_without_marks_is_not_learnt() -> None:
    answer = "{{ message['content'] + '<|im_end|>' }}"
    template = chatml(
        f"{{% if loop.last %}}{{% generation %}}{answer}{{% endgeneration %}}{{% else %}}{answer}{{% endif %}}"
    )
    assert learnt(byte_level("qwen2.5"), TALK, chat_template=template) == ["fine<|im_end|>"]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("{% generation %}{% endgeneration %}{{ message['content'] + '<|im_end|>' }}", "marks hold nothing that"),
        (
            "{% generation %}{{ message['content'][:2] }}{% endgeneration %}{{ message['content'][2:] + eos_token }}",
            "does not hold the assistant's whole answer",
        ),
    ],
)
def test_marks_that_hold_no_answer_are_refused(answer: str, reason: str) -> None:
    message = refusal(byte_level("qwen2.5"), chat("hello", "xyzzy"), chat_template=chatml(answer))
    assert message.startswith("data.chat_template: ")
    assert reason in message


# ---------------------------------------------------------------- templates that are refused


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("drops_answers", "leaves out the content of a turn (the assistant's, 1 counted from 0)"),
        ("reorders", "mixes the assistant's turn 1"),
        ("late_questions", "mixes the assistant's turn 1"),
    ],
)
def test_broken_templates_are_refused(family: str, reason: str) -> None:
    message = refusal(byte_level(family), chat("hello", "fine"))
    assert message.startswith("data.chat_template: ")
    assert reason in message
    assert "renders as '" in message


def test_sentencepieces_kind_of_tokenizer(stories: Any) -> None:
    template = (TEMPLATES / "mistral.jinja").read_text(encoding="utf-8")
    encoded = Encoder(stories, "messages", chat_template=template).encode(chat("Once", "upon", "Once 😀", "a\n time"))
    tokens = stories.convert_ids_to_tokens(encoded.input_ids)
    spoken = [token for token, is_learnt in zip(tokens, encoded.supervised, strict=True) if is_learnt]
    assert spoken == ["▁upon", "</s>", "▁a", "<0x0A>", "▁time", "</s>"]
    plain_words = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    assert learnt(stories, chat("Once", "upon 😀"), chat_template=plain_words) == ["assistant: upon 😀\n"]


def test_what_an_error_shows_is_short() -> None:
    assert len(refusal(byte_level("qwen3"), chat("a" * 9000, "<think>hm</think>b", "c"))) < 900


def test_a_template_that_refuses_a_conversation_says_why() -> None:
    row = {"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}
    assert refusal(byte_level("gemma"), row) == (
        "data.chat_template: refuses the conversation (assistant, user): "
        "Conversation roles must alternate user/assistant/user/assistant/..."
    )


def test_an_assistant_who_begins_is_found() -> None:
    row = {"messages": [{"role": "assistant", "content": "hi there"}, {"role": "user", "content": "hello"}]}
    assert learnt(byte_level("llama3"), row) == ["hi there<|eot_id|>"]


def test_a_system_prompt_that_is_ignored_is_refused() -> None:
    template = (
        "{% for message in messages if message['role'] != 'system' %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    message = refusal(byte_level("qwen2.5"), TALK, chat_template=template)
    assert "leaves out the content of a turn (the system's, 0 counted from 0)" in message


def test_a_chat_template_from_a_file_or_as_text(tmp_path: Path) -> None:
    tokenizer = plain()
    expected = EXPECTED["mistral"]
    assert runs(tokenizer, TALK, chat_template=TEMPLATES / "mistral.jinja") == expected
    assert runs(tokenizer, TALK, chat_template=str(TEMPLATES / "mistral.jinja")) == expected
    assert runs(tokenizer, TALK, chat_template=(TEMPLATES / "mistral.jinja").read_text()) == expected
    missing = str(tmp_path / "no.jinja")
    assert refusal(tokenizer, TALK, chat_template=missing) == (
        f"data.chat_template = {missing!r}: cannot be read: No such file or directory"
    )
    assert "is no Jinja template: line 1: " in refusal(tokenizer, TALK, chat_template="{% for %}")


@pytest.mark.parametrize("quote", ["'", '"'])
def test_a_template_that_prints_todays_date_says_the_same_every_day(quote: str) -> None:
    turns = "{% for message in messages %}{{ message.role + ': ' + message.content + '<eos>' }}{% endfor %}"
    header = "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    asked = f"{{% if strftime_now is defined %}}{{{{ strftime_now( {quote}%d %b %Y{quote} ) }}}} {{% endif %}}"
    tokenizer = byte_level("gemma")
    encoded = Encoder(tokenizer, "messages", chat_template=asked + turns + header).encode(chat("hello", "fine"))
    assert show(encoded, tokenizer) == [("26 Jul 2024 user: hello<eos>assistant: ", False), ("fine<eos>", True)]


@pytest.mark.parametrize("format", ["messages", "sharegpt"])
def test_chats_need_a_template(format: Any) -> None:
    for options in ({}, {"chat_template": "none"}):
        assert refusal(plain(), TALK, format, **options).startswith(f"data.chat_template: data.format = {format!r}")


def test_without_a_generation_prompt_the_header_is_the_models_to_say() -> None:
    template = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    encoded = Encoder(plain(), "messages", chat_template=template).encode(chat("hello", "fine"))
    assert show(encoded, plain()) == [("user: hello\n", False), ("assistant: fine\n", True)]
    assert ending(encoded, plain()) is None
    gemma = byte_level("gemma")
    assert ending(Encoder(gemma, "messages").encode(TALK), gemma) == gemma.convert_tokens_to_ids("<end_of_turn>")


def test_a_token_that_begins_in_the_header_is_not_learnt() -> None:
    """The header's last newline and the answer's first are one token here."""
    encoded = runs(byte_level("qwen2.5"), chat("hello", "\n\nfine"))
    assert encoded[1:] == [("\nfine<|im_end|>", True), ("\n", False)]
    assert encoded[0][0].endswith("assistant\n\n")


def test_a_token_that_takes_words_of_the_answer_is_refused() -> None:
    template = (
        "{% for message in messages %}{% if message['role'] == 'user' %}{{ message['content'] + '\nas' }}{% else %}"
        "{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
    )
    assert "cuts it" in refusal(byte_level("qwen2.5"), chat("hello", "sistant"), chat_template=template)


# ---------------------------------------------------------------- plain text


def test_text_is_learnt_whole_and_ends(stories: Any) -> None:
    encoded = Encoder(stories, "text").encode({"text": "Once upon a time"})
    assert stories.convert_ids_to_tokens(encoded.input_ids) == ["<s>", "▁Once", "▁upon", "▁a", "▁time", "</s>"]
    assert encoded.supervised == [True] * 6
    for text in ("<s>Once upon a time", "Once upon a time</s>"):
        assert Encoder(stories, "text").encode({"text": text}) == encoded
    assert Encoder(stories, "text", text_column="story").encode({"story": "Once upon a time"}) == encoded


def test_a_completion_gets_no_bos_and_no_space(stories: Any) -> None:
    encoder = Encoder(stories, "prompt_completion")
    for completion in (" upon a time", "upon", "\nupon", "\n\n x", "😀"):
        encoded = encoder.encode({"prompt": "Once:", "completion": completion})
        assert show(encoded, stories) == [("<s> Once:", False), (completion + "</s>", True)]
        assert encoded.input_ids.count(stories.bos_token_id) == 1
    tokens = stories.convert_ids_to_tokens(encoder.encode({"prompt": "Once", "completion": " upon a"}).input_ids)
    assert tokens == ["<s>", "▁Once", "▁upon", "▁a", "</s>"]


@settings(max_examples=50, deadline=None)
@given(prompt=st.text(max_size=20), completion=st.text(min_size=1, max_size=20))
def test_a_prompt_and_its_completion_stand_side_by_side(prompt: str, completion: str) -> None:
    if not completion.strip() or any(token in prompt + completion for token in SPECIAL["mistral"]):
        return
    tokenizer = plain()
    encoded = Encoder(tokenizer, "prompt_completion").encode({"prompt": prompt or "x", "response": completion})
    assert show(encoded, tokenizer) == [(prompt or "x", False), (completion + "</s>", True)]
    whole = Encoder(tokenizer, "prompt_completion", loss_on="all").encode(
        {"prompt": prompt or "x", "response": completion}
    )
    assert whole == Encoded(encoded.input_ids, [True] * len(encoded.input_ids))


def test_a_question_and_its_answer_are_on_two_lines() -> None:
    assert runs(plain(), {"question": "1 + 1?", "answer": 2}, "prompt_completion") == [
        ("1 + 1?\n", False),
        ("2</s>", True),
    ]


def test_alpacas_own_words_without_a_template() -> None:
    row = {"instruction": "Add.", "input": "1 and 1", "output": "2"}
    assert runs(plain(), row, "alpaca") == [
        (f"{ALPACA_INPUT}\n\n### Instruction:\nAdd.\n\n### Input:\n1 and 1\n\n### Response:\n", False),
        ("2</s>", True),
    ]
    for empty in ("", None, float("nan")):
        assert runs(plain(), row | {"input": empty}, "alpaca")[0] == (
            f"{ALPACA}\n\n### Instruction:\nAdd.\n\n### Response:\n",
            False,
        )
    assert runs(plain(), row | {"system": "Be brief.", "history": [["Hi", "Hello"]], "input": None}, "alpaca") == [
        ("Be brief.\n\n### Instruction:\nHi\n\n### Response:\n", False),
        ("Hello</s>", True),
        ("\n\n### Instruction:\nAdd.\n\n### Response:\n", False),
        ("2</s>", True),
    ]


def test_alpaca_and_prompts_with_a_template_are_chats() -> None:
    tokenizer = byte_level("llama3")
    row = {"instruction": "Add.", "input": "1 and 1", "output": "2", "system": "s", "history": [["Hi", "Hello"]]}
    expected = runs(tokenizer, chat("Hi", "Hello", "Add.\n\n1 and 1", "2", system="s"))
    assert runs(tokenizer, row, "alpaca") == expected
    pair = {"prompt": "hello", "completion": "fine"}
    assert runs(tokenizer, pair, "prompt_completion") == runs(tokenizer, chat("hello", "fine"))
    assert runs(tokenizer, pair, "prompt_completion", chat_template="none") == [
        ("hello", False),
        ("fine<|eot_id|>", True),
    ]


def test_of_a_prompt_of_messages_nothing_is_learnt() -> None:
    talk = chat("a", "b", "c", "d")["messages"]
    row = {"prompt": talk[:3], "completion": talk[3:]}
    assert learnt(byte_level("llama3"), row, "prompt_completion") == ["d<|eot_id|>"]
    assert learnt(byte_level("llama3"), row | {"completion": "d"}, "prompt_completion") == ["d<|eot_id|>"]
    assert refusal(plain(), row, "prompt_completion").startswith("data.chat_template: ")


def test_sharegpt_is_the_same_chat() -> None:
    tokenizer = byte_level("llama3")
    turns = [("human", "hello"), ("gpt", "hi there"), ("user", "how are you?"), ("assistant", "fine")]
    row = {"conversations": [{"from": role, "value": text} for role, text in turns], "system": "Be kind."}
    assert runs(tokenizer, row, "sharegpt") == EXPECTED["llama3"]
    assert runs(tokenizer, {"conversations": TALK["messages"]}, "sharegpt") == EXPECTED["llama3"]


# ---------------------------------------------------------------- rows that are not as they should be


@pytest.mark.parametrize(
    ("format", "row"),
    [
        ("text", {"text": "  "}),
        ("alpaca", {"instruction": "a", "output": ""}),
        ("prompt_completion", {"prompt": "a", "completion": "\n"}),
        ("messages", {"messages": []}),
        ("messages", chat("a")),
        ("messages", chat("a", "")),
        (
            "messages",
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]},
        ),
    ],
)
def test_a_row_that_teaches_nothing_has_its_own_error(format: Any, row: dict[str, Any]) -> None:
    with pytest.raises(NothingToLearn):
        Encoder(byte_level("llama3"), format).encode(row)


@pytest.mark.parametrize(
    ("format", "row", "reason"),
    [
        ("alpaca", {"instruction": "a"}, "data.format = 'alpaca': has no output or response"),
        ("prompt_completion", {"prompt": {"a": 1}, "completion": "b"}, "`prompt` has \"{'a': 1}\", which is no text"),
        ("prompt_completion", {"prompt": "\ud800", "completion": "b"}, "`prompt` is not valid Unicode"),
        ("messages", {"messages": "hello"}, "`messages` has 'hello', which is no list, nor the JSON of one"),
        ("messages", {"messages": ["hello"]}, "`messages[0]` has 'hello', which is no message with a role and content"),
        (
            "messages",
            {"messages": [{"role": "robot", "content": "a"}]},
            "`messages[0]` has the role 'robot'; it is one of user",
        ),
        ("sharegpt", {"conversations": [{"from": "gpt"}]}, "`conversations[0]` has 'None', which is no text"),
        ("alpaca", {"instruction": "a", "output": "b", "history": ["c"]}, "`history` has 'c', which is no pair"),
        (
            "messages",
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "x"}}]}]},
            "`messages[0]` has a tool call with 'x', which is no JSON object",
        ),
    ],
)
def test_a_row_that_is_not_as_it_should_be_is_named(format: Any, row: dict[str, Any], reason: str) -> None:
    assert reason in refusal(byte_level("llama3"), row, format)


def test_a_tokenizer_without_an_end_cannot_learn_to_stop() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    assert "has no end-of-sequence token (eos_token)" in refusal(tokenizer, {"text": "a"}, "text")
    template = "{% for message in messages %}{{ message['role'] + ' : ' + message['content'] + ' ; ' }}{% endfor %}"
    encoded = Encoder(tokenizer, "messages", chat_template=template).encode(chat("a", "a b"))
    assert encoded.supervised == [False] * 4 + [True] * 5  # a tokenizer that loses words is no fault of the mask


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"text": "a"}, "text"),
        ({"prompt": "a", "completion": "b"}, "prompt_completion"),
        ({"prompt": "a", "response": "b"}, "prompt_completion"),
        ({"question": "a", "answer": "b"}, "prompt_completion"),
        ({"id": 1, "system_prompt": "", "question": "a", "response": "b"}, "prompt_completion"),
        ({"instruction": "a", "input": "", "output": "b", "text": "a b"}, "alpaca"),
        ({"instruction": "a", "context": "", "response": "b", "category": "c"}, "alpaca"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "sharegpt"),
        ({"prompt": "a", "prompt_id": "1", **chat("a", "b")}, "messages"),
        ({"messages": json.dumps(chat("a", "b")["messages"])}, "messages"),
    ],
)
def test_a_format_is_found_by_its_columns(row: dict[str, Any], format: str) -> None:
    assert find_format(list(row), [row]) == format
    assert set(row) & set(columns_of(find_format(list(row), [])).names)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"prompt": "a", "chosen": "b"},
            "the columns prompt, chosen are of no known format; set it to one of text (text);",
        ),
        ({"messages": "hello"}, "the columns messages are of no known format"),
        (
            {"instruction": "a", "output": "b", **chat("a")},
            "the columns instruction, output, messages fit several formats; set it to one of "
            "alpaca (instruction, output or response); messages (messages)",
        ),
    ],
)
def test_a_format_that_is_not_plain_is_asked_for(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        find_format(list(row), [row])
    assert str(caught.value).startswith("data.format: " + reason)


def test_columns() -> None:
    assert columns_of("text", "story").names == ["story"]
    assert columns_of("sharegpt").names == ["conversations", "conversation", "system", "system_prompt", "tools"]
    assert set(FORMAT_COLUMNS) == set(FORMATS)
    check_columns("alpaca", ["instruction", "response"])
    with pytest.raises(ValueError) as caught:
        check_columns("alpaca", ["instruction", "reply"])
    assert str(caught.value) == (
        "data.format = 'alpaca': needs the column output or response; the data has instruction, reply"
    )
    with pytest.raises(ValueError, match=r"data\.text_column = 'story': needs the column story; the data has text"):
        check_columns("text", ["text"], "story")


# ---------------------------------------------------------------- lengths


def test_cutting() -> None:
    encoded = Encoded([1, 2, 3, 4, 5, 6], [False, False, True, True, False, False])
    assert cut(encoded, 6, "drop") is encoded
    assert cut(encoded, 5, "drop") is None
    assert cut(encoded, 3, "cut_right") == Encoded([1, 2, 3], [False, False, True])
    assert cut(encoded, 4, "cut_left") == Encoded([3, 4, 5, 6], [True, True, False, False])
    assert cut(encoded, 2, "cut_right") is None
    assert cut(encoded, 2, "cut_left") is None
    assert cut(encoded, 3, "cut_left") is None  # the one that is learnt comes first, and is no target
    assert cut(Encoded([1, 2], [True, False]), 9, "cut_right") is None


@given(flags=st.lists(st.booleans(), min_size=1, max_size=12), length=st.integers(1, 12))
def test_cutting_keeps_one_end(flags: list[bool], length: int) -> None:
    whole = Encoded(list(range(len(flags))), flags)
    for way, part in (("cut_right", slice(0, length)), ("cut_left", slice(max(0, len(flags) - length), None))):
        kept = cut(whole, length, way)  # type: ignore[arg-type]
        assert (kept is None) == (not any(flags[part][1:]))
        assert kept is None or (kept.input_ids, kept.supervised) == (whole.input_ids[part], flags[part])


# ---------------------------------------------------------------- real data


def rows_of(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.split("\n") if line]
    return list(rows[:limit])


@pytest.mark.parametrize("family", [None, *FAMILIES])
@pytest.mark.parametrize(
    "file", ["instruct/alpaca_en_demo.json", "instruct/dolly_hhrlhf_train_small.jsonl", "gsm8k/test.jsonl"]
)
def test_real_rows(shared_data: Path, file: str, family: str | None) -> None:
    rows = rows_of(shared_data / file, 100)
    format = find_format(list(rows[0]), rows[:10])
    tokenizer = byte_level(family) if family else plain()
    encoder = Encoder(tokenizer, format)
    answers = FORMAT_COLUMNS[format]["output" if format == "alpaca" else "completion"].names
    for row in rows:
        try:
            shown = [text for text, is_learnt in show(encoder.encode(row), tokenizer) if is_learnt]
        except NothingToLearn:
            continue
        answer = next(row[name] for name in answers if name in row)
        assert len(shown) == 1
        assert answer.strip() in shown[0]
        assert len(shown[0]) < len(answer) + 40
