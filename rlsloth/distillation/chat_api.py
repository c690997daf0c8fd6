"""Requests to an OpenAI-compatible chat API, with retries: POST {url}/chat/completions."""

from __future__ import annotations

import email.utils
import json
import random
import re
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from rlsloth.config.distill import EndpointConfig
from rlsloth.distillation.api_key import ApiKey
from rlsloth.distillation.transport import (
    MAX_BYTES,
    MAX_ERROR_BYTES,
    Response,
    Transport,
    TransportError,
)
from rlsloth.errors import UserError, nearest

FIRST_WAIT = 1.0
"""Seconds before the second try; doubled for each further one."""
LONGEST_WAIT = 120.0
"""Seconds of the longest wait of our own choice."""
LONGEST_RETRY_AFTER = 600.0
"""Seconds of the longest wait that a server may demand; beyond it the run ends."""
MAX_MODELS = 1000
"""Models of the server's list that are read, to name the nearest one."""
CHECK_SECONDS = 60.0
"""Seconds that the list of models may take."""
_RETRIED = {408, 409, 425, 429, *range(500, 600)} - {501, 505}
_KEY_REFUSED = (401, 403)
_OK = 200
_SHOWN = 300
"""Characters of a server's own text that a message repeats."""
_TITLE = re.compile(r"<title[^>]*>(.*?)</title", re.IGNORECASE | re.DOTALL)


class _RefusedError(Exception):
    """A response that is not a usable success."""

    def __init__(self, status: int, text: str, retry_after: float = 0.0) -> None:
        self.status = status
        self.text = text
        self.retry_after = retry_after


