r"""One number or expression, read whole: what stands in a text that says nothing beside it.

``math-verify`` looks for *a* number in a text and takes the first or the last that it finds: it
reads "≠ 17", "17?5" and "5 – 17" as 17. So a conclusion is read here first, and only an expression
that was understood to its last sign is handed on, written so that it can be read in one way:

.. code-block:: text

    expression = [sign] term {(+ | -) term}
    term       = power {[* | / | \cdot | \times | \div] [sign] power}
    power      = atom [^ exponent] [!]
    atom       = number | "2 1/2" | letter | \pi | ( expression ) | |expression| | \frac{..}{..}
               | \sqrt[..]{..} | sqrt(..) | \sin power | ...

Two numbers side by side, a word, and every other sign are refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_FUNCTIONS = ("sin", "cos", "tan", "log", "ln", "exp")
_GREEK = (
    "alpha beta gamma delta epsilon theta lambda mu nu rho sigma tau phi chi psi omega pi infty"
).split()
_SIGNS = {
    "−": "-",
    "⁄": "/",
    "÷": "/",
    "×": "*",
    "·": "*",
    "⋅": "*",
    "π": "\\pi ",
    "∞": "\\infty ",
    "√": "\\sqrt ",
    "{,}": ",",
    "^{\\circ}": "°",
    "^\\circ": "°",
    "\\degree": "°",
    "\\left": " ",
    "\\right": " ",
    "\\cdot": "*",
    "\\times": "*",
    "\\div": "/",
}
_TEXT = re.compile(r"\\(?:text|textrm|textbf|mathrm|mathit|mbox|operatorname)\s*\{([^{}]*)\}")
_SPACE = re.compile(r"\\(?:[,;:! ]|q?quad(?![a-z]))|(?<=[\d\s])~(?=[\s\\a-z])")
_TOKEN = re.compile(
    r"\s*(?P<number>\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d,])|\d+(?:\.\d+)?|\.\d+)"
    r"|\s*\\(?P<command>[a-z]+)|\s*(?P<word>[a-z]+)|\s*(?P<sign>[-+*/^_(){}\[\]|!])"
)
_DATE = re.compile(
    r"\d{4}([-/.])\d{1,2}\1\d{1,2}|\d{1,2}([-/.])\d{1,2}\2(?:\d{4}|\d{2})|\d{4}-\d{2}"
)
_PERCENT = re.compile(r"(.*[^\s\\])\s*(?:\\?%|(?<![a-z])per ?cent)")
_CURRENCY = re.compile(r"\\?([$€£])\s*(.*)")
_UNITS = {
    word: words.split()[0]
    for words in (
        "mm millimeter millimeters millimetre millimetres",
        "cm centimeter centimeters centimetre centimetres",
        "dm decimeter decimeters decimetre decimetres",
        "m meter meters metre metres",
        "km kilometer kilometers kilometre kilometres",
        "in inch inches",
        "ft foot feet",
        "yd yard yards",
        "mi mile miles",
        "mg milligram milligrams",
        "g gram grams",
        "kg kilogram kilograms",
        "lb lbs",
        "oz ounce ounces",
        "ml milliliter milliliters millilitre millilitres",
        "l liter liters litre litres",
        "s sec second seconds",
        "min minute minutes",
        "h hr hour hours",
        "day days",
        "week weeks",
        "month months",
        "year years",
        "° deg degree degrees",
        "°c",
        "°f",
        "rad radian radians",
        "unit units",
        "$ dollar dollars",
        "€ euro euros",
        "£",
        "cent cents",
    )
    for word in words.split()
}
_ONE_UNIT = "(?:" + "|".join(sorted(map(re.escape, _UNITS), key=len, reverse=True)) + ")"
_POWERED = rf"(?:(?:square|sq\.?|cubic) )?{_ONE_UNIT}(?: ?\^ ?\{{?[23]\}}?|[23])?"
# One letter may be a variable ("12m"): it is a unit where a space divides it from the number.
_UNIT = re.compile(
    rf"(.*[^\sa-z*/^+-])(?: +|(?=[a-z°$€£]{{2}}|[°$€£]))({_POWERED}(?: ?(?:/|per) ?{_POWERED})?)"
)


@dataclass(frozen=True)
class Value:
    """A number or an expression, and its unit.

    Attributes:
        latex: the expression, written so that it can be read in one way.
        unit: "%", a unit under its usual name, or "" where none is said.
    """

    latex: str
    unit: str = ""


class _NotUnderstood(Exception):
    """The text is not one expression."""


def plain_signs(text: str) -> str:
    """A normalised text with LaTeX's spaces, texts and signs written as plain ones."""
    text = _SPACE.sub(" ", _TEXT.sub(r" \1 ", text))
    for sign, plain in _SIGNS.items():
        text = re.sub(re.escape(sign) + r"(?![a-z])", lambda _, new=plain: new, text)
    return " ".join(text.split())


