"""Requests to an OpenAI-compatible chat API: POST {url}/chat/completions, with patience.

The standard library's client: the ones that other packages bring along change with their versions.
"""

from __future__ import annotations

import email.message
import http.client
import json
import os
import random
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

from rlsloth.config.distill import EndpointConfig
from rlsloth.errors import UserError, nearest

FIRST_WAIT = 1.0
"""Seconds before the second try; doubled each time."""
LONGEST_WAIT = 120.0
_RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_KEY_REFUSED = (401, 403)
_SHOWN = 300
"""Characters of a server's words that an error repeats."""


class _StatusError(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, words: str, wait: float = 0.0) -> None:
        self.status = status
        self.words = words
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Following one would send the key to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


class ChatApi:
    """One endpoint. ``complete`` may be called from several threads."""

    def __init__(self, cfg: EndpointConfig) -> None:
        """Raises UserError: the variable with the key is not set."""
        assert cfg.url is not None
        self._cfg = cfg
        self._url = cfg.url
        self._key = _key(cfg.key_variable)
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._closed = threading.Event()
        self._models: list[str] = []

    def close(self) -> None:
        """Let nobody try again."""
        self._closed.set()

    def check(self) -> None:
        """Ask for the list of models once: is the server there, and does it take the key? Not every
        server has the list, or calls models there as it lets them be called. Raises UserError."""
        try:
            listed = self._send("/models", None).get("data")
        except _StatusError as refused:
            if refused.status in (200, 401):
                raise self._error(refused) from None
            return
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from None
        if isinstance(listed, list):
            self._models = [str(m["id"]) for m in listed if isinstance(m, dict) and "id" in m]

    def complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The reply to a chat completion; broken connections, 429 and 5xx are tried again.

        Raises:
            UserError: the endpoint refuses, or keeps failing.
        """
        return self._patiently(lambda: self._send("/chat/completions", body))

    def _patiently(self, ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        for attempt in range(self._cfg.retries + 1):
            last = attempt == self._cfg.retries or self._closed.is_set()
            wait = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.75, 1.25)
            try:
                return ask()
            except _StatusError as refused:
                if last or refused.status not in _RETRIED:
                    raise self._error(refused, attempt + 1) from None
                wait = max(wait, min(refused.wait, LONGEST_WAIT))
            except (OSError, http.client.HTTPException) as error:
                if last:
                    raise self._unreachable(error) from None
            self._closed.wait(wait)
        raise AssertionError  # the last attempt returns or raises

    def _send(self, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "User-Agent": "rlsloth"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, headers)
        try:
            with self._opener.open(request, timeout=self._cfg.timeout) as reply:
                text = reply.read()
        except urllib.error.HTTPError as error:
            with error:
                raise _StatusError(error.code, _words(error.read()), _wait(error.headers)) from None
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            shown = _short(text.decode(errors="replace"))
            raise _StatusError(200, f"something that is not a JSON object: {shown}")
        if "error" in answer and "choices" not in answer:  # some proxies say 200 to everything
            code = answer["error"].get("code") if isinstance(answer["error"], dict) else None
            raise _StatusError(code if isinstance(code, int) else 200, _words(text))
        return answer

    def _error(self, refused: _StatusError, tries: int = 1) -> UserError:
        words = refused.words
        if self._key is not None:
            words = words.replace(self._key, "***")
        if refused.status in _KEY_REFUSED:
            variable = self._cfg.key_variable
            named = f"the key in {variable}" if variable else "a request without a key"
            advice = f"it refuses {named}: see --endpoint.key-variable"
        elif refused.status == 200:
            advice = "is --endpoint.url the base of an API (its end is often /v1), without streams?"
        elif refused.status == 404:
            name = str(self._cfg.model)
            near = "" if name in self._models else nearest(name, self._models)
            advice = f"see --endpoint.url (its end is often /v1) and --endpoint.model {name}{near}"
        elif refused.status in _RETRIED:
            advice = (
                f"{tries} times; wait, lower --endpoint.parallel or raise --endpoint.retries; "
                "--resume goes on from here"
            )
        else:
            advice = "see the endpoint section"
        said = f" ({words})" if words else ""
        return UserError(f"{self._url} answers {refused.status}{said}: {advice}")

    def _unreachable(self, error: Exception) -> UserError:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        text = _short(str(reason)) or type(error).__name__
        return UserError(f"cannot reach {self._url} ({text}): is the server up, and the URL right?")


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(
            f"the environment variable {variable} (--endpoint.key-variable) is not set: put the "
            "API key into it"
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(
            f"the environment variable {variable} (--endpoint.key-variable) holds what is no key: "
            "a space, a line break or a character beyond ASCII"
        )
    return key


def _words(body: bytes) -> str:
    """What a server says of an error: OpenAI's form, else the text."""
    text = body.decode(errors="replace")
    try:
        value = json.loads(text)
    except ValueError:
        return _short(text)
    for key in ("error", "message", "detail"):
        if isinstance(value, dict) and value.get(key):
            value = value[key]
    return _short(value if isinstance(value, str) else json.dumps(value))


def _wait(headers: email.message.Message) -> float:
    """Seconds in Retry-After; 0 without, or for a date."""
    try:
        return float(headers.get("Retry-After") or 0.0)
    except ValueError:
        return 0.0


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else line[: _SHOWN - 3] + "..."
