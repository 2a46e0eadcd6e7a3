"""Records of questions: their readers, their pictures, and what is said about a bad one."""

import io
import json
import sys

import pytest
from PIL import Image

from lookagain_ext.training.images import BRPO_SIZE, SFT_PIXELS, fit_image, read_image
from lookagain_ext.training.records import Records, load_records

RED = (200, 10, 10)
RESPONSE = (
    "<SUMMARY>s</SUMMARY> <CAPTION>c</CAPTION> <REASONING>r</REASONING> "
    "<CONCLUSION> 3 </CONCLUSION>"
)


def picture(size=(8, 6), mode="RGB"):
    return Image.new("RGB", size, RED).convert(mode)


def png(size=(8, 6)) -> bytes:
    buffer = io.BytesIO()
    picture(size).save(buffer, "PNG")
    return buffer.getvalue()


def cot(**changes):
    turns = [
        {"from": "human", "value": "<image>\nHow many?"},
        {"from": "gpt", "value": RESPONSE},
        {"from": "human", "value": "And now?"},
    ]
    return {"id": "a7", "image": picture(), "conversations": turns, **changes}


def maths(**changes):
    row = {"problem": "<image>Find x.", "answer": "2\\sqrt{3}", "images": [picture()]}
    return {**row, **changes}


def test_llava_cot() -> None:
    record = Records([cot()], "llava-cot")[0]
    assert (record.id, record.question, record.answer) == ("a7", "How many?", "3")
    row = record.sft_row()
    assert row["completion"][0]["content"][0]["text"] == RESPONSE
    assert row["images"][0].size == (8, 6)
    assert row["prompt"][0]["content"][0] == {"type": "image"}
    assert Records([cot(answer="4")], "llava-cot")[0].answer == "4"


@pytest.mark.parametrize(
    ("changes", "question", "answer"),
    [
        ({}, "Find x.", "2\\sqrt{3}"),
        ({"answer": 4}, "Find x.", "4"),
        ({"problem": None, "question": "Find y."}, "Find y.", "2\\sqrt{3}"),
        ({"choices": ["1", "2"], "answer": "B"}, "Find x.\nA. 1\nB. 2", "B"),
        ({"choices": ["1", "2"], "answer": "1"}, "Find x.\nA. 1\nB. 2", "A"),
    ],
)
def test_geometry(changes, question, answer) -> None:
    record = Records([maths(**changes)], "geometry")[0]
    assert (record.id, record.question, record.answer) == ("0", question, answer)
    assert record.brpo_row()["answer"] == answer
    with pytest.raises(ValueError, match="record 0 has no response to learn from"):
        record.sft_row()


@pytest.mark.parametrize(
    ("reader", "row", "message"),
    [
        ("llava-cot", cot(conversations=None), "there is no conversations"),
        (
            "llava-cot",
            cot(conversations=[{"from": "human", "value": "x"}]),
            "one turn from 'human'",
        ),
        (
            "llava-cot",
            cot(conversations=[{"from": "human", "value": "x"}, {"from": "gpt", "value": "3"}]),
            "the answer has no <CONCLUSION>",
        ),
        ("llava-cot", cot(image=None), "there is no picture"),
        ("llava-cot", cot(image="missing.png"), "there is no picture .*missing.png"),
        ("geometry", maths(problem="<image>"), "the question is empty"),
        ("geometry", maths(answer=None), r"there is no answer \(columns: problem, answer, images"),
        ("geometry", maths(images=[picture(), picture()]), "one picture is needed, got 2"),
        ("geometry", maths(images=[b"no picture"]), "10 bytes cannot be read as a picture"),
        ("geometry", maths(images=[7]), "must be a path, bytes or a PIL image, got int"),
        ("geometry", maths(choices=["1"]), "is none of the choices"),
    ],
)
def test_a_bad_record_is_named_by_its_number(reader, row, message) -> None:
    good = cot() if reader == "llava-cot" else maths()
    records = Records([good, row], reader, source="set.jsonl")
    with pytest.raises(ValueError, match=f"record 1 of set.jsonl: .*{message}"):
        records.check()
    assert records[0].image.size == (8, 6)


def test_wrong_reader_and_number() -> None:
    with pytest.raises(ValueError, match="reader must be one of llava-cot, geometry, got 'x'"):
        Records([], "x")
    with pytest.raises(IndexError, match="there is no record 1 in the data, it has 1"):
        Records([cot()], "llava-cot")[1]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_images_come_in_every_form(tmp_path, mode) -> None:
    path = tmp_path / "a.png"
    picture(mode=mode).save(path)
    stored = path.read_bytes()
    forms = ["a.png", str(path), path, stored, {"bytes": stored, "path": None}]
    for form in [*forms, {"bytes": None, "path": "a.png"}, Image.open(path)]:
        image = read_image(form, tmp_path)
        assert (image.mode, image.size) == ("RGB", (8, 6))
        assert image.getpixel((0, 0)) == picture(mode=mode).convert("RGB").getpixel((0, 0))


