"""Faults of an endpoint during a distillation: one line each, nothing lost, no key written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.endpoint import KEY, Server, run
from rlsloth.errors import UserError

pytestmark = pytest.mark.slow

CHOICE = {"message": {"content": "5"}, "finish_reason": "stop"}


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_passing_failure_is_tried_again(server: Server, status: int) -> None:
    server.failures = [status, status]
    run(server)
    assert len(server.requests) == 34


def test_the_key_is_sent_and_written_nowhere(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.key = KEY
    monkeypatch.setenv("MY_KEY", KEY)
    run(server, "--endpoint.key-variable", "MY_KEY")
    assert server.keys == [f"Bearer {KEY}"] * 32
    files = [path for path in Path(".").rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


def test_a_refused_key_is_one_line_without_it(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.key = "another"
    monkeypatch.setenv("MY_KEY", KEY)
    with pytest.raises(UserError, match=r"answers 401.*the key in MY_KEY") as caught:
        run(server, "--endpoint.key-variable", "MY_KEY")
    assert not [i for i in range(len(KEY) - 3) if KEY[i : i + 4] in str(caught.value)]
    with pytest.raises(UserError, match="a request without a key"):
        run(server)
    assert not Path("out").exists()  # a start that is refused leaves nothing


def test_an_unset_key_is_one_line(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(UserError, match=r"variable MY_KEY .* is not set"):
        run(server, "--endpoint.key-variable", "MY_KEY")


def test_an_unreachable_server_is_one_line_at_once(server: Server) -> None:
    with pytest.raises(UserError, match=r"cannot reach http://127.0.0.1:9/v1 .*refused"):
        run(server, "--endpoint.url", "http://127.0.0.1:9/v1")


def test_an_unknown_model_is_one_line(server: Server) -> None:
    with pytest.raises(UserError, match=r"answers 404 .*no such model.*ader; did you mean 'adder'"):
        run(server, "--endpoint.model", "ader")


@pytest.mark.parametrize(
    ("status", "hint"), [(404, "often ends in /v1"), (400, "--endpoint.params")]
)
def test_a_request_that_is_refused_is_not_repeated(server: Server, status: int, hint: str) -> None:
    server.failures = [status] * 99
    with pytest.raises(UserError, match=f"answers {status} .*: .*{hint}") as caught:
        run(server, "--endpoint.parallel", "1")
    assert len(server.requests) == 1
    assert "\n" not in str(caught.value)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ({"choices": []}, "no choices .*an empty list"),
        ({"choices": None}, "no choices .*missing"),
        ({"choices": "x"}, "no choices .*str"),
        ({"choices": [{"text": "old API"}]}, "without a message"),
        ({"usage": None}, r"completion_tokens \(null or missing\)"),
        ({"choices": [{"message": {"content": [1]}}]}, "content is not text"),
        ({"choices": [{"message": {"content": None}}]}, "content null.*--endpoint.model"),
        ({"choices": [{"message": {"reasoning": {"a": 1}}}]}, "content is not text"),
        ({"usage": {"completion_tokens": 1e999}}, r"completion_tokens \(inf\)"),
        ({"usage": {"completion_tokens": 10**9}}, r"completion_tokens \(1000000000\)"),
        ({"usage": {"completion_tokens": -1}}, r"completion_tokens \(-1\)"),
        ({"usage": {"completion_tokens": 2000}}, r"\(2000\), .*max-tokens 512 .*limit-name"),
        ({"usage": {"completion_tokens": 0}}, "bytes of text as usage.completion_tokens 0"),
        ({"choices": [CHOICE | {"message": {"content": "x" * 9000}}]}, "9,000 bytes of text"),
        ({"choices": [CHOICE] * 3}, "3 choices where one was requested"),
        ({"choices": [CHOICE | {"finish_reason": "x" * 10**6}]}, "finish_reason .str"),
        ({"choices": [CHOICE | {"finish_reason": {"a": 1}}]}, "finish_reason .dict"),
        ({"model": "m" * 10**5}, "invalid model .str"),
    ],
)
def test_a_reply_of_another_shape_is_one_line(
    server: Server, reply: dict[str, Any], words: str
) -> None:
    server.replies = reply
    with pytest.raises(UserError, match=words) as caught:
        run(server)
    assert server.url in str(caught.value)
    assert "--endpoint." in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "page", [b"<html>Welcome</html>", b"data: {}\n\n", b"\x1f\x8b\xff", b"[1]", b"[" * 10**5]
)
def test_a_web_page_is_one_line(server: Server, page: bytes) -> None:
    """A wrong URL mostly leads to one."""
    server.page = page
    with pytest.raises(UserError, match=r"not a JSON object: .*often ends in /v1") as caught:
        run(server)
    assert "\n" not in str(caught.value)
    assert not Path("out").exists()


@pytest.mark.parametrize("key", ["sk-abc\nx", "sk\u20ac", "sk abc"])
def test_an_impossible_key_is_not_shown(
    server: Server, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", key)
    with pytest.raises(UserError, match=r"MY_KEY .* holds no API key") as caught:
        run(server, "--endpoint.key-variable", "MY_KEY")
    assert "sk" not in str(caught.value)


def test_a_redirect_is_not_followed(server: Server) -> None:
    server.failures = [302] * 99  # the key would go to another host
    with pytest.raises(UserError, match=r"answers 302 .*redirect.*--endpoint\.url"):
        run(server)
