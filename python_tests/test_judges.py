"""Judges, against a small endpoint on this machine that answers what it is told to."""

import json
import time

import pytest
from PIL import Image

from lookagain_ext.training.distill import distill
from lookagain_ext.training.judges import EndpointJudge, JudgeError, TextJudge, read_verdict
from lookagain_ext.training.records import Record

RECORD = Record("q", "How many $circles?", "3", Image.new("RGB", (4, 4)))


def judge(server, **options):
    return EndpointJudge(server.url, "judge-1", **{"timeout": 5, "pause": 0.01, **options})


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        ("correct", "correct"),
        ("It counts three.\nCORRECT.", "correct"),
        ("The caption is correct, the count is not.\nincorrect", "incorrect"),
        ("It would be incorrect to say four.\n**Correct**", "correct"),
        ("This is not correct", "incorrect"),
        ("I cannot tell.", "unsure"),
        ("", "unsure"),
        ("correctness matters", "unsure"),
    ],
)
def test_verdicts(said, verdict) -> None:
    assert read_verdict(said) == verdict
    assert TextJudge(lambda prompt: said)(RECORD, "x") == verdict


def test_request(endpoint, monkeypatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    server = endpoint("incorrect")
    assert judge(server, key_variable="JUDGE_KEY")(RECORD, "I see $four.") == "incorrect"
    assert server.paths == ["/v1/chat/completions"]
    assert server.headers[0]["Authorization"] == "Bearer secret"
    body = server.bodies[0]
    assert (body["model"], body["temperature"]) == ("judge-1", 0)
    prompt = body["messages"][0]["content"]
    assert all(part in prompt for part in ("How many $circles?", "\n3\n", "I see $four."))


def test_judge_sees_the_picture(endpoint) -> None:
    server = endpoint("correct")
    assert judge(server, show_image=True)(RECORD, "x") == "correct"
    picture, words = server.bodies[0]["messages"][0]["content"]
    assert picture["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    assert "How many" in words["text"]
    assert "Authorization" not in server.headers[0]


@pytest.mark.parametrize(
    "trouble", [500, 503, 429, 408, b"no JSON", b"{}", b'{"choices": []}', b"[]"]
)
def test_trouble_is_tried_again(endpoint, trouble) -> None:
    server = endpoint(trouble, trouble, "correct")
    assert judge(server, attempts=3)(RECORD, "x") == "correct"
    assert len(server.bodies) == 3
    with pytest.raises(JudgeError, match="does not answer, asked 2 times"):
        judge(endpoint(trouble), attempts=2)(RECORD, "x")


@pytest.mark.parametrize("status", [400, 401, 404])
def test_refusal_is_told_at_once(endpoint, status) -> None:
    server = endpoint(status)
    with pytest.raises(JudgeError, match=f"refuses: HTTP {status}"):
        judge(server)(RECORD, "x")
    assert len(server.bodies) == 1


def test_slow_and_absent_endpoints(endpoint) -> None:
    server = endpoint(lambda body: time.sleep(1) or "correct")
    with pytest.raises(JudgeError, match="asked 1 times: .*timed out"):
        judge(server, timeout=0.1, attempts=1)(RECORD, "x")
    gone = endpoint("correct")
    gone.server_close()
    with pytest.raises(JudgeError, match="does not answer"):
        judge(gone, attempts=2)(RECORD, "x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"url": "ftp://x"}, "url must begin with http:// or https://"),
        ({"timeout": 0}, "timeout must be above 0"),
        ({"attempts": 0}, "attempts at least 1"),
        ({"key_variable": "LOOKAGAIN_NO_SUCH_KEY"}, "LOOKAGAIN_NO_SUCH_KEY is not set"),
    ],
)
def test_bad_arguments(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        EndpointJudge(**{"url": "http://127.0.0.1", "model": "m", **arguments})


def answer(records, number):
    blocks = "<SUMMARY>s</SUMMARY><CAPTION>c</CAPTION><REASONING>r</REASONING>"
    return [f"{blocks}<CONCLUSION>{record.answer}</CONCLUSION>" for record in records]


def test_distillation_stops_with_the_judge_and_goes_on(endpoint, tmp_path) -> None:
    questions = [Record(f"q{i}", f"number {i}?", "3", RECORD.image) for i in range(6)]

    def opinion(body):
        prompt = body["messages"][0]["content"]
        return "incorrect" if "number 2?" in prompt else "correct"

    mild = endpoint("correct")
    dying = endpoint(opinion, opinion, opinion, opinion, 500)
    options = {"batch_size": 2}
    judges = [judge(dying, attempts=2), judge(endpoint(opinion)), judge(mild)]
    with pytest.raises(JudgeError):
        distill(questions, answer, tmp_path, judges=judges, **options)
    assert not list(tmp_path.glob("kept-*"))
    calls = []
    judges[0] = judge(endpoint(opinion))
    counts = distill(
        questions,
        lambda records, number: calls.append(number) or answer(records, number),
        tmp_path,
        judges=judges,
        **options,
    )
    assert calls == [4]
    assert counts == {"kept": 5, "review": 1}
    assert len(mild.bodies) == 6
    (line,) = (tmp_path / "review-00000-of-00001.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == "q2"
    assert json.loads(line)["votes"] == ["incorrect", "incorrect", "correct"]
