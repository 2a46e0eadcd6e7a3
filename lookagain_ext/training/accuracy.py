"""Whether a conclusion says the right answer: words, choices, numbers and expressions.

The paper (Chu et al., arXiv 2505.23558) matches the conclusion with the answer by a regular
expression that it does not print. Ours: both are normalised and compared; a choice ("B") may bring
its text along ("(B) 12 cm"); what looks like a number or an expression is compared by
``math-verify`` (extra ``train``), so that 3/4 is 0.75.

A reward that is paid for a wrong answer is learnt, so that in doubt nothing is paid. A number is
right where the conclusion is that number and nothing else: with one name ("x = 4"), with a unit
that the answer lacks or shares, or as the result of a calculation of which every side is right
("1 + 3 = 4"). "≠ 4", "> 4", "4 or 5", "4–5" and "4 → 5" are not 4. A share in percent is
that number of hundredths; dates, times and ratios are compared as texts.
"""

from __future__ import annotations

import importlib.util
import math
import re
import unicodedata
import warnings

from .comparing import says_the_same

MATCHING: tuple[str, ...] = ("auto", "exact", "math")
LONGEST = 200  # characters of a conclusion that math-verify is given
_WRAPPED = re.compile(r"^(?:\$\$?(.*?)\$\$?|\\\((.*)\\\)|\\\[(.*)\\\]|\\(?:boxed|text)\{(.*)\})$")
_LEAD = re.compile(
    r"^(?:so|thus|therefore)?,?\s*(?:the )?(?:final |correct )?answer\s*(?:is|:)\s*:?"
)
_CHOICE = re.compile(r"^(?:(?:option|choice)\s+)?\(?([a-h])(?:$|\)$|[).:]\s*(.*)$)")
_LABEL = re.compile(r"\b[a-h][).:]|\b(?:or|and|option|choice)\b")
_COMMAND = re.compile(r"\\[a-z]+")
_WORD = re.compile(r"[a-z]{2,}")
_FUNCTIONS = {"sqrt", "pi", "sin", "cos", "tan", "log", "ln", "exp", "frac", "cm", "mm", "km"}
_NAME_AND_NUMBER = re.compile(r"^[a-z]\d+$")
_GOES_ON = re.compile(r"\d\s*\.\.+$")  # "17..." is not the end of a sentence
_ENDLESS = re.compile(r"!|\*\*|\\(?:sum|prod|int)|\^[\{\(\d]*\^")
_EXPONENT = re.compile(r"\^\s*[{(]?\s*-?\s*(\d+)")
LARGEST = 9999  # product of all exponents
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")


def normalise(text: object) -> str:
    """``text`` in lower case without what says nothing.

    That is: outer and repeated spaces, a full stop at the end, dollar signs, LaTeX's boxed and
    text around the whole, and "the answer is".
    """
    # NFKC would make 2½ and 2⁵ 21/2 and 25
    text = re.sub("([¼-¾⅐-⅞])", r" \1", str(text))
    text = re.sub("([⁰¹²³⁴-⁹⁻]+)", lambda found: _raised(found[0]), text)
    text = re.sub("([₀-₉]+)", lambda found: f"_{{{found[0].translate(_SUBSCRIPTS)}}}", text)
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    before = None
    while plain != before:
        before = plain
        plain = _LEAD.sub("", plain).strip()
        if not _GOES_ON.search(plain):
            plain = plain.removesuffix(".").strip()
        if (match := _WRAPPED.match(plain)) and "$" not in (match.group(1) or ""):
            plain = next(part for part in match.groups() if part is not None).strip()
    return plain


def _raised(signs: str) -> str:
    digits = signs.translate(_SUPERSCRIPTS)
    return f"^{digits}" if len(digits) == 1 else f"^{{{digits}}}"


def is_right(said: object, answer: object, matching: str = "auto") -> bool:
    """Whether ``said``, the text of a conclusion, is ``answer``.

    Args:
        said: None, or a text without any content, is wrong.
        answer: the right answer: a text or a number. None and NaN are none, so that nothing is
            right.
        matching: "exact" compares normalised texts and choices; "math" also numbers and expressions
            by ``math-verify``; "auto" does so where it is installed, and warns once where it
            would have been needed.

    Raises:
        ImportError: "math" without ``math-verify``.
        ValueError: another ``matching``.
    """
    check_matching(matching)
    if said is None or is_missing(answer):
        return False
    found, wanted = normalise(said), normalise(answer)
    if not found or not wanted:
        return False
    if found == wanted:
        return True
    if choice := _CHOICE.match(wanted):
        return choice.group(2) is None and _chosen(found) == choice.group(1)
    if matching == "exact" or not looks_mathematical(wanted):
        return False
    if matching == "auto" and not has_math_verify():
        warnings.warn(
            "math-verify is not installed: numbers and expressions count as right only when they "
            'are written as the answer is; pip install "lookagain-ext[train]" brings it',
            stacklevel=2,
        )
        return False
    if _is_endless(found) and not _is_endless(wanted):
        return False
    return max(len(found), len(wanted)) <= LONGEST and says_the_same(found, wanted)


def is_missing(answer: object) -> bool:
    """Whether a row of the data has no answer: None, or the NaN that tables put in its place."""
    return answer is None or (isinstance(answer, float) and math.isnan(answer))


def _is_endless(text: str) -> bool:
    """Whether its value may have so many digits that 9^{9^9} would cost seconds."""
    exponents = [max(1, int(digits)) for digits in _EXPONENT.findall(text)]
    return _ENDLESS.search(text) is not None or math.prod(exponents) > LARGEST


def check_matching(matching: str) -> None:
    """Refuse an unknown ``matching``, or "math" where ``math-verify`` is missing."""
    if matching not in MATCHING:
        raise ValueError(f"matching must be one of {', '.join(MATCHING)}, got {matching!r}")
    if matching == "math" and not has_math_verify():
        raise ImportError(
            'matching="math" needs math-verify: pip install "lookagain-ext[train]", '
            'or take matching="exact"'
        )


def has_math_verify() -> bool:
    """Whether ``math-verify`` is installed."""
    return importlib.util.find_spec("math_verify") is not None


def looks_mathematical(answer: str) -> bool:
    """Whether a normalised answer is a number or an expression rather than words or a name."""
    if _NAME_AND_NUMBER.match(answer):
        return False
    words = set(_WORD.findall(_COMMAND.sub(" ", answer)))
    signs = any(sign.isdigit() or sign in "\\+-*/^=√π" for sign in answer)
    return signs and words <= _FUNCTIONS


def _chosen(said: str) -> str | None:
    """The letter of the one choice that ``said`` makes, or None."""
    match = _CHOICE.match(said)
    if match is None or _LABEL.search(match.group(2) or ""):
        return None
    return match.group(1)
