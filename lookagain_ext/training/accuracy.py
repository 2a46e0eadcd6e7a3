"""Whether a conclusion says the right answer: words, choices, numbers and expressions.

The paper (Chu et al., arXiv 2505.23558) matches the conclusion with the answer by a regular
expression that it does not print. Ours: both are normalised and compared; a choice ("B") may bring
its text along ("(B) 12 cm"); what looks like a number or an expression is compared by
``math-verify`` (extra ``train``), so that 3/4 is 0.75.
"""

from __future__ import annotations

import importlib.util
import re
import threading
import unicodedata
import warnings

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
_TWO_NUMBERS = re.compile(r"\d\s+\d+(?![\d\s]*/)")
_ENDLESS = re.compile(r"!|\*\*|\\(?:sum|prod|int)|\^[\{\(\d]*\^|\^[\{\(]?\d{4,}")
_SIGNS = {
    "−": "-",
    "×": "\\times ",
    "÷": "/",
    "°": "",
    "π": "\\pi ",
    "^\\circ": "",
    "^{\\circ}": "",
}


def normalise(text: object) -> str:
    """``text`` in lower case without what says nothing.

    That is: outer and repeated spaces, a full stop at the end, dollar signs, LaTeX's boxed and
    text around the whole, and "the answer is".
    """
    text = str(text).replace("²", "^2").replace("³", "^3")
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    before = None
    while plain != before:
        before = plain
        plain = _LEAD.sub("", plain).strip().removesuffix(".").strip()
        if (match := _WRAPPED.match(plain)) and "$" not in (match.group(1) or ""):
            plain = next(part for part in match.groups() if part is not None).strip()
    return plain


def is_right(said: object, answer: object, matching: str = "auto") -> bool:
    """Whether ``said``, the text of a conclusion, is ``answer``.

    Args:
        said: None, or a text without any content, is wrong.
        answer: the right answer: a text or a number.
        matching: "exact" compares normalised texts and choices; "math" also numbers and expressions
            by ``math-verify``; "auto" does so where it is installed, and warns once where it
            would have been needed.

    Raises:
        ImportError: "math" without ``math-verify``.
        ValueError: another ``matching``.
    """
    check_matching(matching)
    if said is None:
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
    return _equal(found, wanted)


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


def _equal(said: str, answer: str) -> bool:
    """Whether ``math-verify`` finds the two the same."""
    if len(said) > LONGEST or _TWO_NUMBERS.search(said):  # "2 3" would be read as 2 + 3
        return False
    if _ENDLESS.search(said) and not _ENDLESS.search(answer):  # 9^{9^9} would cost seconds
        return False
    from math_verify import parse, verify

    # Its time limits are alarms, which only the main thread may set: elsewhere there is none.
    limit = 5 if threading.current_thread() is threading.main_thread() else None
    sides = [parse(f"${_latex(one)}$", parsing_timeout=limit) for one in (answer, said)]
    return bool(all(sides) and verify(*sides, timeout_seconds=limit))


def _latex(text: str) -> str:
    for sign, latex in _SIGNS.items():
        text = text.replace(sign, latex)
    text = re.sub(r"(\d+)\s+(\d+)/(\d+)", r"(\1+\2/\3)", text)
    text = re.sub(r"√\s*\(([^()]*)\)|√\s*(\w+)", r"\\sqrt{\1\2}", text)
    text = re.sub(r"(?<![\\a-z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    return re.sub(r"(?<![\\a-z])(pi|sin|cos|tan|log|ln)(?![a-z])", r"\\\1 ", text)
