"""HTTP requests with a deadline and a limit on the size of a response.

httpx's timeouts are for one operation each, so a server that sends a byte now and then could hold a
request forever. Here requests run on an event loop of their own, where a deadline ends them
whatever they are doing. Proxies and certificates come from the environment, as httpx reads it
(HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY, SSL_CERT_FILE). Redirects are not followed: one would
send the API key to another host.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx

from rlsloth.errors import UserError, first_line

MAX_BYTES = 64 * 2**20
"""Bytes of the longest response."""
MAX_ERROR_BYTES = 64 * 2**10
"""Bytes that are read of a response that is not a success."""
CONNECT_SECONDS = 30.0
CLOSE_SECONDS = 5.0


class TransportError(Exception):
    """No complete response arrived; its text is the reason."""


@dataclass(frozen=True, slots=True)
class Response:
    """A response as it came."""

    status: int
    headers: httpx.Headers
    body: bytes
    complete: bool
    """False: the body is longer than the limit, and only its beginning was read."""


class Transport:
    """A pool of connections to one base URL; ``request`` may be called from several threads."""

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        """Raises UserError: the URL, or a proxy of the environment, cannot be used."""
        try:
            httpx.URL(url)
            _ = urlsplit(url).port  # raises where httpx would only when it connects
        except (httpx.InvalidURL, ValueError) as error:
            raise UserError(f"--endpoint.url {url} is not a URL: {first_line(error)}") from None
        try:
            self._client = httpx.AsyncClient(
                headers={"User-Agent": "rlsloth", "Accept-Encoding": "identity", **headers},
                timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
                limits=httpx.Limits(max_connections=None),
                follow_redirects=False,
                trust_env=True,
            )
        except (httpx.InvalidURL, ImportError, ValueError, OSError) as error:
            raise UserError(
                "a proxy or certificate file of the environment (HTTP_PROXY, HTTPS_PROXY, "
                f"ALL_PROXY, SSL_CERT_FILE) cannot be used: {first_line(error)}"
            ) from None
        self._url = url
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="http", daemon=True)
        self._thread.start()

    def request(self, method: str, path: str, data: bytes | None, seconds: float) -> Response:
        """Send a request and read the response, all within ``seconds``.

        Raises:
            TransportError: no connection, a broken one, or too slow.
            CancelledError, RuntimeError: the transport was closed.
        """
        sent = self._send(method, path, data, seconds)
        try:
            job = asyncio.run_coroutine_threadsafe(sent, self._loop)
        except RuntimeError:  # the loop is closed
            sent.close()
            raise
        return job.result()

    async def _send(self, method: str, path: str, data: bytes | None, seconds: float) -> Response:
        headers = {} if data is None else {"Content-Type": "application/json"}
        try:
            async with (
                asyncio.timeout(seconds),
                self._client.stream(
                    method, self._url + path, content=data, headers=headers
                ) as response,
            ):
                limit = MAX_BYTES if response.is_success else MAX_ERROR_BYTES
                body, complete = await _read(response, limit)
                return Response(response.status_code, response.headers, body, complete)
        except TimeoutError:
            raise TransportError(f"no complete response within {seconds:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            raise TransportError(_reason(error)) from None

    def close(self) -> None:
        """End all requests and close the connections."""
        if self._loop.is_closed():
            return
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(self._cancel(), self._loop).result(CLOSE_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _cancel(self) -> None:
        requests = asyncio.all_tasks() - {asyncio.current_task()}
        for request in requests:
            request.cancel()
        await asyncio.gather(*requests, return_exceptions=True)
        await self._client.aclose()


async def _read(response: httpx.Response, limit: int) -> tuple[bytes, bool]:
    """The body up to ``limit`` bytes, and whether that is all of it."""
    body = bytearray()
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > limit:
            return bytes(body[:limit]), False
    return bytes(body), True


def _reason(error: BaseException) -> str:
    """The operating system's words for a failure where it has any, else the exception's."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, BaseExceptionGroup):
            cause = cause.exceptions[0]
        number = cause.errno if isinstance(cause, OSError) else None
        if number is not None and number in errno.errorcode:
            return os.strerror(number)  # asyncio puts words of its own into strerror
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, httpx.ConnectTimeout):
        return f"no connection within {CONNECT_SECONDS:g} s"
    return first_line(error)