def is_date(text: str) -> bool:
    """Whether it is a date in numbers, which would be read as a difference or a quotient."""
    return _DATE.fullmatch(text) is not None


def read_value(text: str) -> Value | None:
    """The one number or expression that ``text`` consists of, or None.

    Args:
        text: as :func:`plain_signs` returns it.
    """
    if is_date(text) or ("," in text and re.search(r"[(\[]", text)):  # (1,200) is a point
        return None
    unit = ""
    if match := _PERCENT.fullmatch(text):
        text, unit = match.group(1), "%"
    elif match := _CURRENCY.fullmatch(text):
        unit, text = match.groups()
    elif match := _UNIT.fullmatch(text):
        text, unit = match.group(1), _usual(match.group(2))
    try:
        latex = _Reader(text).whole()
    except _NotUnderstood:
        return None
    return Value(f"\\frac{{{latex}}}{{100}}" if unit == "%" else latex, unit)


def _usual(unit: str) -> str:
    """A unit under its usual name, its parts divided by "/", powers as digits."""
    parts = []
    for part in re.split(r" ?(?:/|(?<![a-z])per(?![a-z])) ?", unit):
        power = "2" if part.startswith("sq") else "3" if part.startswith("cubic") else ""
        part = re.sub(r"^(?:square|sq\.?|cubic) ", "", part)
        power += "".join(re.findall(r"[23]", part))
        parts.append(_UNITS[re.sub(r"[\^{} 23]", "", part)] + power)
    return "/".join(parts)


