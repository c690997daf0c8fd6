"""The client of a chat API against servers that are slow, large, broken or indiscreet."""

from __future__ import annotations

import base64
import email.utils
import json
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from helpers.scripted_server import (
    GOOD,
    KEY,
    Answer,
    Scripted,
    closing,
    cut,
    dripping,
    dripping_headers,
    endless,
    good,
    refusal,
    silent,
)
from rlsloth.config.distill import EndpointConfig
from rlsloth.distillation import chat_api, transport
from rlsloth.distillation.api_key import ApiKey
from rlsloth.distillation.chat_api import ChatApi
from rlsloth.errors import UserError

pytestmark = pytest.mark.slow


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripted]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("MY_KEY", KEY)
    monkeypatch.setattr(chat_api, "FIRST_WAIT", 0.01)
    with Scripted() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def complete(server: Scripted, **cfg: Any) -> dict[str, Any]:
    usual = {"url": server.url, "model": "m", "key_variable": "MY_KEY", "retries": 0}
    api = ChatApi(EndpointConfig(**usual | cfg))
    try:
        return api.complete({"messages": []})
    finally:
        api.close()


def error_of(server: Scripted, *answers: Answer, **cfg: Any) -> str:
    server.answers = list(answers)
    with pytest.raises(UserError) as caught:
        complete(server, **cfg)
    text = str(caught.value)
    assert "\n" not in text
    assert "--endpoint." in text or "--resume" in text
    assert not [i for i in range(len(KEY) - 3) if KEY[i : i + 4].lower() in text.lower()], text
    return text


@pytest.mark.parametrize("slow", [dripping, dripping_headers, silent])
def test_a_request_has_a_deadline_in_all(server: Scripted, slow: Answer) -> None:
    start = time.monotonic()
    text = error_of(server, slow, timeout=0.4, retries=1)
    assert time.monotonic() - start < 3
    assert server.count == 2
    for fact in (server.url, "0.4 s", "2 tries", "--endpoint.timeout"):
        assert fact in text


def test_a_response_has_a_largest_size(server: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "MAX_BYTES", 2**20)
    text = error_of(server, endless, retries=3)
    assert "MiB" in text
    assert server.count == 1


def test_a_large_error_page_is_not_read_whole(server: Scripted) -> None:
    text = error_of(server, refusal(400, b"no! " * 10**6))
    assert "answers 400" in text
    assert len(text) < 600


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504, 529])
def test_passing_failures_are_tried_again(server: Scripted, status: int) -> None:
    server.answers = [refusal(status), closing, cut, good]
    assert complete(server, retries=3) == GOOD
    assert server.count == 4


def test_retry_after_is_honoured(server: Scripted) -> None:
    server.answers = [refusal(429, Retry_After="1"), good]
    start = time.monotonic()
    assert complete(server, retries=1) == GOOD
    assert time.monotonic() - start >= 1
    later = email.utils.formatdate(time.time() + 2.5, usegmt=True)
    server.answers = [refusal(503, Retry_After=later), good]
    start = time.monotonic()
    assert complete(server, retries=1) == GOOD
    assert time.monotonic() - start >= 1  # a date has whole seconds


def test_a_pause_of_hours_ends_the_run(server: Scripted) -> None:
    text = error_of(server, refusal(429, Retry_After="7200"), retries=5)
    assert "7,200 s" in text
    assert server.count == 1


@pytest.mark.parametrize("value", ["soon", "-5", "nan", "inf", "", "Thu, 99 Foo"])
def test_a_strange_retry_after_counts_for_nothing(server: Scripted, value: str) -> None:
    server.answers = [refusal(429, Retry_After=value), good]
    assert complete(server, retries=1) == GOOD


def test_a_redirect_carries_the_key_nowhere(server: Scripted) -> None:
    with Scripted() as other:
        threading.Thread(target=other.serve_forever, args=(0.01,), daemon=True).start()
        for status in (301, 302, 303, 307, 308):
            text = error_of(server, refusal(status, Location=f"{other.url}/x"))
            assert f"answers {status}" in text
            assert other.url in text  # the address to set
        other.shutdown()
        assert not other.keys


