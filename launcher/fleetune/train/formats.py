"""The forms that supervised fine-tuning data comes in, and what a row of each says: messages, or parts of plain text.

    text               {text}
    prompt_completion  {prompt, completion}, also {question, answer}; either may be a list of messages
    alpaca             {instruction, input, output}, perhaps with system and history, pairs of earlier turns
    sharegpt           {conversations: [{from, value}, ...]}, perhaps with system and tools
    messages           {messages: [{role, content}, ...]}, as OpenAI has them, perhaps with tools

`to_messages` gives the turns that a chat template renders, `to_parts` the text of a model that has no chat template.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

Format = Literal["text", "prompt_completion", "alpaca", "sharegpt", "messages"]
FORMATS: tuple[Format, ...] = get_args(Format)


class NothingToLearn(ValueError):
    """A row that is well formed and teaches nothing: an empty answer, or no assistant's turn."""


# ---------------------------------------------------------------- columns


@dataclass(frozen=True)
class Field:
    names: tuple[str, ...]  # the columns that it goes by; of several in one row the first counts
    required: bool = True


_SYSTEM = Field(("system", "system_prompt"), required=False)
_TOOLS = Field(("tools",), required=False)

FORMAT_COLUMNS: dict[Format, dict[str, Field]] = {
    "text": {"text": Field(("text",))},
    "prompt_completion": {
        "prompt": Field(("prompt", "question")),
        "completion": Field(("completion", "response", "answer")),
        "system": _SYSTEM,
    },
    "alpaca": {
        "instruction": Field(("instruction",)),
        "input": Field(("input", "context"), required=False),
        "output": Field(("output", "response")),
        "system": _SYSTEM,
        "history": Field(("history",), required=False),
    },
    "sharegpt": {"messages": Field(("conversations", "conversation")), "system": _SYSTEM, "tools": _TOOLS},
    "messages": {"messages": Field(("messages",)), "tools": _TOOLS},
}


@dataclass(frozen=True)
class Columns:
    required: tuple[tuple[str, ...], ...]  # of each inner tuple one must be there
    optional: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """All that may be asked of a source."""
        return list(dict.fromkeys([name for names in self.required for name in names] + list(self.optional)))


def columns_of(format: Format, text_column: str = "text") -> Columns:
    if format == "text":
        return Columns(((text_column,),), ())
    fields = FORMAT_COLUMNS[format].values()
    return Columns(
        tuple(field.names for field in fields if field.required),
        tuple(name for field in fields if not field.required for name in field.names),
    )


def check_columns(format: Format, columns: list[str], text_column: str = "text") -> None:
    """Raises ValueError that names what the format needs and the data lacks."""
    for names in columns_of(format, text_column).required:
        if not any(name in columns for name in names):
            key = "data.text_column" if format == "text" else "data.format"
            value = text_column if format == "text" else format
            raise ValueError(f"{key} = {value!r}: needs the column {' or '.join(names)}; the data has {_some(columns)}")


def find_format(columns: list[str], rows: list[dict[str, Any]], text_column: str = "text") -> Format:
    """The one format whose columns are there; `text` only where no other's are. `rows` are the first few."""
    fitting: list[Format] = [format for format in FORMATS[1:] if _fits(format, columns, rows)]
    if not fitting and text_column in columns and _holds_text(text_column, rows):
        return "text"
    if len(fitting) == 1:
        return fitting[0]
    found = "fit several formats" if fitting else "are of no known format"
    wanted = "; ".join(
        f"{format} ({', '.join(' or '.join(names) for names in columns_of(format, text_column).required)})"
        for format in fitting or FORMATS
    )
    raise ValueError(f"data.format: the columns {_some(columns)} {found}; set it to one of {wanted}")


def _fits(format: Format, columns: list[str], rows: list[dict[str, Any]]) -> bool:
    required = columns_of(format).required
    if not all(any(name in columns for name in names) for names in required):
        return False
    if format not in ("sharegpt", "messages"):
        return True
    cells = [next((row[name] for name in required[0] if row.get(name) is not None), None) for row in rows]
    return all(cell is None or _is_list(cell) for cell in cells)


def _holds_text(column: str, rows: list[dict[str, Any]]) -> bool:
    return all(row.get(column) is None or isinstance(row[column], str | int | float) for row in rows)


def _is_list(cell: Any) -> bool:
    return isinstance(cell, list | tuple) or (isinstance(cell, str) and cell.lstrip().startswith("["))


def _some(columns: list[str]) -> str:
    return ", ".join(columns[:20]) or "(none)"


# ---------------------------------------------------------------- cells


