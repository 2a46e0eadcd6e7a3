"""The three rewards, as tables; all on token ids."""

import math
import sys
import threading

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lookagain_ext.synthetic.tokenizer import build_tokenizer
from lookagain_ext.training import accuracy
from lookagain_ext.training.accuracy import is_right
from lookagain_ext.training.rewards import brpo_rewards, hardened_balance, paper_balance

HEAD = "<SUMMARY>s</SUMMARY> <CAPTION>c</CAPTION> <REASONING>r</REASONING>"
TAIL = "<CONCLUSION> 3 </CONCLUSION>"


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def answer(*reflections: int, head: str = HEAD, tail: str = TAIL) -> str:
    """An answer whose reflections have that many tokens."""
    blocks = "".join(f"<REFLECTION>{' red' * count}</REFLECTION>" for count in reflections)
    return f"{head}{blocks}{tail}"


def rewards(tokenizer, texts, answers=None, **options):
    ids = [tokenizer.encode(text) + [tokenizer.eos_token_id] for text in texts]
    without_tags = [text.replace("<", "").replace(">", "") for text in texts]
    messages = [[{"role": "assistant", "content": text}] for text in without_tags]
    columns = {"answer": answers or ["3"] * len(texts), "prompts": [None] * len(texts)}
    found = {}
    for reward in brpo_rewards(tokenizer, **options):
        as_text = reward(completions=without_tags, completion_ids=ids, **columns)
        assert reward(completions=messages, completion_ids=ids, **columns) == as_text
        assert all(type(value) is float for value in as_text)
        found[reward.__name__] = as_text
    assert list(found) == ["format_reward", "accuracy_reward", "reflection_balance_reward"]
    return tuple(found.values())


@pytest.mark.parametrize(
    ("text", "form", "right", "balance"),
    [
        (answer(100), 1, 1, 1.0),
        (answer(50), 1, 1, 0.5),
        (answer(), 1, 1, 0.0),
        (answer(0), 1, 1, 0.0),
        (answer(40, 80), 1, 1, 0.6),
        (answer(100, tail="<CONCLUSION>4</CONCLUSION>"), 1, 0, 1.0),
        (answer(100, tail=""), 0, 0, 1.0),
        (answer(100, tail="3"), 0, 0, 1.0),
        (answer(100, head=""), 0, 1, 1.0),
        ("", 0, 0, 0.0),
        (answer(tail="<REFLECTION>" + " red" * 100), 0, 0, 0.0),
        (answer(100, tail=TAIL + "<CONCLUSION>4</CONCLUSION>"), 0, 1, 1.0),
        (answer(100, tail="<CONCLUSION>4</CONCLUSION>" + TAIL), 0, 0, 1.0),
    ],
)
def test_rewards_of_an_answer(tokenizer, text, form, right, balance) -> None:
    found = rewards(tokenizer, [text, answer(100)])
    assert [one[0] for one in found] == pytest.approx([form, right, balance])
    assert [one[1] for one in found] == [1, 1, 1]


@pytest.mark.parametrize(
    ("lengths", "paper", "hardened"),
    [
        ([], 0, 0),
        ([100], 1, 1),
        ([75], 0.75, 0.75),
        ([200], 0, 0),
        ([200, 0], 1, 0),  # an empty block buys the full reward
        ([1000] + [0] * 9, 1, 0),
        ([400], -2, 0),  # a long reflection costs more than a right answer earns
        ([100] * 20, 1, 0),
        ([100] * 8, 1, 1),
        ([100] * 9, 1, 0),
        ([0], 0, 0),
        ([19], 0.19, 0),
        ([20], 0.2, 0.2),
        ([100, 0], 0.5, 1),  # a short one is not counted, and so does no harm
        ([150, 50], 1, 0.5),
        ([660] + [20] * 7, 1, 0.175),  # short ones do not make up for a long one
        ([180, 20], 1, 0.2),
        ([500] + [20] * 5, 1, 1 / 6),
        ([800], -6, 0),
    ],
)
def test_the_hole_in_the_paper_is_closed(tokenizer, lengths, paper, hardened) -> None:
    assert paper_balance(lengths) == pytest.approx(paper)
    assert hardened_balance(lengths) == pytest.approx(hardened)
    for preset, expected in (("paper", paper), ("hardened", hardened)):
        *_, balance = rewards(tokenizer, [answer(*lengths)], preset=preset)
        assert balance == pytest.approx([expected])


