"""Distillation with functions for models: what is kept, shards, and kills at any byte."""

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from lookagain_ext.template import wrap
from lookagain_ext.training.distill import distill
from lookagain_ext.training.journal import Journal
from lookagain_ext.training.records import Record, Records
from lookagain_ext.training.scene_records import SceneRecords


def text(conclusion: str) -> str:
    blocks = {"SUMMARY": "s", "CAPTION": "c", "REASONING": "r", "REFLECTION": "é\n"}
    blocks["CONCLUSION"] = conclusion
    return " ".join(wrap(name, inside) for name, inside in blocks.items())


def questions(count=7):
    picture = Image.new("RGB", (4, 4), (9, 9, 9))
    return [Record(f"q{i}", f"{i} + {i}?", str(2 * i), picture) for i in range(count)]


class Answers:
    """Right, except that number 3 is wrong and number 5 leaves the template."""

    def __init__(self) -> None:
        self.batches = []

    def __call__(self, records, number):
        self.batches.append((number, [record.id for record in records]))
        said = [text(record.answer) for record in records]
        for i, record in enumerate(records):
            if record.id == "q3":
                said[i] = text("7")
            if record.id == "q5":
                said[i] = "10"
        return said


def rows(folder: Path, name: str):
    """Of all shards."""
    files = sorted(folder.glob(f"{name}-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def outputs(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_answers_are_sorted_by_rule(tmp_path) -> None:
    told = []
    counts = distill(
        questions(),
        Answers(),
        tmp_path,
        batch_size=3,
        progress=lambda done, total, found: told.append((done, total, dict(found))),
    )
    assert counts == Counter(kept=5, wrong=1, malformed=1)
    assert [row["id"] for row in rows(tmp_path, "kept")] == ["q0", "q1", "q2", "q4", "q6"]
    assert rows(tmp_path, "review") == []
    rejected = {row["id"]: row for row in rows(tmp_path, "rejected")}
    assert rejected["q3"]["reasons"] == ["'7' is not '6'"]
    assert rejected["q5"]["status"] == "malformed"
    assert told[0] == (0, 7, {})
    assert told[-1] == (7, 7, {"kept": 5, "wrong": 1, "malformed": 1})


def test_what_is_kept_can_be_trained_on(tmp_path) -> None:
    distill(questions(), Answers(), tmp_path)
    records = Records(rows(tmp_path, "kept"), "llava-cot", root=tmp_path)
    assert len(records) == 5
    for record, asked in zip(records, (0, 1, 2, 4, 6), strict=True):
        first = questions()[asked]
        assert (record.id, record.question, record.answer) == (
            first.id,
            first.question,
            first.answer,
        )
        assert record.response == text(first.answer)
        assert record.image.getpixel((0, 0)) == (9, 9, 9)


def test_shards_share_the_questions(tmp_path) -> None:
    answers = [Answers() for _ in range(3)]
    for i, answer in enumerate(answers):
        distill(questions(), answer, tmp_path, shard=(i, 3), batch_size=2)
    assert answers[1].batches == [(1, ["q1", "q4"])]
    asked = [name for answer in answers for _, names in answer.batches for name in names]
    assert sorted(asked) == [f"q{i}" for i in range(7)]
    found = [row["id"] for name in ("kept", "rejected") for row in rows(tmp_path, name)]
    assert sorted(found) == sorted(asked)


def test_cut_at_any_byte_the_journal_goes_on(tmp_path) -> None:
    whole = tmp_path / "whole"
    distill(questions(), Answers(), whole, batch_size=3)
    wanted = outputs(whole)
    journal = wanted["journal-00000-of-00001.jsonl"]
    ends = [i for i, byte in enumerate(journal) if byte == ord("\n")]
    near = {place + shift for place in ends for shift in (-1, 0, 1, 2)} | {0, 1}
    for cut in sorted(place for place in near if 0 <= place <= len(journal)):
        folder = tmp_path / f"cut{cut}"
        folder.mkdir()
        (folder / "journal-00000-of-00001.jsonl").write_bytes(journal[:cut])
        (folder / "images").mkdir()
        for name in [name for name in wanted if name.startswith("images/")]:
            (folder / name).write_bytes(b"half")
        answer = Answers()
        distill(questions(), answer, folder, batch_size=3)
        finished = max(0, journal[:cut].count(b"\n") - 1)
        # Whole batches, and none of which all is finished.
        unfinished = [first for first in (0, 3, 6) if min(first + 3, 7) > finished]
        assert [number for number, _ in answer.batches] == unfinished
        found = outputs(folder)
        assert found.keys() == wanted.keys()
        assert {name for name in found if found[name] != wanted.get(name)} <= {
            f"images/{number:08d}.png" for number in range(finished)
        }


def test_a_second_run_asks_nothing(tmp_path) -> None:
    distill(questions(), Answers(), tmp_path)
    before = outputs(tmp_path)
    again = Answers()
    assert distill(questions(), again, tmp_path)["kept"] == 5
    assert again.batches == []
    assert outputs(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 2}, "holds other work: batch_size is 8 there and 2 here"),
        ({"about": {"model": "b"}}, "holds other work: model is 'a' there and 'b' here"),
        ({"shard": (1, 1)}, r"shard must be \(index, count\)"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"judges": [lambda record, answer: "correct"]}, "review_votes must be 1 to .*1, got 2"),
        ({"matching": "x"}, "matching must be one of"),
    ],
)
def test_refusals(tmp_path, options, message) -> None:
    distill(questions(), Answers(), tmp_path, about={"model": "a"})
    with pytest.raises(ValueError, match=message):
        distill(questions(), Answers(), tmp_path, **{"about": {"model": "a"}, **options})