def _cell(row: dict[str, Any], format: Format, field: str) -> tuple[str, Any]:
    """The column that the row has for a field, and what stands there."""
    known = FORMAT_COLUMNS[format][field]
    for name in known.names:
        value = row.get(name)
        if value is not None and value == value:  # NaN is how some tables write an empty cell
            return name, value
    if known.required:
        raise ValueError(f"data.format = {format!r}: has no {' or '.join(known.names)}")
    return known.names[0], None


_SURROGATE = re.compile("[\ud800-\udfff]")


def as_text(value: Any, column: str) -> str:
    """A cell as text; a number as it is written."""
    if isinstance(value, list | tuple) and value and all(_is_text_part(part) for part in value):
        value = "".join(part["text"] for part in value)  # OpenAI's content in parts
    if value is None or isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"`{column}` has {str(value)[:80]!r}, which is no text")
    text = str(value)
    if not text.isascii() and _SURROGATE.search(text):
        raise ValueError(f"`{column}` is not valid Unicode, it has half of a surrogate pair: {text[:80]!r}")
    return text


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _text(row: dict[str, Any], format: Format, field: str) -> str:
    name, value = _cell(row, format, field)
    return "" if value is None else as_text(value, name)


def _answer(row: dict[str, Any], format: Format, field: str) -> str:
    name, value = _cell(row, format, field)
    text = as_text(value, name)
    if not text.strip():
        raise NothingToLearn(f"`{name}` is empty")
    return text


def as_list(value: Any, column: str) -> list[Any]:
    """A list, or the JSON of one: what a list becomes in a .csv, and often in a .parquet."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise ValueError(f"`{column}` has {value[:80]!r}, which is no list, nor the JSON of one") from None
    if not isinstance(value, list | tuple):
        raise ValueError(f"`{column}` has {str(value)[:80]!r}, which is no list")
    return list(value)


# ---------------------------------------------------------------- messages


@dataclass(frozen=True)
class Conversation:
    messages: list[dict[str, Any]]  # role, content, and what else a template may read: tool_calls, reasoning_content
    learnt: list[bool]  # the assistant's turns, without those whose `weight` is 0
    tools: list[Any] | None


ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "function_call"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response"), "tool"),
}


def is_conversation(row: dict[str, Any], format: Format) -> bool:
    """Whether the row is messages already, so that it takes a chat template to make text of it."""
    if format == "prompt_completion":
        return any(isinstance(_cell(row, format, field)[1], list | tuple) for field in ("prompt", "completion"))
    return format in ("sharegpt", "messages")


def to_messages(row: dict[str, Any], format: Format) -> Conversation:
    if format == "prompt_completion":
        return _prompt_messages(row)
    if format == "alpaca":
        return _alpaca_messages(row)
    name, cell = _cell(row, format, "messages")
    turns = [_message(item, f"{name}[{i}]") for i, item in enumerate(as_list(cell, name))]
    if not turns:
        raise NothingToLearn(f"`{name}` is empty")
    if format == "sharegpt" and turns[0][0]["role"] != "system" and (system := _text(row, format, "system")).strip():
        turns.insert(0, ({"role": "system", "content": system}, False))
    tools = _cell(row, format, "tools")[1]
    return Conversation(
        [message for message, _ in turns],
        [learnt for _, learnt in turns],
        _without_nones(as_list(tools, "tools")) or None if tools not in (None, "") else None,
    )


def _prompt_messages(row: dict[str, Any]) -> Conversation:
    """The prompt's turns are read, the completion's are learnt."""
    turns: list[tuple[dict[str, Any], bool]] = []
    if (system := _text(row, "prompt_completion", "system")).strip():
        turns.append(({"role": "system", "content": system}, False))
    for field, role in (("prompt", "user"), ("completion", "assistant")):
        name, cell = _cell(row, "prompt_completion", field)
        if isinstance(cell, list | tuple):
            items = [_message(item, f"{name}[{i}]") for i, item in enumerate(cell)]
            turns.extend((message, learnt and field == "completion") for message, learnt in items)
        elif field == "completion":
            turns.append(({"role": role, "content": _answer(row, "prompt_completion", field)}, True))
        else:
            turns.append(({"role": role, "content": as_text(cell, name)}, False))
    return Conversation([message for message, _ in turns], [learnt for _, learnt in turns], None)


def _alpaca_messages(row: dict[str, Any]) -> Conversation:
    instruction, given = _text(row, "alpaca", "instruction"), _text(row, "alpaca", "input")
    system, answer = _text(row, "alpaca", "system"), _answer(row, "alpaca", "output")
    messages = [{"role": "system", "content": system}] if system.strip() else []
    for before, after in _history(row):
        messages += [{"role": "user", "content": before}, {"role": "assistant", "content": after}]
    messages.append({"role": "user", "content": f"{instruction}\n\n{given}" if given.strip() else instruction})
    messages.append({"role": "assistant", "content": answer})
    return Conversation(messages, [message["role"] == "assistant" for message in messages], None)


def _history(row: dict[str, Any]) -> list[tuple[str, str]]:
    name, cell = _cell(row, "alpaca", "history")
    pairs = [] if cell in (None, "") else as_list(cell, name)
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError(f"`{name}` has {str(pair)[:80]!r}, which is no pair of an instruction and its response")
    return [(as_text(before, name), as_text(after, name)) for before, after in pairs]


_OWN_KEYS = {"role", "from", "content", "value", "weight", "tool_calls"}


def _message(item: Any, place: str) -> tuple[dict[str, Any], bool]:
    """A turn as templates read it, and whether it is learnt."""
    if not isinstance(item, dict):
        raise ValueError(f"`{place}` has {str(item)[:80]!r}, which is no message with a role and content")
    given = item.get("role") or item.get("from")
    role = ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise ValueError(f"`{place}` has the role {given!r}; it is one of {', '.join(ROLES)}")
    content = item.get("content") if item.get("content") is not None else item.get("value")
    calls = [_tool_call(call, place) for call in item.get("tool_calls") or []]
    if given == "function_call" and isinstance(content, str):
        calls, content = [_tool_call(_json_object(content, place), place)], None
    message = {key: value for key, value in item.items() if value is not None and key not in _OWN_KEYS}
    message |= {"role": role, "content": "" if calls and content is None else as_text(content, place)}
    if calls:
        message["tool_calls"] = calls
    elif role == "assistant" and not message["content"].strip():
        raise NothingToLearn(f"`{place}` is an empty answer")
    return message, role == "assistant" and item.get("weight") != 0


def _tool_call(call: Any, place: str) -> dict[str, Any]:
    """With its arguments as an object, which is what templates read, where OpenAI has the JSON of one."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"`{place}` has the tool call {str(call)[:80]!r}, which has no name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _json_object(arguments, place)
    outer = {key: value for key, value in call.items() if key == "id" and value is not None}
    return {**outer, "type": "function", "function": {"name": function["name"], "arguments": arguments or {}}}


