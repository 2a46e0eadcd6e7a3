"""Cold start: exactly one reflection, between reasoning and conclusion."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lookagain_ext.synthetic.grade import held_out, is_right
from lookagain_ext.synthetic.processor import to_rgb
from lookagain_ext.synthetic.tokenizer import build_tokenizer
from lookagain_ext.template import parse, parse_ids, wrap
from lookagain_ext.training.coldstart import (
    ReflectionWriter,
    insert_reflection,
    reflects_once,
    remove_reflections,
    synthetic_answer,
)
from lookagain_ext.training.prompts import fill
from lookagain_ext.training.records import Record

BARE = (
    "<SUMMARY>s</SUMMARY>\n\n<CAPTION>c</CAPTION>\n\n<REASONING>$r</REASONING>\n\n"
    "<CONCLUSION> 3 </CONCLUSION>"
)
WORDS = "I look at the picture and count again."


def test_inserted_between_reasoning_and_conclusion() -> None:
    text = insert_reflection(BARE, f" {WORDS}\n")
    assert text == BARE.replace("<CONCLUSION>", f"<REFLECTION>{WORDS}</REFLECTION> <CONCLUSION>")
    assert reflects_once(text)
    assert not reflects_once(BARE)


@pytest.mark.parametrize(
    ("answer", "reflection", "message"),
    [
        ("3", WORDS, "the answer is not in the template: .*<SUMMARY> must come once"),
        (insert_reflection(BARE, WORDS), WORDS, "must not reflect yet, it does so 1 times"),
        (BARE, " \n", "the reflection is empty"),
        (BARE, "a</REFLECTION>", "must not hold a tag, it holds </REFLECTION>"),
    ],
)
def test_what_cannot_be_inserted(answer, reflection, message) -> None:
    with pytest.raises(ValueError, match=message):
        insert_reflection(answer, reflection)


@given(st.lists(st.sampled_from(["", "a", " b "]), max_size=4))
def test_removing_gives_the_bare_answer_back(reflections) -> None:
    blocks = "".join(f" {wrap('REFLECTION', text)}" for text in reflections)
    text = BARE.replace("</REASONING>", f"</REASONING>{blocks}")
    assert remove_reflections(text) == BARE


def test_synthetic_answers_reflect_once_with_all_evidence() -> None:
    tokenizer = build_tokenizer()
    many = 0
    for number, (_, question) in enumerate(held_out(60)):
        answer = synthetic_answer(question, number)
        assert reflects_once(answer)
        assert is_right(answer, question)
        assert all(look in parse(answer).text("REFLECTION") for look in question.looks)
        ids = tokenizer.encode(answer)
        assert parse_ids(ids, tokenizer).well_formed
        assert len(ids) < 260
        many += len(question.looks) > 1
    assert many  # questions that take two looks must have come


def record(response=BARE) -> Record:
    return Record("r1", "How many?", "3", to_rgb_picture(), response)


def to_rgb_picture():
    from PIL import Image

    return to_rgb(Image.new("RGB", (4, 4)))


def test_a_model_writes_the_reflection() -> None:
    prompts = []
    replies = iter(["too short", f"</SUMMARY> {WORDS}", wrap("REFLECTION", WORDS)])

    def ask(prompt: str) -> str:
        prompts.append(prompt)
        return next(replies)

    written = ReflectionWriter(ask)(record())
    assert written.response == insert_reflection(BARE, WORDS)
    assert (written.id, written.question, written.answer) == ("r1", "How many?", "3")
    assert len(prompts) == 3
    assert "How many?" in prompts[0]
    assert "<REASONING>$r</REASONING>" in prompts[0]
    assert "$question" not in prompts[0]


def test_a_model_that_sees_gets_the_record() -> None:
    seen = []
    writer = ReflectionWriter(ask_about=lambda prompt, about: seen.append(about) or WORDS)
    assert reflects_once(writer(record()).response)
    assert seen[0].image.size == (4, 4)


@pytest.mark.parametrize(
    ("options", "about", "message"),
    [
        ({}, record(), "record r1: no reflection in 3 attempts: .*5 to 200 words, it has 1"),
        ({"attempts": 1}, record(), "no reflection in 1 attempts"),
        ({}, record(None), "record r1 has no response"),
        ({}, record("3"), "record r1: the answer is not in the template"),
        ({}, record(insert_reflection(BARE, WORDS)), "record r1: .*must not reflect yet"),
    ],
)
def test_what_cannot_be_written(options, about, message) -> None:
    with pytest.raises(ValueError, match=message):
        ReflectionWriter(lambda prompt: "no", **options)(about)


@pytest.mark.parametrize(
    "options", [{}, {"ask": str, "ask_about": max}, {"ask": str, "attempts": 0}]
)
def test_bad_options(options) -> None:
    with pytest.raises(ValueError, match="exactly one of ask and ask_about|must be at least 1"):
        ReflectionWriter(**options)


def test_prompts_are_checked() -> None:
    with pytest.raises(ValueError, match="there is no prompt 'none'"):
        fill("none")
    with pytest.raises(ValueError, match="the prompt 'judge' needs 'answer'"):
        fill("judge", question="q")
