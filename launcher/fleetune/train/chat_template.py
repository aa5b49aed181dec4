"""A chat template: what a conversation looks like as text, and where in it the assistant speaks.

What is learnt of a turn is what the model would have to say at inference: all that comes after the header that
`add_generation_prompt` renders, up to and including the token that ends the turn. A template that renders no such
header leaves it to the model, and then it is learnt too. White space after the token that ends the turn is not.

How a turn is found. The conversation up to the turn, with the generation prompt, should be the beginning of the
conversation up to and with the turn, and that of the whole: then the turn is what lies between (Llama 3, ChatML,
Gemma). Where it isn't, because a template moves the system prompt to the last user's turn (Mistral), drops what was
reasoned before (Qwen3) or puts an EOS at the end of every conversation (Phi-3), the whole is rendered once more with a
marker in place of the turn's content; what comes before and behind the marker must be there in the real text, and what
lies between is the content.

And how that is checked. For every sequence of roles the same is done to a conversation of markers alone: each turn
must hold its own marker and nobody else's, behind all that was said before it and ahead of all that comes later, and
no message may be left out. Templates are rendered by Transformers, in Jinja's sandbox.

A turn whose reasoning the template leaves out is not learnt: it would teach the model not to reason.
"""

from __future__ import annotations

import datetime
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleetune.train.formats import Conversation

_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_TODAY = re.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<format>.*?)(?P=quote)\s*\)""")
DATE = datetime.datetime(2024, 7, 26)  # what Llama's templates fall back to where they cannot ask for today
_END_OF_REASONING = "</think>"
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
SHOWN = 600  # characters of a rendering that an error shows


@dataclass(frozen=True)
class Turn:
    start: int  # in characters of the text
    end: int
    content: str  # what must be in it; empty for a mere tool call


@dataclass(frozen=True)
class Rendered:
    text: str
    turns: list[Turn]  # those that are learnt


def read_template(chat_template: str | Path | None) -> str | None:
    """A template's text: itself, or what stands in the .jinja file that it names."""
    if chat_template is None or (isinstance(chat_template, str) and not _is_file(chat_template)):
        return chat_template
    try:
        return Path(chat_template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"data.chat_template = {str(chat_template)!r}: cannot be read: {reason}") from error


def _is_file(template: str) -> bool:
    return template.endswith(".jinja") and not re.search(r"[{\n]", template)


def template_of(tokenizer: Any, given: str | None, tools: list[Any] | None) -> str:
    """The one that is given, or the tokenizer's own, with one date for ever in today's place: the rows, and whether a
    run goes on with those it began with, must not depend on the day."""

    def fixed(found: re.Match[str]) -> str:
        return json.dumps(DATE.strftime(found["format"]))

    return _TODAY.sub(fixed, tokenizer.get_chat_template(given, tools))