def _json_object(text: str, place: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"`{place}` has a tool call with {text[:80]!r}, which is no JSON object")
    return value


def _without_nones(value: Any) -> Any:
    """A tool's schema as it was: Arrow gives every object the keys of all, filled with None."""
    if isinstance(value, dict):
        return {key: _without_nones(item) for key, item in value.items() if item is not None}
    return [_without_nones(item) for item in value] if isinstance(value, list | tuple) else value


# ---------------------------------------------------------------- plain text


@dataclass(frozen=True)
class Part:
    text: str
    learnt: bool  # and then the end-of-sequence token comes after it


# The wording of Stanford Alpaca (https://github.com/tatsu-lab/stanford_alpaca), with a line's end after `Response:`.
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)


def to_parts(row: dict[str, Any], format: Format, text_column: str = "text") -> list[Part]:
    """Plain text, prompts and answers by turns.

    A prompt and its completion stand side by side as they are written; only a question and its answer, which nobody
    writes with a space between, are on two lines. Alpaca's system prompt stands in place of its first sentences.
    """
    if format == "text":
        text = as_text(row.get(text_column), text_column)
        if not text.strip():
            raise NothingToLearn(f"`{text_column}` is empty")
        return [Part(text, True)]
    if format == "prompt_completion":
        name, cell = _cell(row, format, "prompt")
        prompt = as_text(cell, name) + ("\n" if name == "question" else "")
        system = _text(row, format, "system")
        prompt = f"{system}\n\n{prompt}" if system.strip() else prompt
        return [Part(prompt, False), Part(_answer(row, format, "completion"), True)]
    assert format == "alpaca", format
    instruction, given = _text(row, format, "instruction"), _text(row, format, "input")
    answer = _answer(row, format, "output")
    preamble = _text(row, format, "system").strip() or (ALPACA_INPUT if given.strip() else ALPACA)
    parts: list[Part] = []
    for before, after in _history(row):
        parts += [Part(f"{'' if parts else preamble}\n\n### Instruction:\n{before}\n\n### Response:\n", False)]
        parts += [Part(after, True)]
    context = f"\n\n### Input:\n{given}" if given.strip() else ""
    start = "" if parts else preamble
    parts.append(Part(f"{start}\n\n### Instruction:\n{instruction}{context}\n\n### Response:\n", False))
    return [*parts, Part(answer, True)]
