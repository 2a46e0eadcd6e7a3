"""Distillation with the small model, by its command: killed in the middle, it goes on."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lookagain_ext.commands.distill import read_judge, read_shard, run
from lookagain_ext.commands.errors import UserError
from lookagain_ext.generation import LookAgainConfig
from lookagain_ext.models.loading import load
from lookagain_ext.training.answering import ModelAnswerer
from lookagain_ext.training.scene_records import SceneRecords

DEFAULTS = {
    "questions": "scenes:8:3",
    "reader": "geometry",
    "split": "train",
    "model_name": "lookagain-tiny",
    "strategy": "copy",
    "ratio": 0.5,
    "shard": "0/1",
    "batch_size": 2,
    "max_new_tokens": 260,
    "temperature": 0.7,
    "seed": 5,
}
KILLED_IN_THE_THIRD_BATCH = """
import json, os, signal, sys
from pathlib import Path
from lookagain_ext.commands.distill import run
from lookagain_ext.training.answering import ModelAnswerer

plain, calls = ModelAnswerer.__call__, []

def answer(self, records, number):
    calls.append(number)
    texts = plain(self, records, number)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return texts

ModelAnswerer.__call__ = answer
run(out=Path(sys.argv[1]), **json.loads(sys.argv[2]))
"""


def outputs(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_killed_and_started_again_is_one_run(tmp_path, one_thread, capsys) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(out=whole, **DEFAULTS)
    assert "8 of 8 answered: " in capsys.readouterr().out
    child = subprocess.run(
        [sys.executable, "-c", KILLED_IN_THE_THIRD_BATCH, str(killed), json.dumps(DEFAULTS)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=200,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    journal = (killed / "journal-00000-of-00001.jsonl").read_bytes()
    assert journal.count(b"\n") == 5  # what the work is, and two batches of two
    run(out=killed, **DEFAULTS)
    assert outputs(killed) == outputs(whole)
    statuses = [
        json.loads(line)["status"]
        for line in outputs(whole)["journal-00000-of-00001.jsonl"].splitlines()[1:]
    ]
    assert len(statuses) == 8
    assert statuses.count("kept") >= 4  # it gets nine in ten right


def test_questions_from_a_file_and_judges(tmp_path, one_thread, monkeypatch, endpoint) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets comes with the extra train")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = []
    for number, record in enumerate(SceneRecords(4, seed=3)):
        record.image.save(tmp_path / f"{number}.png")
        about = {"image": f"{number}.png", "question": record.question, "answer": record.answer}
        rows.append(json.dumps({"id": f"f{number}", **about}))
    (tmp_path / "set.jsonl").write_text("\n".join(rows) + "\n")
    judges = [f"m@{endpoint(said).url}" for said in ("incorrect", "correct", "It is incorrect.")]
    run(
        out=tmp_path / "out",
        judge=judges,
        **{
            **DEFAULTS,
            "questions": str(tmp_path / "set.jsonl"),
            "temperature": 0.0,
            "shard": "1/2",
        },
    )
    files = {name: bytes_ for name, bytes_ in outputs(tmp_path / "out").items() if ".jsonl" in name}
    assert files["kept-00001-of-00002.jsonl"] == b""
    judged = [json.loads(line) for line in files["review-00001-of-00002.jsonl"].splitlines()]
    rejected = files["rejected-00001-of-00002.jsonl"].splitlines()
    assert len(judged) + len(rejected) == 2
    assert len(judged) >= 1
    assert all(row["votes"] == ["incorrect", "correct", "incorrect"] for row in judged)
    assert {row["id"] for row in judged} <= {"f1", "f3"}


def test_a_row_of_a_batch_is_the_row_alone(one_thread) -> None:
    model, processor = load("lookagain-tiny")
    answer = ModelAnswerer(model, processor, LookAgainConfig(), max_new_tokens=120)
    records = list(SceneRecords(3))
    texts = answer(records, 0)
    assert [answer([record], 0)[0] for record in records] == texts
    assert all(text.startswith("<SUMMARY>") and "<|" not in text for text in texts)


def test_sampling_is_of_seed_and_number(one_thread) -> None:
    model, processor = load("lookagain-tiny")
    records = list(SceneRecords(2))

    def said(seed, number, temperature=3.0):
        options = {"max_new_tokens": 12, "temperature": temperature, "seed": seed}
        return ModelAnswerer(model, processor, LookAgainConfig(), **options)(records, number)

    assert said(0, 0) == said(0, 0)
    assert said(0, 0) != said(0, 2)
    assert said(0, 0) != said(1, 0)
    assert said(0, 0, 0.0) == said(1, 2, 0.0)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        ModelAnswerer(model, processor, LookAgainConfig(), max_new_tokens=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shard": "2/2"}, "--shard must be INDEX/COUNT"),
        ({"strategy": "cpoy"}, "--strategy must be"),
        ({"questions": "scenes:0"}, "count must be at least 1"),
        ({"judge": ["m@http://127.0.0.1"]}, "--review-votes must be 1 to .*1, got 2"),
        ({"judge": ["http://127.0.0.1", "x"]}, "--judge must be MODEL@URL"),
    ],
)
def test_what_is_handed_over_wrongly(tmp_path, changes, message) -> None:
    with pytest.raises(UserError, match=message):
        run(out=tmp_path / "out", **{**DEFAULTS, **changes})


def test_a_folder_with_other_work(tmp_path, one_thread) -> None:
    small = {**DEFAULTS, "questions": "scenes:1", "max_new_tokens": 4}
    run(out=tmp_path, **small)
    with pytest.raises(UserError, match=r"seed is 5 there and 6 here\. Name another folder"):
        run(out=tmp_path, **{**small, "seed": 6})


def test_shards_and_judges_are_read() -> None:
    assert read_shard("1/3") == (1, 3)
    found = read_judge("org/m@1@https://h:1/v1", None, False)
    assert (found.endpoint.model, found.endpoint.url) == ("org/m@1", "https://h:1/v1")