@pytest.mark.parametrize(
    "body",
    [
        f"key {KEY} refused",
        f"Bearer {KEY}",
        f"Incorrect API key provided: {KEY[:8]}****{KEY[-4:]}",
        f"KEY {KEY.upper()}",
        json.dumps({"error": {"message": f"bad {KEY}"}}),
        json.dumps({"error": {"message": f"bad {KEY}"}}).replace("/", "\\/"),
        json.dumps({"error": "".join(f"\\u{ord(c):04x}" for c in KEY)}).replace("\\\\", "\\"),
        f"<html><title>{KEY}</title>{KEY}</html>",
        "x" * 290 + KEY,
    ],
)
@pytest.mark.parametrize("status", [200, 400, 401, 404, 500])
def test_an_echoed_key_is_masked(server: Scripted, body: str, status: int) -> None:
    text = error_of(server, refusal(status, body.encode()))
    assert server.url in text


def test_an_echoed_key_in_other_places_is_masked(server: Scripted) -> None:
    error_of(server, refusal(302, Location=f"http://x/?key={KEY}"))
    echo = json.dumps({"choices": [], "echo": KEY})
    for body in (echo, echo.replace("/", "\\/")):
        text = error_of(server, refusal(200, body.encode()))
        assert "MY_KEY" in text  # a reply with the key would be saved with it
    assert server.keys == [f"Bearer {KEY}"] * 3


@pytest.mark.parametrize(
    ("body", "fact"),
    [
        (b"", "not a JSON object"),
        (b"[1]", "not a JSON object"),
        (b"\xff\xfe", "not a JSON object"),
        (b"[" * 10**5, "not a JSON object"),
        (b"data: {}\n\ndata: [DONE]", "not a JSON object"),
        (b"<!doctype html>\n<title>\nWelcome to nginx\n</title>", "titled 'Welcome to nginx'"),
        (b'{"error": {"message": "no credit", "code": "x"}}', "no credit"),
        (b'{"error": {"message": "no credit", "code": 402}}', "answers 402 .*no credit"),
    ],
)
def test_other_contents_are_named_and_not_retried(server: Scripted, body: bytes, fact: str) -> None:
    text = error_of(server, refusal(200, body), retries=3)
    assert re.search(fact, text)
    assert server.url in text
    assert server.count == 1


def test_a_proxy_of_the_environment_is_used(
    server: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("HTTP_PROXY", server.url.removesuffix("/v1"))
    monkeypatch.setenv("http_proxy", server.url.removesuffix("/v1"))
    assert complete(server, url="http://nowhere.invalid/v1") == GOOD
    monkeypatch.setenv("HTTP_PROXY", "ftp://user:password@x")
    monkeypatch.setenv("http_proxy", "ftp://user:password@x")
    with pytest.raises(UserError, match="HTTP_PROXY") as caught:
        complete(server)
    assert "password" not in str(caught.value)


def test_an_unreachable_server_is_named_with_the_reason(server: Scripted) -> None:
    assert "refused" in error_of(server, good, url="http://127.0.0.1:9/v1")
    with pytest.raises(UserError, match=r"cannot reach http://nowhere\.invalid"):
        complete(server, url="http://nowhere.invalid")
    with pytest.raises(UserError, match=r"--endpoint\.url http://127\.0\.0\.1:99999"):
        complete(server, url="http://127.0.0.1:99999")


def test_close_ends_requests_in_progress(server: Scripted) -> None:
    server.answers = [silent]
    api = ChatApi(EndpointConfig(url=server.url, model="m"))
    ended: list[BaseException] = []

    def work() -> None:
        try:
            api.complete({})
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while not server.count:
        time.sleep(0.01)
    start = time.monotonic()
    api.close()
    api.close()
    thread.join(5)
    assert ended
    assert time.monotonic() - start < 5


def test_requests_share_connections_between_threads(server: Scripted) -> None:
    api = ChatApi(EndpointConfig(url=server.url, model="m"))
    answers: list[dict[str, Any]] = []
    threads = [threading.Thread(target=lambda: answers.append(api.complete({}))) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    api.close()
    assert answers == [GOOD] * 32


@pytest.mark.parametrize("key", ["a", "abc", "EMPTY", KEY])
def test_masking_leaves_other_text(key: str) -> None:
    secret = ApiKey(key, "K")
    assert secret.mask(f"<{key}>") == "<***>"
    assert secret.mask("") == ""
    assert secret.mask("12") == "12"
    assert repr(secret) == "***"
    assert not secret.is_in("EMPTY abc sk-proj- a")


def test_long_parts_of_the_key_are_found() -> None:
    secret = ApiKey(base64.b64encode(bytes(range(60))).decode(), "K")
    whole = base64.b64encode(bytes(range(60))).decode()
    assert secret.is_in(f"..{whole}..")
    assert secret.is_in(f"..{whole[5:40]}..")
    assert not secret.is_in(whole[:8])
