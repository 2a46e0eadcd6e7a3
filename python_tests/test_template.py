import pytest

from lookagain_ext.template import BLOCKS, TAGS, parse, wrap

GOOD = (
    "<SUMMARY>s</SUMMARY> <CAPTION>c</CAPTION> <REASONING>r</REASONING> "
    "<REFLECTION>f</REFLECTION> <CONCLUSION> 3 </CONCLUSION>"
)


def test_ten_tags() -> None:
    assert len(set(TAGS)) == 10
    assert TAGS[:2] == ("<SUMMARY>", "</SUMMARY>")


def test_good_answer() -> None:
    parsed = parse(GOOD)
    assert parsed.well_formed, parsed.errors
    assert [block.name for block in parsed.blocks] == list(BLOCKS)
    assert parsed.conclusion == "3"
    assert parsed.reflections == 1
    assert all(GOOD[block.start : block.end] == block.text for block in parsed.blocks)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_any_number_of_reflections_between_blocks(count: int) -> None:
    text = GOOD.replace("<REFLECTION>f</REFLECTION>", "<REFLECTION></REFLECTION>" * count)
    parsed = parse(text)
    assert parsed.well_formed, parsed.errors
    assert parsed.reflections == count


def test_reflections_may_stand_anywhere_between() -> None:
    early = GOOD.replace("<CAPTION>", "<REFLECTION>x</REFLECTION> <CAPTION>")
    assert parse(early).well_formed
    assert parse(early).reflections == 2


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "<SUMMARY> must come once, found 0"),
        ("plain words", "text outside the blocks at the end"),
        (GOOD + " and more", "text outside the blocks at the end"),
        (GOOD.replace("<CAPTION>", "but <CAPTION>"), "text outside the blocks before <CAPTION>"),
        (GOOD.replace("</REASONING>", ""), "<REFLECTION> opens inside <REASONING>"),
        (GOOD.replace("</CONCLUSION>", ""), "<CONCLUSION> is never closed"),
        (GOOD.replace("<SUMMARY>", ""), "</SUMMARY> closes a block that is not open"),
        (GOOD.replace("</CAPTION>", "</SUMMARY>"), "</SUMMARY> closes a block that is not open"),
        (GOOD + wrap("CONCLUSION", "4"), "<CONCLUSION> must come once, found 2"),
        (wrap("REFLECTION", "x") + GOOD, "a reflection stands between blocks"),
        (GOOD + wrap("REFLECTION", "x"), "a reflection stands between blocks"),
        (
            "".join(wrap(name, "") for name in ("CAPTION", "SUMMARY", "REASONING", "CONCLUSION")),
            "blocks out of order: CAPTION, SUMMARY",
        ),
    ],
)
def test_departures_are_named(text: str, error: str) -> None:
    parsed = parse(text)
    assert not parsed.well_formed
    assert any(error in one for one in parsed.errors), parsed.errors


def test_no_conclusion_is_none_and_first_counts() -> None:
    assert parse("3").conclusion is None
    assert parse(GOOD + wrap("CONCLUSION", "4")).conclusion == "3"


def test_wrap_rejects_unknown_block() -> None:
    with pytest.raises(ValueError, match="name must be one of SUMMARY"):
        wrap("THINK", "")