class _Reader:
    """Reads an expression from its first to its last sign."""

    def __init__(self, text: str) -> None:
        self._tokens: list[tuple[str, str]] = []
        place = 0
        while place < len(text):
            match = _TOKEN.match(text, place)
            if match is None or match.lastgroup is None:
                raise _NotUnderstood
            self._tokens.append((match.lastgroup, match[match.lastgroup]))
            place = match.end()
        self._next = 0

    def whole(self) -> str:
        """All of it, as LaTeX."""
        made = self._expression()
        if self._next < len(self._tokens):
            raise _NotUnderstood
        return made

    def _peek(self, ahead: int = 0) -> tuple[str, str]:
        place = self._next + ahead
        return self._tokens[place] if place < len(self._tokens) else ("end", "")

    def _take(self, *wanted: str) -> str | None:
        """The next sign if it is one of these."""
        kind, text = self._peek()
        if kind != "sign" or text not in wanted:
            return None
        self._next += 1
        return text

    def _must(self, wanted: str) -> None:
        if self._take(wanted) is None:
            raise _NotUnderstood

    def _expression(self) -> str:
        made = (self._take("-", "+") or "") + self._term()
        while sign := self._take("+", "-"):
            made += sign + self._term()
        return made

    def _term(self) -> str:
        made = self._power()
        while True:
            if sign := self._take("*", "/"):
                minus = self._take("-")
                other = self._power()
                other = f"(-{other})" if minus else other
                made = f"{made} \\cdot {other}" if sign == "*" else f"\\frac{{{made}}}{{{other}}}"
                continue
            kind, text = self._peek()
            # "2 3", "x2": side by side, a number can only be the first of a product
            begins = kind in ("command", "word") or (kind == "sign" and text == "(")
            if not begins:
                return made
            made = f"{made} \\cdot {self._power()}"

    def _power(self) -> str:
        made = self._atom()
        if self._take("^"):
            made = f"{made}^{{{self._short()}}}"
            if self._peek() == ("sign", "^"):
                raise _NotUnderstood
        return f"({made})!" if self._take("!") else made

    def _short(self) -> str:
        """An exponent, an index or an argument without brackets of its own."""
        if self._take("{"):
            made = self._expression()
            self._must("}")
            return made
        sign = self._take("-") or ""
        return sign + self._atom()

    def _braced(self) -> str:
        """LaTeX's argument: in braces, or one digit or letter."""
        if self._take("{"):
            made = self._expression()
            self._must("}")
            return made
        kind, text = self._peek()
        if kind != "number" or not text.isdigit():
            return self._atom()
        # \frac34: of a number's digits each is an argument
        self._tokens[self._next : self._next + 1] = [("number", digit) for digit in text]
        self._next += 1
        return text[0]

    def _atom(self) -> str:
        kind, text = self._peek()
        self._next += 1
        if kind == "number":
            return self._number(text.replace(",", ""))
        if kind == "word":
            return self._word(text)
        if kind == "command":
            return self._command(text)
        for opening, closing in ("()", "||"):
            if (kind, text) == ("sign", opening):
                made = self._expression()
                self._must(closing)
                return f"{opening}{made}{closing}"
        raise _NotUnderstood

    def _number(self, text: str) -> str:
        """A number; also a mixed one."""
        after = [self._peek(ahead) for ahead in range(3)]
        if after[0] == ("command", "frac") and text.isdigit():
            self._next += 1
            return f"({text}+{self._command('frac')})"
        if after[0][0] != "number":
            return text
        if [kind for kind, _ in after] != ["number", "sign", "number"] or after[1][1] != "/":
            raise _NotUnderstood
        numbers = [text, after[0][1], after[2][1]]
        if not all(number.isdigit() for number in numbers):
            raise _NotUnderstood
        self._next += 3
        return "({}+\\frac{{{}}}{{{}}})".format(*numbers)

    def _word(self, text: str) -> str:
        if text in (*_FUNCTIONS, "sqrt", "pi"):
            return self._command(text)
        if len(text) > 1:
            raise _NotUnderstood
        return text + self._index()

    def _index(self) -> str:
        """A letter's index: a number or a letter."""
        if not self._take("_"):
            return ""
        braced = self._take("{")
        kind, text = self._peek()
        self._next += 1
        if kind not in ("number", "word"):
            raise _NotUnderstood
        if braced:
            self._must("}")
        return f"_{{{text}}}"

    def _command(self, name: str) -> str:
        if name in ("frac", "dfrac", "tfrac", "cfrac"):
            return f"\\frac{{{self._braced()}}}{{{self._braced()}}}"
        if name == "sqrt":
            root = ""
            if self._take("["):
                root = f"[{self._expression()}]"
                self._must("]")
            return f"\\sqrt{root}{{{self._argument()}}}"
        if name in _FUNCTIONS:
            base = f"_{{{self._short()}}}" if name == "log" and self._take("_") else ""
            power = f"^{{{self._short()}}}" if self._take("^") else ""
            return f"\\{name}{base}{power}({self._argument()})"
        if name in _GREEK:
            return f"\\{name}" + self._index()
        raise _NotUnderstood

    def _argument(self) -> str:
        if self._peek() == ("sign", "{"):
            return self._short()
        return self._power()