class ChatApi:
    """One endpoint. ``complete`` may be called from several threads."""

    def __init__(self, cfg: EndpointConfig) -> None:
        """Raises UserError: the variable with the key is not set, or the URL cannot be used."""
        assert cfg.url is not None
        self._cfg = cfg
        self._url = cfg.url
        self._key = None if cfg.key_variable is None else ApiKey.read(cfg.key_variable)
        self._transport = Transport(cfg.url, {} if self._key is None else self._key.headers())
        self._closed = threading.Event()
        self._models: list[str] = []

    def close(self) -> None:
        """End requests and waits, and close the connections."""
        self._closed.set()
        self._transport.close()

    def check(self) -> None:
        """Request the list of models once, to see whether the server answers and takes the key.

        Not every server has that list, or lists models under the names by which they are called.

        Raises:
            UserError: the server cannot be reached, refuses the key, or is not an API.
        """
        try:
            answer = self._request("GET", "/models", None, min(CHECK_SECONDS, self._cfg.timeout))
        except _RefusedError as refused:
            if refused.status in (_OK, 401):
                raise self._refused(refused, 1) from None
            return
        except TransportError as error:
            raise self._unreachable(error, 1) from None
        listed = answer.get("data")
        if isinstance(listed, list):
            ids = [m.get("id") for m in listed[:MAX_MODELS] if isinstance(m, dict)]
            self._models = [name for name in ids if isinstance(name, str)]

    def complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to a chat completion; broken connections, 429 and 5xx are tried again.

        Raises:
            UserError: the endpoint refuses, keeps failing, or returns something else.
        """
        data = json.dumps(body).encode()
        return self._patiently(
            lambda: self._request("POST", "/chat/completions", data, self._cfg.timeout)
        )

    def _patiently(self, request: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        for tries in range(1, self._cfg.retries + 2):
            last = tries > self._cfg.retries or self._closed.is_set()
            wait = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (tries - 1)) * random.uniform(0.75, 1.25)
            try:
                return request()
            except _RefusedError as refused:
                too_long = refused.retry_after > LONGEST_RETRY_AFTER
                if last or too_long or refused.status not in _RETRIED:
                    raise self._refused(refused, tries) from None
                wait = max(wait, refused.retry_after)
            except TransportError as error:
                if last:
                    raise self._unreachable(error, tries) from None
            self._closed.wait(wait)
        raise AssertionError  # the last try returns or raises

    def _request(
        self, method: str, path: str, data: bytes | None, seconds: float
    ) -> dict[str, Any]:
        response = self._transport.request(method, path, data, seconds)
        text = response.body.decode(errors="replace")
        if not 200 <= response.status < 300:
            place = response.headers.get("Location")
            words = f"a redirect to {place}" if place else _words(text)
            raise _RefusedError(response.status, words, _retry_after(response))
        if not response.complete:
            raise _RefusedError(_OK, f"more than {MAX_BYTES >> 20} MiB")
        answer = _parse(text)
        if self._key is not None and self._key.is_in(_plain(answer)):
            raise _RefusedError(_OK, f"the API key of {self._key.variable}, which is not saved")
        return answer

    def _refused(self, refused: _RefusedError, tries: int) -> UserError:
        text = self._shown(refused.text)
        if refused.status == _OK:
            return UserError(
                f"{self._url} returned {text} in place of a chat completion: check that "
                "--endpoint.url is the base of an OpenAI-compatible API (it often ends in /v1)"
            )
        shown = f" ({text})" if text else ""
        return UserError(
            f"{self._url} answers {refused.status}{shown}: {self._advice(refused, tries)}"
        )

    def _advice(self, refused: _RefusedError, tries: int) -> str:
        """The options to look at after a response of that status."""
        if refused.status in _KEY_REFUSED:
            refuses = f"the key in {self._key.variable}" if self._key else "a request without a key"
            return f"it refuses {refuses}; see --endpoint.key-variable"
        if refused.status == 404:
            name = str(self._cfg.model)
            near = "" if name in self._models else self._shown(nearest(name, self._models))
            return f"check --endpoint.url (it often ends in /v1) and --endpoint.model {name}{near}"
        if 300 <= refused.status < 400:
            return (
                "redirects are not followed, since they could carry the API key to another host; "
                "set --endpoint.url to the final address"
            )
        if refused.retry_after > LONGEST_RETRY_AFTER:
            return (
                f"it demands a pause of {refused.retry_after:,.0f} s; continue with --resume after "
                "that"
            )
        if refused.status in _RETRIED:
            return (
                f"gave up after {_count(tries)}; lower --endpoint.parallel or raise "
                "--endpoint.retries, and continue with --resume"
            )
        return "check the options of the endpoint section, --endpoint.params above all"

    def _unreachable(self, error: TransportError, tries: int) -> UserError:
        return UserError(
            f"cannot reach {self._url} ({self._shown(str(error))}; {_count(tries)}): check "
            "that the server runs and that --endpoint.url is right; a slow one needs a longer "
            "--endpoint.timeout"
        )

    def _shown(self, text: str) -> str:
        """A server's text in one line without the key; masked before it is cut, since a cut could
        leave a fragment too short to be recognised."""
        line = " ".join((text if self._key is None else self._key.mask(text)).split())
        return line if len(line) <= _SHOWN else line[: _SHOWN - 3] + "..."


def _parse(text: str) -> dict[str, Any]:
    """The JSON object of a success; some servers report an error with status 200."""
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise _RefusedError(
            _OK, f"something that is not a JSON object: {_words(text[:MAX_ERROR_BYTES])}"
        )
    if answer.get("error") and "choices" not in answer:
        error = answer["error"]
        code = error.get("code") if isinstance(error, dict) else None
        status = code if isinstance(code, int) and 300 <= code < 600 else _OK
        raise _RefusedError(status, _words(text[:MAX_ERROR_BYTES]))
    return answer


def _plain(answer: dict[str, Any]) -> str:
    """The text of an answer without JSON's escapes."""
    try:
        return json.dumps(answer, ensure_ascii=False)
    except RecursionError:
        raise _RefusedError(_OK, "JSON that is nested too deeply") from None


def _words(text: str) -> str:
    """A server's own account of an error: OpenAI's form, a web page's title, else the text."""
    if text.lstrip()[:1] == "<":
        title = _TITLE.search(text)
        return f"an HTML page titled {title[1].strip()!r}" if title else "an HTML page"
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    for key in ("error", "message", "detail"):
        if isinstance(value, dict) and value.get(key):
            value = value[key]
    return value if isinstance(value, str) else json.dumps(value)


def _retry_after(response: Response) -> float:
    """Seconds that Retry-After demands, as a number or a date; 0 without it."""
    value = response.headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d*)?", value):
        return float(value)
    try:
        date = email.utils.parsedate_to_datetime(value)
    except (ValueError, TypeError):
        return 0.0
    moment = date if date.tzinfo else date.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


def _count(tries: int) -> str:
    return "1 try" if tries == 1 else f"{tries} tries"
