"""The parser on pieces of text and on token ids, against an independent grammar."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lookagain_ext.synthetic.tokenizer import build_tokenizer
from lookagain_ext.template import ONCE, TAGS, TemplateStream, parse, parse_ids, tag_ids, wrap

_FREE = f"(?:(?!{'|'.join(TAGS)}).)*"
_REFLECTIONS = rf"\s*(?:<REFLECTION>{_FREE}</REFLECTION>\s*)*"
GRAMMAR = re.compile(
    rf"\s*{_REFLECTIONS.join(f'<{name}>{_FREE}</{name}>' for name in ONCE)}\s*", re.DOTALL
)
GOOD = [
    tag
    for name in ("SUMMARY", "CAPTION", "REASONING", "REFLECTION", "CONCLUSION")
    for tag in (f"<{name}>", " red", f"</{name}>", " ")
]

anything = st.lists(st.sampled_from([*TAGS, "red", " ", "\n", "<REFLE", "</", "<", "é"]))


@st.composite
def nearly_good(draw):
    """A good answer with up to two items dropped, doubled or moved."""
    items = list(GOOD)
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(items) - 1))
        item = items.pop(at)
        for _ in range(draw(st.integers(0, 2))):
            items.insert(draw(st.integers(0, len(items))), item)
    return items


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@given(nearly_good() | anything)
@example(GOOD)
def test_well_formed_is_what_the_grammar_accepts(items) -> None:
    text = "".join(items)
    assert parse(text).well_formed == bool(GRAMMAR.fullmatch(text))


@given(nearly_good() | anything, st.lists(st.integers(0, 200)))
@example(GOOD, list(range(200)))
def test_pieces_are_the_whole(items, cuts) -> None:
    text = "".join(items)
    stream, events, fed = TemplateStream(), [], ""
    places = [0, *sorted(cut for cut in cuts if cut <= len(text)), len(text)]
    for begin, end in zip(places, places[1:], strict=False):
        events += stream.feed(text[begin:end])
        fed += text[begin:end]
        told = "".join(event.text for event in events)
        assert fed.startswith(told)
        held = fed[len(told) :]
        assert held == "" or any(tag.startswith(held) and tag != held for tag in TAGS)
    assert stream.finish() == parse(text)
    assert [event.text for event in events if event.kind != "text"] == [
        match.group() for match in re.finditer("|".join(TAGS), text)
    ]


def test_events_name_their_block() -> None:
    stream = TemplateStream()
    events = stream.feed("a<SUM") + stream.feed("MARY>b</SUMMARY") + stream.feed(">c")
    found = [(event.kind, event.text, event.block) for event in events]
    assert found == [
        ("text", "a", None),
        ("open", "<SUMMARY>", "SUMMARY"),
        ("text", "b", "SUMMARY"),
        ("close", "</SUMMARY>", "SUMMARY"),
        ("text", "c", None),
    ]
    assert stream.block is None


def encode(tokenizer, items) -> list[int]:
    """Ids in which only whole items are tags."""
    vocabulary = tokenizer.get_vocab()
    ids = []
    for item in items:
        ids += [vocabulary[item]] if item in TAGS else tokenizer.encode(item)
    return ids


@given(items=nearly_good() | st.lists(st.sampled_from([*TAGS, "red", " ", "é"])))
@example(items=GOOD)
def test_ids_are_parsed_as_their_text(tokenizer, items) -> None:
    ids = encode(tokenizer, items)
    by_ids, by_text = parse_ids(ids, tokenizer), parse("".join(items))
    assert by_ids.errors == by_text.errors
    assert [(b.name, b.text) for b in by_ids.blocks] == [(b.name, b.text) for b in by_text.blocks]
    for block in by_ids.blocks:
        assert tokenizer.decode(ids[block.start : block.end]) == block.text
        assert tokenizer.decode(ids[block.start - 1]) == f"<{block.name}>"


@pytest.mark.parametrize(
    ("items", "lengths"),
    [
        ([], ()),
        (["<REFLECTION>", "</REFLECTION>"], (0,)),
        (
            ["<REFLECTION>", " red", " red", "</REFLECTION>", "<REFLECTION>", "</REFLECTION>"],
            (2, 0),
        ),
        (["<REFLECTION>", " red"], ()),
        (["<REFLECTION>", " red", "<REFLECTION>", "</REFLECTION>"], (0,)),
        (["<REFLECTION>", "<|im_start|>", "</REFLECTION>"], (1,)),
    ],
)
def test_lengths_are_tokens_between_the_tags(tokenizer, items, lengths) -> None:
    found = parse_ids(encode(tokenizer, items), tokenizer)
    assert found.reflection_lengths == lengths
    assert found.reflections == len(lengths)


@pytest.mark.parametrize("end", [["<|im_end|>"], ["<|endoftext|>"], ["<|im_end|>", "red"]])
def test_an_answer_stops_at_its_end_token(tokenizer, end) -> None:
    assert parse_ids(encode(tokenizer, [*GOOD, *end]), tokenizer).well_formed
    assert not parse_ids(encode(tokenizer, [*GOOD, "<|im_start|>"]), tokenizer).well_formed


def test_a_spelled_tag_is_none_but_an_error(tokenizer) -> None:
    letters = [tokenizer.encode(letter) for letter in "</REFLECTION>"]
    inside = [token for letter in letters for token in letter]
    opened, closed = encode(tokenizer, ["<REFLECTION>", "</REFLECTION>"])
    found = parse_ids([opened, *inside, closed], tokenizer)
    assert found.reflection_lengths == (len(inside),)
    assert "</REFLECTION> is spelled in ordinary tokens" in found.errors


def test_tokenizer_without_the_tags_is_refused(tokenizer) -> None:
    class Without:
        unk_token_id = 0

        def convert_tokens_to_ids(self, tag: str) -> int:
            return 0 if tag == "<CAPTION>" else 7

    with pytest.raises(ValueError, match=r"^<CAPTION> must be single tokens of the tokenizer"):
        tag_ids(Without())
    assert len(tag_ids(tokenizer)) == 10


def test_wrap_is_parsed_back() -> None:
    assert parse(wrap("CAPTION", "x")).text("CAPTION") == "x"
