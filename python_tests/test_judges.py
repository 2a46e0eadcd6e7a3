"""Judges, against a small endpoint on this machine that answers what it is told to."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from lookagain_ext.training.distill import distill
from lookagain_ext.training.judges import EndpointJudge, JudgeError, TextJudge, read_verdict
from lookagain_ext.training.records import Record

RECORD = Record("q", "How many $circles?", "3", Image.new("RGB", (4, 4)))
MOST_REQUESTS = 100


class Endpoint(ThreadingHTTPServer):
    """Gives the replies in turn, the last one for ever: a status, a text, or a function."""

    daemon_threads = True

    def __init__(self, *replies) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies = list(replies)
        self.bodies, self.headers, self.paths = [], [], []
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def next_reply(self, body, headers, path):
        with self.lock:
            self.bodies.append(body)
            self.headers.append(headers)
            self.paths.append(path)
            if len(self.bodies) > MOST_REQUESTS:
                return 404
            return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]


class Handler(BaseHTTPRequestHandler):
    timeout = 10

    def do_POST(self):
        length = int(self.headers["Content-Length"])
        body = json.loads(self.rfile.read(length))
        reply = self.server.next_reply(body, dict(self.headers), self.path)
        if callable(reply):
            reply = reply(body)
        if isinstance(reply, int):
            self.send_response(reply)
            self.end_headers()
            return
        raw = reply if isinstance(reply, bytes) else chat(reply)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *args):
        pass


def chat(text: str) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


@pytest.fixture
def endpoint():
    """Starts endpoints; all are closed at the end."""
    started = []

    def start(*replies) -> Endpoint:
        server = Endpoint(*replies)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        started.append(server)
        return server

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


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