@pytest.mark.parametrize(
    ("size", "limits", "fitted"),
    [
        ((640, 480), {"max_size": BRPO_SIZE}, (640, 480)),
        ((480, 640), {"max_size": BRPO_SIZE}, (480, 640)),
        ((1280, 480), {"max_size": BRPO_SIZE}, (640, 240)),
        ((960, 960), {"max_size": BRPO_SIZE}, (480, 480)),
        ((512, 512), {"max_pixels": SFT_PIXELS}, (512, 512)),
        ((1024, 1024), {"max_pixels": SFT_PIXELS}, (512, 512)),
        ((8, 6), {"max_size": BRPO_SIZE, "max_pixels": SFT_PIXELS}, (8, 6)),
        ((4000, 1), {"max_size": BRPO_SIZE}, (640, 1)),
        ((3000, 2000), {}, (3000, 2000)),
    ],
)
def test_images_are_fitted(size, limits, fitted) -> None:
    assert fit_image(picture(size), **limits).size == fitted
    records = Records([cot(image=picture(size))], "llava-cot", **limits)
    assert records[0].image.size == fitted


def test_limits_are_checked() -> None:
    with pytest.raises(ValueError, match="limits must be at least 1"):
        fit_image(picture(), max_pixels=0)


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    module = pytest.importorskip("datasets", reason="datasets comes with the extra train")
    monkeypatch.setattr(module.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return module


def write_lines(path, *rows):
    path.write_text("".join(f"{row if type(row) is str else json.dumps(row)}\n" for row in rows))
    return path


def test_jsonl_with_pictures_beside_it(tmp_path, datasets) -> None:
    picture().save(tmp_path / "a.png")
    file = write_lines(tmp_path / "set.jsonl", cot(image="a.png"), cot(image="b.png", id="b"))
    records = load_records(file, "llava-cot")
    assert len(records) == 2
    assert records[0].answer == "3"
    with pytest.raises(ValueError, match=r"record 1 of .*set.jsonl: there is no picture .*b.png"):
        records.check()


def test_answers_may_be_texts_and_numbers(tmp_path, datasets) -> None:
    picture().save(tmp_path / "a.png")
    rows = [maths(images=None, image="a.png", answer=answer) for answer in ("x", 4)]
    records = load_records(write_lines(tmp_path / "set.jsonl", *rows), "geometry")
    assert [record.answer for record in records] == ["x", "4"]


@pytest.mark.parametrize("stored", ["image", "images", "bytes"])
def test_parquet(tmp_path, datasets, stored) -> None:
    if stored == "bytes":
        data = datasets.Dataset.from_list([maths(images=None, image=png())])
    else:
        kind = datasets.Image()
        features = datasets.Features(
            {
                "problem": datasets.Value("string"),
                "answer": datasets.Value("string"),
                stored: kind if stored == "image" else datasets.Sequence(kind),
            }
        )
        cell = picture() if stored == "image" else [picture()]
        row = {"problem": "Find x.", "answer": "2", stored: cell}
        data = datasets.Dataset.from_list([row], features=features)
    data.to_parquet(str(tmp_path / "set.parquet"))
    records = load_records(tmp_path / "set.parquet", "geometry")
    assert records[0].question == "Find x."
    assert records[0].image.getpixel((0, 0)) == RED


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"answer": "1"}, '{"answer": '], "record 1: it is not JSON"),
        ([{"answer": "1"}, [1]], "record 1: a record must be an object, got list"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path, datasets, rows, message) -> None:
    file = write_lines(tmp_path / "set.jsonl", *rows)
    with pytest.raises(ValueError, match=f"cannot read .*set.jsonl: {message}"):
        load_records(file, "geometry")


def test_what_is_no_set(tmp_path, datasets) -> None:
    with pytest.raises(ValueError, match="there is no file .*none.jsonl"):
        load_records(tmp_path / "none.jsonl", "geometry")
    (tmp_path / "set.csv").write_text("a")
    with pytest.raises(ValueError, match="must be a .jsonl, .json or .parquet file"):
        load_records(tmp_path / "set.csv", "geometry")


def test_without_datasets(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'datasets: pip install "lookagain-ext\[train\]"'):
        load_records(tmp_path / "set.jsonl", "geometry")


def test_an_empty_file_is_named(tmp_path, datasets) -> None:
    (tmp_path / "kept.jsonl").touch()
    with pytest.raises(ValueError, match="kept.jsonl is empty: it holds no record"):
        load_records(tmp_path / "kept.jsonl", "llava-cot")