def test_wrong_number_of_answers_and_damage(tmp_path) -> None:
    with pytest.raises(ValueError, match="answer must give 7 texts, got 0"):
        distill(questions(), lambda records, number: [], tmp_path)
    (tmp_path / "journal-00000-of-00001.jsonl").write_text("{}\n{\n{}\n")
    with pytest.raises(ValueError, match="line 2, is damaged"):
        distill(questions(), Answers(), tmp_path)


def test_a_journal_is_open_once_and_each_number_in_it(tmp_path) -> None:
    with Journal(tmp_path / "j", {"a": (1, 2)}) as journal:
        with pytest.raises(ValueError, match="is in use by another process"):
            Journal(tmp_path / "j", {"a": (1, 2)})
        journal.add([{"number": 1}])
        with pytest.raises(ValueError, match="number 1 is finished already"):
            journal.add([{"number": 1}])
    with Journal(tmp_path / "j", {"a": (1, 2)}) as journal:
        assert list(journal.done) == [1]


@pytest.mark.parametrize(
    ("votes", "review_votes", "status"),
    [
        (["incorrect", "incorrect", "correct"], 2, "review"),
        (["incorrect", "correct", "correct"], 2, "kept"),
        (["incorrect", "unsure"], 2, "kept"),
        (["incorrect", "incorrect"], 2, "review"),
        (["incorrect"], 1, "review"),
    ],
)
def test_judges_vote_on_right_answers_only(tmp_path, votes, review_votes, status) -> None:
    asked = []

    def judge(verdict):
        return lambda record, answer: asked.append(record.id) or verdict

    distill(
        questions(4), Answers(), tmp_path, judges=list(map(judge, votes)), review_votes=review_votes
    )
    found = rows(tmp_path, status)
    assert [row["id"] for row in found] == ["q0", "q1", "q2"]
    assert found[0]["votes"] == votes
    assert [row["id"] for row in rows(tmp_path, "rejected")] == ["q3"]
    assert sorted(asked) == sorted(["q0", "q1", "q2"] * len(votes))
    with pytest.raises(ValueError, match="a judge must say correct, incorrect, unsure, got 'yes'"):
        distill(questions(1), Answers(), tmp_path / "b", judges=[judge("yes")], review_votes=1)


def test_scene_records_are_the_same_every_time() -> None:
    records = SceneRecords(7, seed=1, respond=True)
    assert [records[i].question for i in range(7)] == [record.question for record in records]
    assert records[2].response == SceneRecords(3, seed=1, respond=True)[2].response
    assert records[2].question != SceneRecords(3, seed=2)[2].question
    assert SceneRecords(3)[2].response is None
    with pytest.raises(IndexError):
        records[7]
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        SceneRecords(0)
