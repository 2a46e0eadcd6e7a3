"""Whether two mathematical texts say the same: values, equations, intervals, lists and sets.

What is compared by ``math-verify`` is single values, which were understood to their last sign; see
:mod:`.values`. Around them stand relations, commas and brackets, which must be the same in both.
"""

from __future__ import annotations

import re
import threading
from functools import cache
from typing import Any

from .values import Value, plain_signs, read_value

__all__ = ["says_the_same"]

_RELATIONS = {
    "≤": r"\\leqslant|\\leq|\\le(?!ft)|<=",
    "≥": r"\\geqslant|\\geq|\\ge|>=",
    "≠": r"\\neq|\\ne|!=",
    "<": r"\\lt",
    ">": r"\\gt",
    "∈": r"\\in",
    "∪": r"\\cup",
    "∩": r"\\cap",
    "±": r"\\pm",
    "⦃": r"\\\{|\\lbrace",  # braces of a set, not of a group
    "⦄": r"\\\}|\\rbrace",
}
_MIRRORED = {"<": ">", ">": "<", "≤": "≥", "≥": "≤", "=": "=", "≠": "≠"}
_DIVIDERS = (",;", "≤≥≠<>=∈", "∪∩", "±")  # the outermost first
_OPENING, _CLOSING = "([{⦃", ")]}⦄"
_THOUSANDS = re.compile(r"\d,\d{3}(?!\d)")
_NAME = re.compile(
    r"(?:\\?(?:angle|triangle)\b|[∠△])?\s*(?:m\s*[∠△]\s*)?"
    r"(?!(?:not|no|nor|or|and|if|any|all)\b)"
    r"((?:\\?[a-z]{1,3}|\\(?:alpha|beta|gamma|delta|theta|lambda|omega))(?:_\{?\w+\}?)?'?"
    r"|[a-z]\([a-z]\)"
    r"|area|perimeter|circumference|length|width|height|volume|radius|diameter|angle|total|sum|slope"
    r"|answer|result|value|count|number|distance|probability)"
)


def says_the_same(said: str, answer: str) -> bool:
    """Whether the two say the same number, expression, relation or list.

    Args:
        said: normalised, as by :func:`.accuracy.normalise`.
        answer: the same.
    """
    return _same(_plain(said), _plain(answer))


def _plain(text: str) -> str:
    """One character for each relation and for each brace of a set; LaTeX's groups keep theirs."""
    for sign, written in _RELATIONS.items():
        text = re.sub(rf"(?:{written})(?![a-z])", sign, text)
    return plain_signs(text)


def _same(said: str, answer: str) -> bool:
    said, answer = said.strip(), answer.strip()
    if _tight(said) == _tight(answer):
        return True
    name, wanted = _named(answer)
    value = read_value(wanted)
    if value is None:
        return _same_arrangement(said, answer)
    other, sides = _named(said)
    if name and other and name != other:
        return False
    return all(_same_value(read_value(side.strip()), value) for side in sides.split("="))


def _tight(text: str) -> str:
    """Without the spaces that divide no words and no numbers."""
    return re.sub(r"(?<!\w) +| +(?!\w)", "", text)


def _named(text: str) -> tuple[str, str]:
    """A name that a value is given, "" for none, and the rest."""
    name, sign, rest = text.partition("=")
    match = _NAME.fullmatch(name.strip()) if sign else None
    return ("", text) if match is None else (match.group(1), rest.strip())


def _same_arrangement(said: str, answer: str) -> bool:
    """The same values, with the same brackets and relations around and between them."""
    (ours, said), (theirs, answer) = _unwrapped(said), _unwrapped(answer)
    if ours != theirs:
        return False
    for dividers in _DIVIDERS:
        (pieces, between), (wanted, wished) = (
            _divided(one, dividers, bool(ours)) for one in (said, answer)
        )
        if not between and not wished:
            continue
        if dividers == ",;" and ours == "" and between == wished:
            # Of "1, 2" for "x = 1, y = 2" the order is what tells them apart.
            named = {bool(_named(piece)[0]) for piece in (*pieces, *wanted)}
            if len(named) == 1:
                return _same_in_any_order(pieces, wanted)
        if between == wished and all(map(_same, pieces, wanted)):
            return True
        if between != [_MIRRORED.get(sign, "") for sign in reversed(wished)]:
            return False
        if all(map(_same, pieces, reversed(wanted))):
            return True
        return between == ["="] and _same_equation(pieces, wanted)
    return bool(ours) and _same(said, answer)


def _unwrapped(text: str) -> tuple[str, str]:
    """The brackets around the whole, "" for none and for those of a set, and what is in them."""
    text = text.strip()
    if len(text) < 2 or text[0] not in _OPENING or text[-1] not in _CLOSING:
        return "", text
    depth = 0
    for place, sign in enumerate(text):
        depth += (sign in _OPENING) - (sign in _CLOSING)
        if depth == 0 and place < len(text) - 1:
            return "", text
    around = text[0] + text[-1]
    return "" if around in ("{}", "⦃⦄") else around, text[1:-1]


def _divided(text: str, dividers: str, bracketed: bool) -> tuple[list[str], list[str]]:
    """What lies between some signs outside of all brackets, and these signs."""
    pieces, between, depth = [""], [], 0
    for place, sign in enumerate(text):
        depth += (sign in _OPENING) - (sign in _CLOSING)
        thousands = not bracketed and _THOUSANDS.match(text, place - 1) if place else None
        if depth == 0 and sign in dividers and not thousands:
            between.append(sign)
            pieces.append("")
        else:
            pieces[-1] += sign
    return pieces, between


def _same_in_any_order(pieces: list[str], wanted: list[str]) -> bool:
    left = list(wanted)
    for piece in pieces:
        found = next((one for one in left if _same(piece, one)), None)
        if found is None:
            return False
        left.remove(found)
    return not left


def _same_equation(sides: list[str], wanted: list[str]) -> bool:
    """Whether two equations of expressions have the same solutions, as far as is seen."""
    values = [read_value(side.strip()) for side in (*sides, *wanted)]
    if any(value is None or value.unit for value in values):
        return False
    first, second, third, fourth = (value.latex for value in values if value is not None)
    return _verified(f"{first}={second}", f"{third}={fourth}")


def _same_value(said: Value | None, answer: Value) -> bool:
    if said is None:
        return False
    units = {said.unit, answer.unit} - {""}
    return len(units) < 2 and _verified(said.latex, answer.latex)


def _verified(said: str, answer: str) -> bool:
    """Whether ``math-verify`` finds two pieces of LaTeX the same."""
    from math_verify import parse, verify

    # Its time limits are alarms, which only the main thread may set: elsewhere there is none.
    limit = 5 if threading.current_thread() is threading.main_thread() else None
    keywords = {
        "extraction_config": [_whole_latex()],
        "fallback_mode": "no_fallback",
        "parsing_timeout": limit,
    }
    sides = [parse(f"${one}$", **keywords) for one in (answer, said)]
    return bool(all(sides) and verify(*sides, timeout_seconds=limit))


@cache
def _whole_latex() -> Any:  # noqa: ANN401 - a LatexExtractionConfig, of the extra
    """Read all of it as LaTeX, and drop nothing."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig

    plain = NormalizationConfig(
        basic_latex=True,
        units=False,
        malformed_operators=False,
        nits=False,
        boxed="none",
        equations=False,
    )
    return LatexExtractionConfig(boxed_match_priority=-1, normalization_config=plain)
