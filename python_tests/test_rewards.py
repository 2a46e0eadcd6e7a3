"""The three rewards, as tables; all on token ids."""

import math
import sys
import threading

import pytest
from hypothesis import given
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
        ([150, 50], 1, 1),
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


@pytest.mark.parametrize("said", ["9^{9^{9^9}}", "9^9^9", "99999999!", "2^{999999999}"])
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