@given(st.lists(st.integers(0, 2000)), st.integers(1, 500))
def test_hardened_is_bounded_and_empty_blocks_buy_nothing(lengths, target) -> None:
    found = hardened_balance(lengths, target)
    assert 0 <= found <= 1
    assert hardened_balance([*lengths, 0], target) <= found
    alone = [hardened_balance([one], target) for one in lengths]
    assert found <= max(alone, default=0) + 1e-12
    assert paper_balance(lengths, target) <= 1


def test_target_and_bounds_are_used(tokenizer) -> None:
    assert rewards(tokenizer, [answer(12)], target_length=12)[2] == [1.0]
    assert rewards(tokenizer, [answer(12)], target_length=24)[2] == [0.5]
    few = {"preset": "hardened", "max_reflections": 1}
    assert rewards(tokenizer, [answer(100, 100)], **few)[2] == [0.0]
    strict = {"preset": "hardened", "min_length": 60}
    assert rewards(tokenizer, [answer(59)], **strict)[2] == [0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "strict"}, "preset must be one of paper, hardened, got 'strict'"),
        ({"target_length": 0}, "target_length must be a finite number above 0, got 0"),
        ({"target_length": math.nan}, "target_length must be a finite number above 0"),
        ({"preset": "hardened", "min_length": 0}, "min_length must be at least 1, got 0"),
        ({"preset": "hardened", "max_reflections": 0}, "max_reflections must be at least 1"),
        ({"matching": "regex"}, "matching must be one of auto, exact, math, got 'regex'"),
    ],
)
def test_bad_arguments_are_refused_at_once(tokenizer, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        brpo_rewards(tokenizer, **options)


def test_columns_are_checked(tokenizer) -> None:
    form, right, _ = brpo_rewards(tokenizer)
    with pytest.raises(ValueError, match="column 'answer', one for each of 1 completions"):
        right(completions=[""], completion_ids=[[]])
    with pytest.raises(ValueError, match="one list for each of 2 completions, got 1"):
        form(completions=["", ""], completion_ids=[[]])


@pytest.mark.parametrize(
    ("said", "wanted", "right"),
    [
        ("3", "3", True),
        ("3", 3, True),
        (" Red. ", "red", True),
        ("red  circle", "Red circle", True),
        ("The answer is red.", "red", True),
        ("$\\boxed{B2}$", "b2", True),
        ("blue", "red", False),
        ("not red", "red", False),
        ("red or blue", "red", False),
        ("B2", "B3", False),
        ("2", "B2", False),
        ("", "", False),
        (None, "None", False),
        ("B", "B", True),
        ("(B)", "B", True),
        ("B. 12 cm", "B", True),
        ("(b) 12 cm", "(B)", True),
        ("Option B", "B", True),
        ("The correct answer is (B).", "B", True),
        ("C", "B", False),
        ("A circle", "A", False),
        ("B or C", "B", False),
        ("B. C. D.", "B", False),
        ("A: 1, B: 2", "A", False),
    ],
)
@pytest.mark.parametrize("matching", ["exact", "auto"])
def test_words_and_choices(said, wanted, right, matching) -> None:
    assert is_right(said, wanted, matching) is right


NUMBERS = [
    ("0.75", "3/4", True),
    ("\\frac{3}{4}", "0.75", True),
    ("$\\frac{3}{4}$", "3/4", True),
    ("12 cm", "12", True),
    ("1,000", "1000", True),
    ("50%", "0.5", True),
    ("30°", "30", True),
    ("x = 4", "4", True),
    ("The answer is 4.", "4", True),
    ("\\sqrt{12}", "2\\sqrt{3}", True),
    ("2√3", "2\\sqrt{3}", True),
    ("2 sqrt(3)", "2\\sqrt{3}", True),
    ("2\\pi", "2π", True),
    ("1+x", "x+1", True),
    ("1 1/2", "3/2", True),
    ("x²+1", "x^2+1", True),
    ("x2", "x^2", False),
    ("3 or 4", "4", False),
    ("3, 4, 5", "4", False),
    ("2 3", "5", False),
    ("5 \\text{ or } 4", "4", False),
    ("3.14159", "3.14", False),
    ("-3", "3", False),
    ("three", "4", False),
    ("4" * 300, "4", False),
    ("2 blue", "2 red", False),
]


NOT_17 = (
    "≠ 17 / \\neq 17 / \\not 17 / < 17 / \\geq 17 / not x = 17 / x ≠ 17 / ±17 / ~17 / ≈17 / "
    "no 17 / about 17 / 17... / 17 or / 17 \\approx 18 / 17 = 5 / 5=17 / x = 17 = y / =17 / 17= / "
    "5 – 17 / 17–5 / 17—5 / 17…5 / 17 to 5 / 17 \\ldots 5 / 5..17 / 17 • 5 / 17?5 / 17#5 / 17|5 / "
    "17_5 / 17→5→23 / 17;5 / 17, 5 / 17\\quad 5 / 17\\;5 / 17\\%5 / 17)(5 / (17, 5) / "
    "\\{17, 5\\} / $17$ or $5$ / \\boxed{17} or \\boxed{5} / 17 thousand / 17! / 17m"
).split(" / ")
NOT_THAT_NUMBER = [
    *(("17", said) for said in NOT_17),
    ("2", "1 \\cup 2"),
    ("22", "(17)(5)"),
    ("5", "5 – 17"),
    ("12 cm", "12 km"),
    ("12 cm", "12 cm^2"),
    ("12 s", "12 m"),
    ("$12", "€12"),
    ("30°", "30 rad"),
    ("50%", "50"),
    ("50", "50%"),
    ("2024-05-01", "2018"),
    ("2018", "2024-05-01"),
    ("10:30", "1/3"),
    ("1:3", "1/3"),
    ("85.5", "17½"),  # NFKC makes 171/2 of it
    ("175", "17⁵"),
    ("175", "17₅"),
    ("x = 4", "y = 4"),
    ("x = 1, y = 2", "2, 1"),
    ("(1, 2)", "(2, 1)"),
    ("(1, 2)", "(1, 2]"),
    ("(1,200)", "1,200"),
    ("x ≥ 3", "x > 3"),
    ("x > 3", "x < 3"),
    ("3x+2y=6", "3x+2y=7"),
    ("1.5", "1.5.2"),
]


@pytest.mark.parametrize(("wanted", "said"), NOT_THAT_NUMBER)
def test_what_only_has_the_number_in_it_is_wrong(wanted, said) -> None:
    pytest.importorskip("math_verify", reason="math-verify comes with the extra train")
    assert not is_right(said, wanted)


WRITTEN_OTHERWISE = [
    ("12", ["12 cm", "12~\\mathrm{cm}", "12\\,\\text{ cm}^2", "x = 12", "AB = 12", "area = 12 m²"]),
    ("12", ["3 \\cdot 4 = 12", "\\angle ABC = 12^\\circ", "m∠A = 12°", "\\theta_1 = 12", "(12)"]),
    ("12 cm^2", ["12 cm²", "12 square centimeters", "12"]),
    ("12 m/s", ["12 meters per second"]),
    ("50%", ["50\\%", "50 percent", "1/2", "0.5"]),
    ("$12", ["\\$12", "12 dollars"]),
    ("5/2", ["2½", "2 1/2", "2\\frac{1}{2}", "\\frac52", "2.5", "x = 5/2 = 2.5"]),
    ("0.001", ["10⁻³", "10^{-3}", "\\frac{1}{1000}"]),
    ("32", ["2⁵", "|-32|", "2^{5}"]),
    ("\\frac{\\pi}{2}", ["π/2", "0.5 pi"]),
    ("1/2", ["\\sin^2(\\pi/4)", "\\cos \\frac{\\pi}{3}"]),
    ("x^2-x-2", ["(x+1)(x-2)", "x² - x - 2"]),
    ("y=2x+1", ["y = 1+2x", "2x+1"]),
    ("3x+2y=6", ["2y+3x=6", "6=3x+2y", "y=3-1.5x"]),
    ("x≥3", ["x \\geq 3", "3 \\le x", "x \\geqslant \\frac{6}{2}"]),
    ("1<x<3", ["3>x>1"]),
    ("(1/2, 3]", ["(0.5,3]", "\\left(\\frac12, 3\\right]"]),
    ("\\{1,2\\}", ["{2, 1}", "1, 2"]),
    ("x=1, y=2", ["y = 2, x = 1", "1, 2"]),
    ("±3", ["\\pm 3"]),
    ("(-∞, 3)\\cup(4,5)", ["(-\\infty,3)∪(4,5)"]),
    ("2024-05-01", ["2024-05-01."]),
    ("2:3", ["2 : 3"]),
]


@pytest.mark.parametrize(
    ("wanted", "said"), [(one, said) for one, many in WRITTEN_OTHERWISE for said in many]
)
def test_the_same_written_otherwise_is_right(wanted, said) -> None:
    pytest.importorskip("math_verify", reason="math-verify comes with the extra train")
    assert is_right(said, wanted)


@given(
    st.integers(-99, 99),
    st.text(
        st.sampled_from("?#&•–—…→~≈≠<>≤@\"'`:;,|_$ \\[]{}ab\t、，或∪or"), min_size=1, max_size=4
    ),
    st.integers(0, 99),
    st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_nothing_between_two_numbers_makes_it_one_of_them(one, between, other, first) -> None:
    """Nor do signs that mean nothing before or behind a number of another value."""
    pytest.importorskip("math_verify", reason="math-verify comes with the extra train")
    assume(one != other)
    assume(not (between.strip(", ") == "" and "," in between))  # thousands
    assert not is_right(f"{one}{between}{other}", str(one if first else other))


@pytest.mark.parametrize(("said", "answer"), [("none", None), ("None", None), ("nan", math.nan)])
def test_no_answer_is_never_right(said, answer, tokenizer) -> None:
    assert not is_right(said, answer)
    _, right, _ = brpo_rewards(tokenizer)
    with pytest.raises(ValueError, match=r"answer 1 of 2 is missing \((None|nan)\)"):
        right(completions=["", ""], completion_ids=[[], []], answer=["3", answer])


@pytest.mark.parametrize(("said", "wanted", "right"), NUMBERS)
def test_numbers_and_expressions(said, wanted, right) -> None:
    pytest.importorskip("math_verify", reason="math-verify comes with the extra train")
    assert is_right(said, wanted, "math") is right


def test_math_outside_the_main_thread() -> None:
    pytest.importorskip("math_verify", reason="math-verify comes with the extra train")
    found = []
    thread = threading.Thread(target=lambda: found.append(is_right("0.75", "3/4", "math")))
    thread.start()
    thread.join()
    assert found == [True]


@pytest.mark.parametrize(
    "said",
    ["9^{9^{9^9}}", "9^9^9", "99999999!", "2^{999999999}", "((9^{99})^{99})^{99}", "9^{-99999}"],
)
def test_endless_expressions_are_not_evaluated(said, monkeypatch) -> None:
    math_verify = pytest.importorskip("math_verify", reason="math-verify is in the extra train")
    monkeypatch.delattr(math_verify, "parse")
    assert not is_right(said, "5", "math")


def test_without_math_verify(monkeypatch, tokenizer) -> None:
    monkeypatch.setattr(accuracy, "has_math_verify", lambda: False)
    monkeypatch.setitem(sys.modules, "math_verify", None)
    assert is_right("3/4", "3/4")
    assert is_right("red", "red")
    with pytest.warns(UserWarning, match="math-verify is not installed"):
        assert not is_right("0.75", "3/4")
    with pytest.raises(ImportError, match=r'pip install "lookagain-ext\[train\]"'):
        brpo_rewards(tokenizer, matching="math")
