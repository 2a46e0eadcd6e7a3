"""Cold starts from a configuration: who writes the reflections, and what a kill leaves."""

import io
import json

import pytest
from rich.console import Console

from lookagain_ext.synthetic.scenes import Scene
from lookagain_ext.template import parse
from lookagain_ext.training.coldstart import insert_reflection, reflects_once
from lookagain_ext.training.coldstart_run import REFLECTED, run_coldstart, write, written
from lookagain_ext.training.endpoint import EndpointError
from lookagain_ext.training.run_config import RunConfig

BARE = (
    "<SUMMARY>s</SUMMARY> <CAPTION>c</CAPTION> <REASONING>r</REASONING> "
    "<CONCLUSION> 3 </CONCLUSION>"
)
WORDS = "I look at the picture and count the circles again."


def config(folder, data, **changes) -> RunConfig:
    return RunConfig(str(folder / "run"), "lookagain-tiny", data, **changes)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def records(folder, *responses):
    """A file of records about one picture, with these answers."""
    pytest.importorskip("datasets", reason="needs the extra 'train'")
    Scene.random(1).render(1).save(folder / "one.png")
    lines = []
    for number, said in enumerate(responses):
        turns = [{"from": "human", "value": f"Circles {number}?"}, {"from": "gpt", "value": said}]
        lines.append(json.dumps({"id": str(number), "image": "one.png", "conversations": turns}))
    (folder / "cot.jsonl").write_text("\n".join(lines) + "\n")
    return {"path": str(folder / "cot.jsonl"), "reader": "llava-cot"}


def test_drawn_scenes_reflect_once_by_a_template(tmp_path) -> None:
    plan, said = config(tmp_path, {"scenes": 5, "seed": 2}), io.StringIO()
    done = run_coldstart(plan, data_only=True, console=Console(file=said))
    assert (
        done == tmp_path / "run/data" / REFLECTED and "5 of 5 records: 5 whole" in said.getvalue()
    )
    for row in rows(done):
        answer = row["conversations"][1]["value"]
        assert reflects_once(answer) and parse(answer).conclusion == row["answer"]
        assert (done.parent / row["image"]).read_bytes()[:4] == b"\x89PNG"
    before = done.stat().st_mtime_ns
    run_coldstart(plan, data_only=True, console=Console(file=said))
    assert done.stat().st_mtime_ns == before
    other = config(tmp_path, {"scenes": 6, "seed": 2})
    assert written(other, done.parent) is None
    with pytest.raises(ValueError, match="holds other work: data is"):
        run_coldstart(other, data_only=True)


def test_an_endpoint_writes_what_is_missing(tmp_path, endpoint) -> None:
    """And goes on behind what was written when it was away for a while."""
    whole = insert_reflection(BARE, WORDS)
    data = records(tmp_path, BARE, whole, "no template <CONCLUSION> 3 </CONCLUSION>", BARE)
    server = endpoint(404)
    writer = {"endpoint": server.url, "model": "m", "timeout": 5, "pause": 0.01}
    plan = config(tmp_path, data, writer=writer)
    with pytest.raises(EndpointError, match="refuses: HTTP 404"):
        run_coldstart(plan, data_only=True)
    server.replies = [f"<REFLECTION>{WORDS}</REFLECTION>"]
    server.bodies.clear()
    said = io.StringIO()
    done = run_coldstart(plan, data_only=True, console=Console(file=said))
    assert "4 of 4 records: 1 unusable, 1 whole, 2 written" in said.getvalue()
    assert [row["id"] for row in rows(done)] == ["0", "1", "3"]
    assert all(row["conversations"][1]["value"] == whole for row in rows(done))
    assert len(server.bodies) == 2
    picture, words = server.bodies[0]["messages"][0]["content"]
    assert picture["type"] == "image_url" and "Circles" in words["text"] and "3" in words["text"]
    blind = {**writer, "show_image": False}
    write(config(tmp_path, data, writer=blind), tmp_path / "blind", Console(file=said))
    assert isinstance(server.bodies[-1]["messages"][0]["content"], str)


def test_a_model_here_writes(tmp_path) -> None:
    """Whatever it says; the small model is no writer, so nothing comes out usable."""
    data = records(tmp_path, BARE)
    writer = {"model": "lookagain-tiny", "max_new_tokens": 4, "attempts": 2}
    with pytest.raises(ValueError, match="no record is usable: record 0: no reflection in 2 att"):
        run_coldstart(config(tmp_path, data, writer=writer), data_only=True)


@pytest.mark.parametrize(
    ("writer", "message"),
    [
        (None, "no record is usable: an answer does not reflect once, and .* no writer"),
        ({"model": "m", "endpoint": "ftp://x"}, "must begin with http"),
        ({"model": "m", "endpoint": "http://x", "tries": 3}, "writer: .*tries"),
    ],
)
def test_wrong_writers_are_named(writer, message, tmp_path) -> None:
    plan = config(tmp_path, records(tmp_path, BARE), writer=writer)
    with pytest.raises(ValueError, match=message):
        run_coldstart(plan, data_only=True)


def test_several_processes_need_the_data_first(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    plan = config(tmp_path, {"scenes": 2})
    with pytest.raises(ValueError, match="by one process: run the command with --data-only"):
        run_coldstart(plan)
    monkeypatch.delenv("WORLD_SIZE")
    run_coldstart(plan, data_only=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_coldstart(plan, data_only=True).name == REFLECTED


def test_only_a_cold_start_has_a_writer(tmp_path) -> None:
    pytest.importorskip("trl", reason="needs the extra 'train'")
    from lookagain_ext.training.trl_run import make_trainer

    with pytest.raises(ValueError, match="only a cold start has one"):
        make_trainer("sft", config(tmp_path, {"scenes": 1}, writer={"model": "m"}))
    with pytest.raises(ValueError, match="writer must name a model"):
        config(tmp_path, {"scenes": 1}, writer={"endpoint": "http://x"})