def shortened(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2 - 3]} [..] {text[-(SHOWN // 2 - 3) :]}"


class ChatTemplate:
    def __init__(self, tokenizer: Any, chat_template: str | None) -> None:
        """Takes the tokenizer's own template where none is given."""
        from jinja2.exceptions import TemplateSyntaxError

        self.tokenizer, self.given = tokenizer, chat_template
        self.checked: set[int] = set()  # sequences of roles, by their hash
        added = {token.content for token in tokenizer.added_tokens_decoder.values()}
        self.special = tuple(token for token in added if token.strip())
        try:
            self._apply([{"role": "user", "content": "?"}], None)
        except TemplateSyntaxError as error:
            raise ValueError(f"data.chat_template: is no Jinja template: line {error.lineno}: {error}") from error
        except Exception:  # noqa: S110 it may well refuse this conversation
            pass

    def has_marks(self, tools: list[Any] | None) -> bool:
        """Whether {% generation %} says what the assistant's words are."""
        return _MARKS.search(self.tokenizer.get_chat_template(self.given, tools)) is not None

    def _apply(self, messages: list[dict[str, Any]], tools: list[Any] | None, **options: Any) -> Any:
        options = {"tokenize": False} | options
        template = template_of(self.tokenizer, self.given, tools)
        return self.tokenizer.apply_chat_template(messages, tools=tools, chat_template=template, **options)

    def text(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> str:
        try:
            return str(self._apply(messages, tools))
        except Exception as error:  # of many kinds: what a template raises, and what goes wrong in it
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(
                f"data.chat_template: refuses the conversation ({shortened(roles)}): {error or type(error).__name__}"
            ) from error

    def marked(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> Any:
        """Tokens with their offsets and Transformers' own `assistant_masks`."""
        return self._apply(
            messages,
            tools,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True, "verbose": False},
        )

    # ------------------------------------------------------------ the turns

    def render(self, conversation: Conversation, with_turns: bool) -> Rendered:
        """Raises ValueError where a turn that is learnt cannot be found, or the template is not to be trusted."""
        messages, tools = conversation.messages, conversation.tools
        text = self.text(messages, tools)
        self._check(messages, tools, with_turns)
        turns: list[Turn] = []
        dropped = False
        for i, learnt in enumerate(conversation.learnt):
            if learnt and with_turns:
                start, end = self._find(messages, i, text, tools)
                reasoning, answer = _split_reasoning(messages[i])
                if reasoning and reasoning not in text[start:end]:
                    dropped = True
                else:
                    turns.append(Turn(start, end, answer))
        if dropped and not turns:
            raise ValueError(
                "data.chat_template: leaves out the assistant's reasoning, which would teach it not to reason; give a "
                f"template that keeps it, or data without; it renders as {shortened(text)!r}"
            )
        return Rendered(text, turns)

    def _find(self, messages: list[dict[str, Any]], i: int, text: str, tools: list[Any] | None) -> tuple[int, int]:
        found = self._by_beginning(messages, i, text, tools) or self._by_marker(messages, i, text, tools)
        if found is None:
            content = messages[i]["content"]
            missing = " (its content is not there)" if _visible(content).strip() not in text else ""
            raise ValueError(
                f"data.chat_template: the assistant's turn {i} (counted from 0) cannot be told from the rest{missing}; "
                f"it renders as {shortened(text)!r}"
            )
        start, end = found
        ended = text[start:end].rstrip()
        return (start, start + len(ended)) if ended.endswith(self.special) else (start, end)

    def _partial(self, messages: list[dict[str, Any]], tools: list[Any] | None, prompt: bool = False) -> str | None:
        """The beginning of a conversation; None where the template refuses it."""
        try:
            return str(self._apply(messages, tools, add_generation_prompt=prompt))
        except Exception:
            return None

    def _by_beginning(
        self, messages: list[dict[str, Any]], i: int, text: str, tools: list[Any] | None
    ) -> tuple[int, int] | None:
        before = self._partial(messages[:i], tools, prompt=True)
        upto = text if i == len(messages) - 1 else self._partial(messages[: i + 1], tools)
        if before is None or upto is None or not (text.startswith(upto) and upto.startswith(before)):
            return None
        return (len(before), len(upto)) if _visible(messages[i]["content"]).strip() in upto[len(before) :] else None

    def _by_marker(
        self, messages: list[dict[str, Any]], i: int, text: str, tools: list[Any] | None
    ) -> tuple[int, int] | None:
        content = messages[i]["content"]
        marker = _marker(i)
        while marker in text:
            marker += "x"
        visible = _visible(content)
        marked = {**messages[i], "content": content[: len(content) - len(visible)] + marker}
        whole = self._partial([*messages[:i], marked, *messages[i + 1 :]], tools)
        part = self._partial([*messages[:i], marked], tools)
        if whole is None or part is None or whole.count(marker) != 1 or part.count(marker) != 1:
            return None
        head, tail = whole.split(marker)
        if not (text.startswith(head) and text.endswith(tail)) or len(head) + len(tail) > len(text):
            return None
        start, end = len(head), len(text) - len(tail)
        if text[start:end].strip() != visible.strip():
            return None
        part_head, ending = part.split(marker)
        shared = self._shared(ending, text[end:])
        if shared is None:
            return None
        prompt = self._partial(messages[:i], tools, prompt=True)
        said_first = part_head[len(prompt) :] if prompt is not None and part_head.startswith(prompt) else ""
        if not head.endswith(said_first):
            said_first = ""
        return start - len(said_first), end + len(shared)

    def _shared(self, ending: str, following: str) -> str | None:
        """How a turn ends, without what a template adds at the end of everything (Phi-3's EOS).

        That is what both begin with, up to its last special token or line's end where they then differ: two headers
        may begin alike.
        """
        if following.startswith(ending):
            return ending
        alike = [a == b for a, b in zip(ending, following, strict=False)]
        both = ending[: [*alike, False].index(False)]
        return both[: max((both.rfind(t) + len(t) for t in (*self.special, "\n") if t in both), default=0)] or None

    # ------------------------------------------------------------ the check

    def _check(self, messages: list[dict[str, Any]], tools: list[Any] | None, with_turns: bool) -> None:
        """The same sequence of roles with nothing but markers for content, once."""
        skeleton = [{**m, "content": _marker(i)} if m["content"].strip() else m for i, m in enumerate(messages)]
        key = hash(json.dumps([skeleton, tools], default=str))
        if key in self.checked:
            return
        text = self.text(skeleton, tools)
        markers = {i: m["content"] for i, m in enumerate(skeleton) if m is not messages[i]}
        for i, marker in markers.items():
            if marker not in text:
                raise ValueError(
                    f"data.chat_template: leaves out the content of a turn (the {messages[i]['role']}'s, {i} counted "
                    f"from 0); with markers for content it renders as {shortened(text)!r}"
                )
        for i, message in enumerate(skeleton):
            if with_turns and message["role"] == "assistant":
                start, end = self._find(skeleton, i, text, tools)
                if not _in_order(skeleton, markers, i, text, start, end):
                    raise ValueError(
                        f"data.chat_template: mixes the assistant's turn {i} (counted from 0) with what others say, or "
                        f"reorders the turns; with markers for content it renders as {shortened(text)!r}"
                    )
        self.checked.add(key)


def _in_order(
    skeleton: list[dict[str, Any]], markers: dict[int, str], turn: int, text: str, start: int, end: int
) -> bool:
    """Own content inside; what was said before it stands ahead of it, and later words behind. System prompts move."""
    for i, marker in markers.items():
        place = text.find(marker)
        if i == turn:
            fine = start <= place and place + len(marker) <= end
        elif skeleton[i]["role"] == "system":
            fine = marker not in text[start:end]
        else:
            fine = place + len(marker) <= start if i < turn else place >= end
        if not fine:
            return False
    return True


def _marker(i: int) -> str:
    return f"fleetune{i}turn"


def _visible(content: str) -> str:
    """The answer, without what was reasoned before it."""
    return content.rpartition(_END_OF_REASONING)[2]


def _split_reasoning(message: dict[str, Any]) -> tuple[str, str]:
    """What was reasoned, and what was answered, both stripped."""
    before, _, answer = message["content"].rpartition(_END_OF_REASONING)
    reasoning = next((message[key] for key in _REASONING_KEYS if isinstance(message.get(key), str)), before)
    return reasoning.rpartition("<think>")[2].strip(), answer.strip()
