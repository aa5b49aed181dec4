"""Supervised fine-tuning: a row of data as token ids, and which of them are learnt.

A row with a chat template is rendered as text, tokenised whole, and the assistant's turns are found in the text (see
chat_template.py). A token belongs to where its first character lies: one that begins in the header is not learnt, even
where it runs into the answer, for at inference the header is given. If such a token takes more than white space from
the answer, or one that begins in the answer takes more than white space from what follows, the row is refused.

Where the template marks the assistant's words with {% generation %}, the marks (Transformers' own
`return_assistant_tokens_mask`) narrow what is learnt: a turn without any is not learnt, a header inside them is not
learnt, and the token that ends the turn is learnt even if it stands outside, as the model would not learn to stop.
Marks that hold no answer, or a part of one, are refused.

A row without a template is plain text. Prompt and completion are tokenised on their own, so that no token straddles
the border; the completion gets no BOS and no space that it does not have, and the end-of-sequence token comes after.

What is learnt of a chat is decoded again, and must hold the answer.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fleetune.train.chat_template import ChatTemplate, Turn, read_template, shortened
from fleetune.train.formats import (
    FORMAT_COLUMNS,
    FORMATS,
    Columns,
    Conversation,
    Format,
    NothingToLearn,
    Part,
    check_columns,
    columns_of,
    find_format,
    is_conversation,
    to_messages,
    to_parts,
)

NO_TEMPLATE = "none"  # as data.chat_template: plain text, whatever the tokenizer has


@dataclass(frozen=True)
class Encoded:
    input_ids: list[int]
    supervised: list[bool]  # same length: which tokens are targets; the loss shifts them later

    @property
    def learns(self) -> bool:
        """The first token is never a target: nothing comes before it."""
        return any(self.supervised[1:])


class Encoder:
    def __init__(
        self,
        tokenizer: Any,
        format: Format,
        *,
        chat_template: str | Path | None = None,
        loss_on: Literal["assistant", "all"] = "assistant",
        text_column: str = "text",
    ) -> None:
        """`chat_template` is Jinja, a .jinja file, or "none"; the tokenizer's own when None."""
        self.tokenizer, self.format, self.loss_on, self.text_column = tokenizer, format, loss_on, text_column
        given = read_template(chat_template)
        self.template: ChatTemplate | None = None
        if format != "text" and given != NO_TEMPLATE and (given is not None or tokenizer.chat_template):
            if not tokenizer.is_fast:
                raise ValueError(
                    "data.chat_template: finding the assistant's turns takes a fast tokenizer (a tokenizer.json), and "
                    f"this one is slow: {type(tokenizer).__name__}"
                )
            self.template = ChatTemplate(tokenizer, given)
        elif format in ("sharegpt", "messages"):
            raise _no_template(format)
        if self.template is None and tokenizer.eos_token_id is None:
            raise ValueError(
                "model.model_name_or_path: its tokenizer has no end-of-sequence token (eos_token), and the model would "
                "never learn to stop; give it one, or a data.chat_template that ends the turns"
            )
        alone, whole = self._ids("a"), list(tokenizer("a")["input_ids"])
        begins = [i for i in range(len(whole)) if whole[i : i + len(alone)] == alone]
        self.bos = whole[: begins[0]] if begins else []
        self.adds_space = len(alone) > 0 and tokenizer.convert_ids_to_tokens(alone)[0][:1] in ("▁", "Ġ")
        self.trims = _trims_offsets(tokenizer) if self.template is not None else False

    def encode(self, row: dict[str, Any]) -> Encoded:
        """Raises NothingToLearn for a row that teaches nothing, ValueError for one that is not as it should be."""
        if self.template is None:
            if is_conversation(row, self.format):
                raise _no_template(self.format)
            encoded = self._plain(to_parts(row, self.format, self.text_column))
        else:
            encoded = self._chat(self.template, to_messages(row, self.format))
        if not encoded.learns:
            raise NothingToLearn("nothing in it is learnt")
        return encoded

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    # ------------------------------------------------------------ plain text

    def _plain(self, parts: list[Part]) -> Encoded:
        eos = self.tokenizer.eos_token_id
        input_ids, supervised = list(self.bos), [self.format == "text" or self.loss_on == "all"] * len(self.bos)
        for i, part in enumerate(parts):
            ids = self._ids(part.text) if i == 0 else self._continuation(part.text)
            if i == 0 and self.bos and ids[: len(self.bos)] == self.bos:  # it is written in the text already
                ids = ids[len(self.bos) :]
            if part.learnt and ids[-1:] != [eos]:
                ids.append(eos)
            input_ids += ids
            supervised += [part.learnt or self.loss_on == "all"] * len(ids)
        return Encoded(input_ids, supervised)

    def _continuation(self, text: str) -> list[int]:
        """The tokens of a text that others come before: tokenizers of SentencePiece's kind begin one with a space."""
        if self.adds_space:
            anchor, anchored = self._ids("\n"), self._ids("\n" + text)
            if anchored[: len(anchor)] == anchor:
                return anchored[len(anchor) :]
        return self._ids(text)

    # ------------------------------------------------------------ chat

    def _chat(self, template: ChatTemplate, conversation: Conversation) -> Encoded:
        on_turns = self.loss_on == "assistant"
        if on_turns and not any(conversation.learnt):
            raise NothingToLearn("no turn of it is the assistant's")
        rendered = template.render(conversation, on_turns)
        marked = on_turns and template.has_marks(conversation.tools)
        if marked:
            encoding = template.marked(conversation.messages, conversation.tools)
        else:
            encoding = self.tokenizer(
                rendered.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
        input_ids = list(encoding["input_ids"])
        if not on_turns:
            return Encoded(input_ids, [True] * len(input_ids))
        spans = self._spans(input_ids, encoding["offset_mapping"])
        supervised = [False] * len(input_ids)
        for turn in rendered.turns:
            tokens = [j for j, (start, _) in enumerate(spans) if turn.start <= start < turn.end]
            ending: list[int] = []
            if marked:
                within = [j for j in tokens if encoding["assistant_masks"][j]]
                if not within:
                    continue
                tokens, ending = within, [j for j in tokens if j > within[-1]]
            self._verify(rendered.text, turn, tokens, spans, input_ids)
            for j in tokens + ending:
                supervised[j] = True
        if marked and not any(supervised):
            raise ValueError(
                "data.chat_template: its {% generation %} marks hold nothing that the assistant says; take them out, "
                f"and the turns are found without; it renders as {shortened(rendered.text)!r}"
            )
        return Encoded(input_ids, supervised)

    def _spans(self, input_ids: list[int], offsets: Any) -> list[tuple[int, int]]:
        """Each token's characters, with the spaces that byte-level tokenizers may trim off the offsets."""
        if not self.trims:
            return [(start, end) for start, end in offsets]
        tokens = self.tokenizer.convert_ids_to_tokens(input_ids)
        spaces = [len(token) - len(token.lstrip("Ġ")) for token in tokens]
        return [(max(0, start - count), end) for (start, end), count in zip(offsets, spaces, strict=True)]

    def _verify(
        self, text: str, turn: Turn, tokens: list[int], spans: list[tuple[int, int]], input_ids: list[int]
    ) -> None:
        """What is learnt holds the answer, in the text and decoded, and nothing of what follows."""
        reason = None
        begin, end = (spans[tokens[0]][0], spans[tokens[-1]][1]) if tokens else (0, 0)
        if not tokens:
            reason = "no token of the assistant's turn is learnt"
        elif turn.content not in text[begin:end]:
            reason = "what is learnt does not hold the assistant's whole answer: a token, or a mark, cuts it"
        elif text[turn.end : end].strip():
            reason = f"a token runs from the assistant's turn into what follows ({text[turn.end : end]!r})"
        elif not self._decodes([input_ids[j] for j in range(tokens[0], tokens[-1] + 1)], turn.content):
            reason = "the tokens that are learnt do not decode to the assistant's answer"
        if reason is not None:
            near = text[max(0, turn.start - 200) : turn.end + 100]
            raise ValueError(f"data.chat_template: {reason}; it renders as {shortened(near)!r}")

    def _decodes(self, ids: list[int], content: str) -> bool:
        """True as well where the tokenizer loses something of this content by itself, as unknown characters."""
        wanted = _squeezed(content)
        if wanted in _squeezed(decode(self.tokenizer, ids)):
            return True
        return wanted != _squeezed(decode(self.tokenizer, self._ids(content)))


def _no_template(format: Format) -> ValueError:
    return ValueError(
        f"data.chat_template: data.format = {format!r} is chats, and neither the tokenizer nor the recipe has a chat "
        "template to render them; give the path of a .jinja file, or the template itself"
    )


def _trims_offsets(tokenizer: Any) -> bool:
    """Whether a byte-level tokenizer's offsets leave out a token's leading space, as GPT-2's do."""
    encoding = tokenizer("a a", add_special_tokens=False, return_offsets_mapping=True)
    tokens = tokenizer.convert_ids_to_tokens(encoding["input_ids"])
    starts = [start for start, _ in encoding["offset_mapping"]]
    return any(token.startswith("Ġ") and start == 2 for token, start in zip(tokens, starts, strict=True))


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", "", unicodedata.normalize("NFKC", text)).casefold()


def decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


# ---------------------------------------------------------------- lengths, and a look


def cut(encoded: Encoded, max_length: int, too_long: Literal["cut_right", "cut_left", "drop"]) -> Encoded | None:
    """At most max_length tokens; None where the example is dropped, or nothing that is learnt remains.

    cut_right keeps the beginning, and may lose the token that ends the last turn; cut_left keeps the end, and loses
    the BOS. The first token that remains is never a target.
    """
    if len(encoded.input_ids) <= max_length:
        return encoded if encoded.learns else None
    if too_long == "drop":
        return None
    kept = slice(max_length) if too_long == "cut_right" else slice(len(encoded.input_ids) - max_length, None)
    shorter = Encoded(encoded.input_ids[kept], encoded.supervised[kept])
    return shorter if shorter.learns else None


def ending(encoded: Encoded, tokenizer: Any) -> int | None:
    """The last token that is learnt, where it is one that can end a generation: the EOS, or another special token."""
    last = next(
        token for token, learnt in zip(encoded.input_ids[::-1], encoded.supervised[::-1], strict=True) if learnt
    )
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    return last if last == tokenizer.eos_token_id or last in special else None


def show(encoded: Encoded, tokenizer: Any) -> list[tuple[str, bool]]:
    """The example as runs of text, each with whether it is learnt."""
    shown: list[tuple[str, bool]] = []
    before = ""
    for _, end, learnt in _runs(encoded.supervised):
        text = decode(tokenizer, encoded.input_ids[:end])  # from the beginning: a run on its own may lose its space
        shown.append((text[len(before) :], learnt))
        before = text
    return shown


def _runs(flags: list[bool]) -> Iterator[tuple[int, int, bool]]:
    start = 0
    for i in range(1, len(flags) + 1):
        if i == len(flags) or flags[i] != flags[start]:
            yield start, i, flags[start]
            start = i


__all__ = [
    "FORMATS",
    "FORMAT_COLUMNS",
    "Columns",
    "Encoded",
    "Encoder",
    "Format",
    "NothingToLearn",
    "check_columns",
    "columns_of",
    "cut",
    "ending",
    "find_format",
    "show",
]
