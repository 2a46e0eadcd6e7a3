"""An endpoint that speaks OpenAI's chat completions, as vLLM, SGLang and others serve them."""

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
from typing import Any

from PIL import Image

_LARGEST_REPLY = 1 << 20


class EndpointError(RuntimeError):
    """An endpoint that cannot be asked."""


class ChatEndpoint:
    """Asks a model behind an endpoint, one message at a time; may be used by threads.

    Args:
        url: up to and without ``/chat/completions``, as in "http://127.0.0.1:8000/v1".
        model: the name that the endpoint knows it by.
        key_variable: environment variable with the key to send, or None to send none.
        timeout: seconds for one request.
        attempts: how often to ask when the endpoint is busy, broken or away.
        pause: seconds before the second attempt; each further one waits twice as long.
        temperature: of the sampling.
        max_tokens: of a reply.

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
        timeout: float = 60.0,
        attempts: int = 4,
        pause: float = 1.0,
        temperature: float = 0,
        max_tokens: int = 512,
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
        self._timeout = timeout
        self._attempts = attempts
        self._pause = pause
        self._sampling = {"temperature": temperature, "max_tokens": max_tokens}

    def __call__(self, prompt: str, image: Image.Image | None = None) -> str:
        """What the model replies to one message.

        Args:
            prompt: the message.
            image: a picture to send before it.

        Raises:
            EndpointError: the endpoint refuses the request, or gave no usable reply in all
                attempts.
        """
        content: Any = prompt
        if image is not None:
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            link = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
            picture = {"type": "image_url", "image_url": {"url": link}}
            content = [picture, {"type": "text", "text": prompt}]
        messages = [{"role": "user", "content": content}]
        body = {"model": self.model, "messages": messages, **self._sampling}
        return self._reply(json.dumps(body).encode())

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
                    raise EndpointError(f"{self.url} refuses: {reason}") from error
            except (OSError, http.client.HTTPException) as error:
                reason = str(error) or type(error).__name__
            except (ValueError, LookupError, TypeError) as error:
                reason = f"its reply is no chat completion ({type(error).__name__})"
        raise EndpointError(f"{self.url} does not answer, asked {self._attempts} times: {reason}")

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
