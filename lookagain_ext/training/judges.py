"""Judges of answers: any function of a record and an answer, a model, or an endpoint."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from .prompts import fill
from .records import Record

VERDICTS: tuple[str, ...] = ("correct", "incorrect", "unsure")
Judge = Callable[[Record, str], str]
"""Takes a record and an answer to its question, gives one of ``VERDICTS``."""
_VERDICT = re.compile(r"\b(?:(not\s+correct|incorrect)|correct)\b", re.IGNORECASE)
_LARGEST_REPLY = 1 << 20


class JudgeError(RuntimeError):
    """A judge that cannot be asked; its answers so far are kept."""


def read_verdict(text: str) -> str:
    """The last verdict in what a judge wrote; "unsure" when there is none."""
    verdicts = list(_VERDICT.finditer(text))
    if not verdicts:
        return "unsure"
    return "incorrect" if verdicts[-1].group(1) else "correct"


class TextJudge:
    """A judge made of a function from prompt to text, a local model for example.

    Args:
        ask: gets the prompt in ``prompts/judge.txt``, filled in.
    """

    def __init__(self, ask: Callable[[str], str]) -> None:
        self._ask = ask

    def __call__(self, record: Record, answer: str) -> str:
        """One of ``VERDICTS``."""
        return read_verdict(self._ask(_prompt(record, answer)))


class EndpointJudge:
    """A judge behind an endpoint that speaks OpenAI's chat completions; may be used by threads.

    Args:
        url: up to and without ``/chat/completions``, as in "http://127.0.0.1:8000/v1".
        model: the name that the endpoint knows it by.
        key_variable: environment variable with the key to send, or None to send none.
        show_image: whether the judge is sent the picture.
        timeout: seconds for one request.
        attempts: how often to ask when the endpoint is busy, broken or away.
        pause: seconds before the second attempt; each further one waits twice as long.

    Raises:
        ValueError: the URL is none of http or https, the variable is not set, or a number is out
            of range.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key_variable: str | None = None,
        show_image: bool = False,
        timeout: float = 60.0,
        attempts: int = 4,
        pause: float = 1.0,
    ) -> None:
        if not re.match(r"https?://[^/]", url):
            raise ValueError(f"url must begin with http:// or https://, got {url!r}")
        if timeout <= 0 or attempts < 1 or pause < 0:
            raise ValueError(
                "timeout must be above 0, attempts at least 1 and pause at least 0, "
                f"got {timeout}, {attempts} and {pause}"
            )
        if key_variable is not None and not os.environ.get(key_variable):
            raise ValueError(f"the environment variable {key_variable} is not set")
        self.url = url.rstrip("/")
        self.model = model
        self._key_variable = key_variable
        self._show_image = show_image
        self._timeout = timeout
        self._attempts = attempts
        self._pause = pause

    def __call__(self, record: Record, answer: str) -> str:
        """One of ``VERDICTS``.

        Raises:
            JudgeError: the endpoint refuses the request, or gave no usable reply in all attempts.
        """
        content: Any = _prompt(record, answer)
        if self._show_image:
            buffer = io.BytesIO()
            record.image.save(buffer, "PNG")
            link = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
            picture = {"type": "image_url", "image_url": {"url": link}}
            content = [picture, {"type": "text", "text": content}]
        messages = [{"role": "user", "content": content}]
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": 512}
        return read_verdict(self._reply(json.dumps(body).encode()))

    def _reply(self, body: bytes) -> str:
        reason = ""
        for attempt in range(self._attempts):
            if attempt:
                time.sleep(self._pause * 2 ** (attempt - 1))
            try:
                return self._post(body)
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code} {error.reason}"
                if error.code < 500 and error.code not in (408, 409, 429):
                    raise JudgeError(f"{self.url} refuses: {reason}") from error
            except (OSError, http.client.HTTPException) as error:
                reason = str(error) or type(error).__name__
            except (ValueError, LookupError, TypeError) as error:
                reason = f"its reply is no chat completion ({type(error).__name__})"
        raise JudgeError(f"{self.url} does not answer, asked {self._attempts} times: {reason}")

    def _post(self, body: bytes) -> str:
        headers = {"Content-Type": "application/json"}
        if self._key_variable is not None:
            headers["Authorization"] = f"Bearer {os.environ[self._key_variable]}"
        address = f"{self.url}/chat/completions"
        request = urllib.request.Request(address, data=body, headers=headers)
        with urllib.request.urlopen(request, timeout=self._timeout) as response:
            reply = json.loads(response.read(_LARGEST_REPLY))
        content = reply["choices"][0]["message"]["content"]
        if not isinstance(content, str):
            raise TypeError("content must be a string")
        return content


def _prompt(record: Record, answer: str) -> str:
    return fill("judge", question=record.question, answer=record.answer, response=answer)
