"""The answer template of Qwen Look Again: its ten tags, and one parser for text and token ids.

``<SUMMARY>…</SUMMARY> <CAPTION>…</CAPTION> <REASONING>…</REASONING> <REFLECTION>…</REFLECTION>
<CONCLUSION>…</CONCLUSION>`` (Chu et al., arXiv 2505.23558): the four blocks other than the
reflection come once each and in this order; any number of reflections may stand between blocks;
nothing nests. A reflection may be empty.

:func:`parse` takes a whole text, :class:`TemplateStream` a text that comes in pieces, and
:func:`parse_ids` token ids. All three run the same rules, so that rewards, checks of data and what
is shown on a screen never disagree.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

BLOCKS: tuple[str, ...] = ("SUMMARY", "CAPTION", "REASONING", "REFLECTION", "CONCLUSION")
ONCE: tuple[str, ...] = tuple(name for name in BLOCKS if name != "REFLECTION")
REFLECTION = "<REFLECTION>"
REFLECTION_END = "</REFLECTION>"
CONCLUSION = "<CONCLUSION>"
CONCLUSION_END = "</CONCLUSION>"
TAGS: tuple[str, ...] = tuple(tag for name in BLOCKS for tag in (f"<{name}>", f"</{name}>"))

_TAG = re.compile("|".join(re.escape(tag) for tag in TAGS))
_BEGINNINGS = frozenset(tag[:length] for tag in TAGS for length in range(1, len(tag)))
_LONGEST = max(map(len, TAGS))


@dataclass(frozen=True)
class Block:
    """One closed block: its name, the text inside, and where that text is in the answer.

    ``start`` and ``end`` are half-open offsets: characters in a text, tokens in token ids.
    """

    name: str
    text: str
    start: int
    end: int

    @property
    def length(self) -> int:
        """Characters, or tokens, between the tags."""
        return self.end - self.start


@dataclass(frozen=True)
class ParsedAnswer:
    """What :func:`parse`, :func:`parse_ids` or a :class:`TemplateStream` found.

    Attributes:
        blocks: every closed block, in the order of the text.
        errors: in words, each way in which the answer leaves the template; empty if it follows it.
    """

    blocks: tuple[Block, ...]
    errors: tuple[str, ...]

    @property
    def well_formed(self) -> bool:
        """Whether the answer follows the template to the letter."""
        return not self.errors

    @property
    def reflections(self) -> int:
        """How many reflections were opened and closed."""
        return len(self.reflection_lengths)

    @property
    def reflection_lengths(self) -> tuple[int, ...]:
        """For each closed reflection what lies between its tags, in characters or in tokens."""
        return tuple(block.length for block in self.blocks if block.name == "REFLECTION")

    @property
    def conclusion(self) -> str | None:
        """Text of the first conclusion, stripped, or None when there is none."""
        return self.text("CONCLUSION")

    def text(self, name: str) -> str | None:
        """Stripped text of the first block called ``name``, or None."""
        return next((block.text.strip() for block in self.blocks if block.name == name), None)


@dataclass(frozen=True)
class StreamEvent:
    """What a :class:`TemplateStream` is sure of.

    Attributes:
        kind: "open" or "close" for a tag, "text" for what is none.
        text: the tag or the text, as it came.
        block: for a tag its name; for text the block that it is in, or None outside of all.
    """

    kind: str
    text: str
    block: str | None


class _Rules:
    """The template's rules, fed with tags and with the text between them."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.errors: list[str] = []
        self.opened: str | None = None
        self._start = 0
        self._inside: list[str] = []
        self._loose = False

    def text(self, text: str) -> None:
        if self.opened is not None:
            self._inside.append(text)
        elif text.strip():
            self._loose = True

    def tag(self, tag: str, start: int, end: int) -> None:
        """A tag that lies at ``start`` and ends before ``end``."""
        name = tag.strip("</>")
        if not tag.startswith("</"):
            if self.opened is not None:
                self.errors.append(f"{tag} opens inside <{self.opened}>")
            elif self._loose:
                self.errors.append(f"text outside the blocks before {tag}")
            self.opened, self._start, self._inside, self._loose = name, end, [], False
        elif self.opened != name:
            self.errors.append(f"{tag} closes a block that is not open")
            self.text(tag)
        else:
            self.blocks.append(Block(name, "".join(self._inside), self._start, start))
            self.opened, self._inside = None, []

    def result(self) -> ParsedAnswer:
        """What an answer that ends here is."""
        errors = list(self.errors)
        if self.opened is not None:
            errors.append(f"<{self.opened}> is never closed")
        elif self._loose:
            errors.append("text outside the blocks at the end")
        names = [block.name for block in self.blocks]
        for name in ONCE:
            if (count := names.count(name)) != 1:
                errors.append(f"<{name}> must come once, found {count}")
        order = [name for name in names if name in ONCE]
        if sorted(order, key=ONCE.index) != order:
            errors.append(f"blocks out of order: {', '.join(order)}")
        if names and (names[0] == "REFLECTION" or names[-1] == "REFLECTION"):
            errors.append(
                "a reflection stands between blocks, not before the first or after the last"
            )
        return ParsedAnswer(tuple(self.blocks), tuple(errors))


