"""The answer template of Qwen Look Again: its ten tags, and a parser for whole answers.

``<SUMMARY>…</SUMMARY> <CAPTION>…</CAPTION> <REASONING>…</REASONING> <REFLECTION>…</REFLECTION>
<CONCLUSION>…</CONCLUSION>`` (Chu et al., arXiv 2505.23558): the four blocks other than the
reflection come once each and in this order; any number of reflections may stand between blocks;
nothing nests. A reflection may be empty.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

BLOCKS: tuple[str, ...] = ("SUMMARY", "CAPTION", "REASONING", "REFLECTION", "CONCLUSION")
ONCE: tuple[str, ...] = tuple(name for name in BLOCKS if name != "REFLECTION")
REFLECTION = "<REFLECTION>"
REFLECTION_END = "</REFLECTION>"
CONCLUSION = "<CONCLUSION>"
CONCLUSION_END = "</CONCLUSION>"
TAGS: tuple[str, ...] = tuple(tag for name in BLOCKS for tag in (f"<{name}>", f"</{name}>"))

_TAG = re.compile("|".join(re.escape(tag) for tag in TAGS))


@dataclass(frozen=True)
class Block:
    """One closed block: its name, the text inside, and the offsets of that text in the answer."""

    name: str
    text: str
    start: int
    end: int


@dataclass(frozen=True)
class ParsedAnswer:
    """What :func:`parse` found.

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
        return sum(block.name == "REFLECTION" for block in self.blocks)

    @property
    def conclusion(self) -> str | None:
        """Text of the first conclusion, stripped, or None when there is none."""
        return self.text("CONCLUSION")

    def text(self, name: str) -> str | None:
        """Stripped text of the first block called ``name``, or None."""
        return next((block.text.strip() for block in self.blocks if block.name == name), None)


def wrap(name: str, text: str) -> str:
    """``<NAME>text</NAME>``; raises ValueError for a name the template does not have."""
    if name not in BLOCKS:
        raise ValueError(f"name must be one of {', '.join(BLOCKS)}, got {name!r}")
    return f"<{name}>{text}</{name}>"


def _blocks(text: str, errors: list[str]) -> list[Block]:
    """Closed blocks of ``text``; what is nested, stray, loose or unclosed goes to ``errors``."""
    blocks: list[Block] = []
    opened: tuple[str, int] | None = None
    outside = 0
    for match in _TAG.finditer(text):
        tag = match.group()
        name = tag.strip("</>")
        if not tag.startswith("</"):
            if opened is not None:
                errors.append(f"{tag} opens inside <{opened[0]}>")
            elif text[outside : match.start()].strip():
                errors.append(f"text outside the blocks before {tag}")
            opened = (name, match.end())
        elif opened is None or opened[0] != name:
            errors.append(f"{tag} closes a block that is not open")
        else:
            blocks.append(Block(name, text[opened[1] : match.start()], opened[1], match.start()))
            opened, outside = None, match.end()
    if opened is not None:
        errors.append(f"<{opened[0]}> is never closed")
    elif text[outside:].strip():
        errors.append("text outside the blocks at the end")
    return blocks


def parse(text: str) -> ParsedAnswer:
    """Split an answer into its blocks and name every departure from the template.

    Args:
        text: the whole answer, decoded with the tags kept, without the prompt.

    Returns:
        The closed blocks and the list of errors. Nothing raises: a model may write anything.
    """
    errors: list[str] = []
    blocks = _blocks(text, errors)
    names = [block.name for block in blocks]
    for name in ONCE:
        if (count := names.count(name)) != 1:
            errors.append(f"<{name}> must come once, found {count}")
    order = [name for name in names if name in ONCE]
    if sorted(order, key=ONCE.index) != order:
        errors.append(f"blocks out of order: {', '.join(order)}")
    if names and (names[0] == "REFLECTION" or names[-1] == "REFLECTION"):
        errors.append("a reflection stands between blocks, not before the first or after the last")
    return ParsedAnswer(tuple(blocks), tuple(errors))
