"""A small chat endpoint on this machine that answers what it is told to."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

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