class TemplateStream:
    """Parses an answer while it is written; the pieces may be cut anywhere, inside a tag too.

    Equivalent to, for any way of cutting a text::

        stream = TemplateStream()
        for piece in pieces:
            stream.feed(piece)
        stream.finish() == parse("".join(pieces))
    """

    def __init__(self) -> None:
        self._rules = _Rules()
        self._held = ""
        self._offset = 0

    @property
    def block(self) -> str | None:
        """The name of the block that is open now, or None."""
        return self._rules.opened

    def feed(self, piece: str) -> list[StreamEvent]:
        """Take the next piece; gives what is certain now.

        An end that may yet become a tag is held back until the next piece or :meth:`finish`, so the
        events' texts, put together, are always a beginning of what was fed.
        """
        text, done, events = self._held + piece, 0, []
        for match in _TAG.finditer(text):
            events += self._text(text[done : match.start()])
            tag, done = match.group(), match.end()
            self._rules.tag(tag, self._offset, self._offset + len(tag))
            self._offset += len(tag)
            kind = "close" if tag.startswith("</") else "open"
            events.append(StreamEvent(kind, tag, tag.strip("</>")))
        rest = text[done:]
        longest = range(min(len(rest), _LONGEST - 1), 0, -1)
        kept = next((n for n in longest if rest[-n:] in _BEGINNINGS), 0)
        self._held = rest[len(rest) - kept :]
        return events + self._text(rest[: len(rest) - kept])

    def finish(self) -> ParsedAnswer:
        """What was fed, as a whole answer; what was held back is text. Feed nothing afterwards."""
        held, self._held = self._held, ""
        self._text(held)
        return self._rules.result()

    def _text(self, text: str) -> list[StreamEvent]:
        if not text:
            return []
        self._rules.text(text)
        self._offset += len(text)
        return [StreamEvent("text", text, self._rules.opened)]


def wrap(name: str, text: str) -> str:
    """``<NAME>text</NAME>``; raises ValueError for a name the template does not have."""
    if name not in BLOCKS:
        raise ValueError(f"name must be one of {', '.join(BLOCKS)}, got {name!r}")
    return f"<{name}>{text}</{name}>"


def parse(text: str) -> ParsedAnswer:
    """Split an answer into its blocks and name every departure from the template.

    Args:
        text: the whole answer, decoded with the tags kept, without the prompt.

    Returns:
        The closed blocks and the list of errors. Nothing raises: a model may write anything.
    """
    stream = TemplateStream()
    stream.feed(text)
    return stream.finish()


def tag_ids(tokenizer: Any) -> dict[int, str]:  # noqa: ANN401 - or a processor
    """The template's tags by their token ids.

    Args:
        tokenizer: a tokenizer, or a processor that has one.

    Raises:
        ValueError: a tag is not a single token of this tokenizer.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    ids = {tag: tokenizer.convert_tokens_to_ids(tag) for tag in TAGS}
    unknown = (None, getattr(tokenizer, "unk_token_id", None))
    if missing := [tag for tag, number in ids.items() if number in unknown]:
        raise ValueError(
            f"{', '.join(missing)} must be single tokens of the tokenizer; "
            "lookagain_ext.add_reflection_tokens(model, tokenizer) adds them"
        )
    return {int(number): tag for tag, number in ids.items()}


def hidden_tokens(tokenizer: Any) -> set[int]:  # noqa: ANN401
    """Ids of special tokens that are not part of an answer; the tags are, special or not."""
    added = tokenizer.added_tokens_decoder.items()
    return {i for i, token in added if token.special and token.content not in TAGS}


def parse_ids(ids: Sequence[int], tokenizer: Any) -> ParsedAnswer:  # noqa: ANN401
    """:func:`parse` on the token ids of an answer; offsets and lengths are in tokens.

    Only the tags' own tokens are tags. Ordinary tokens that spell a tag are an error: decoded and
    encoded again, as data for training is, they would become one.

    Args:
        ids: token ids of the completion, without the prompt. The answer ends before the first
            end-of-sequence or padding token.
        tokenizer: with the ten tags as single tokens; or a processor that has one.

    Raises:
        ValueError: a tag is not a single token of this tokenizer.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    tags = tag_ids(tokenizer)
    ends = {tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}
    rules = _Rules()
    answer = [int(token) for token in ids]
    length = next((i for i, token in enumerate(answer) if token in ends), len(answer))
    begun = 0
    for i in range(length + 1):
        if i < length and answer[i] not in tags:
            continue
        if i > begun:
            text = tokenizer.decode(answer[begun:i], skip_special_tokens=False)
            rules.text(text)
            if spelled := _TAG.search(text):
                rules.errors.append(f"{spelled.group()} is spelled in ordinary tokens")
        if i < length:
            rules.tag(tags[answer[i]], i, i + 1)
        begun = i + 1
    return rules.result()
