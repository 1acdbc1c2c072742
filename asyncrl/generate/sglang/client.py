"""HTTP to one SGLang server. Every call has a deadline, except `generate`, which lasts as long as tokens do."""

from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any

import aiohttp
import msgspec

from asyncrl.errors import ConfigError, Unavailable
from asyncrl.generate.sglang.chunks import Chunk, Row

_EVENT = b"data: "
_DONE = b"[DONE]"
_FAILURES = (aiohttp.ClientError, TimeoutError, OSError)


class Client:
    """Of the engine's loop only. Raises Unavailable, naming the server, when it can't be reached or answers nonsense."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),  # one connection per group in flight
            timeout=aiohttp.ClientTimeout(total=None, connect=30.0),
            headers={"content-type": "application/json"},
        )
        self._chunks = msgspec.json.Decoder(Chunk)
        self._encoder = msgspec.json.Encoder()

    async def close(self) -> None:
        await self._session.close()

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def get(self, path: str, deadline_s: float) -> Any:
        """The JSON answer."""
        return await self._call("GET", path, None, deadline_s)

    async def post(self, path: str, body: dict[str, Any], deadline_s: float) -> Any:
        """The JSON answer, or None where it is no JSON. Raises Unavailable for a status >= 400, or `success: false`."""
        return await self._call("POST", path, body, deadline_s)

    async def _call(self, method: str, path: str, body: dict[str, Any] | None, deadline_s: float) -> Any:
        data = None if body is None else self._encoder.encode(body)
        timeout = aiohttp.ClientTimeout(total=deadline_s)
        try:
            async with self._session.request(method, self.url + path, data=data, timeout=timeout) as response:
                text = await response.read()
        except TimeoutError as error:
            raise Unavailable(f"{self.url}{path} did not answer in {deadline_s:g} s") from error
        except _FAILURES as error:
            raise Unavailable(f"{self.url}{path}: {type(error).__name__}: {error}") from error
        try:
            answer = msgspec.json.decode(text) if text else None
        except msgspec.DecodeError:
            answer = None
        if response.status >= 400 or (isinstance(answer, dict) and answer.get("success") is False):
            raise Unavailable(f"{self.url}{path}: status {response.status}: {text.decode(errors='replace')[:500]}")
        return answer

    async def generate(self, rows: Sequence[Row], *, salt: str | None, stream_interval: int) -> AsyncIterator[Chunk]:
        """Sends rows as one batch and yields the news of them as it comes, each row's last one with its finish reason.

        salt: keeps the server's prefix cache from mixing versions; None where there is no such cache.
        Raises ConfigError for a request that the server refuses; Unavailable if it ends before all rows have.
        """
        body: dict[str, Any] = {
            "input_ids": [[*row.request.prompt_ids, *row.token_ids] for row in rows],
            "sampling_params": [_sampling(row, stream_interval) for row in rows],
            "rid": [request_id(row) for row in rows],
            "return_logprob": [True] * len(rows),
            "return_sampling_mask": [row.cut for row in rows],
            "stream": True,
        }
        if salt is not None:
            body["extra_key"] = [salt] * len(rows)
        try:
            async with self._session.post(f"{self.url}/generate", data=self._encoder.encode(body)) as response:
                if response.status >= 400:
                    _refused(self.url, response.status, await response.read())
                rest = b""
                async for data in response.content.iter_any():
                    *events, rest = (rest + data).split(b"\n\n")
                    for event in events:
                        if event == _EVENT + _DONE:
                            return
                        yield self._decode(event)
                raise Unavailable(f"{self.url}/generate ended before all of its requests had")
        except _FAILURES as error:
            raise Unavailable(f"{self.url}/generate: {type(error).__name__}: {error}") from error

    def _decode(self, event: bytes) -> Chunk:
        try:
            return self._chunks.decode(event.removeprefix(_EVENT))
        except msgspec.DecodeError as error:
            if b'"error"' in event:
                _refused(self.url, 400, event)
            raise Unavailable(f"{self.url}/generate sent what asyncrl can't read ({error}): {event[:300]!r}") from error


def request_id(row: Row) -> str:
    """Names this segment of the row to the server."""
    return f"{row.request.id}#{row.segments}"


def _sampling(row: Row, stream_interval: int) -> dict[str, Any]:
    sampling = row.request.sampling
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "max_new_tokens": sampling.max_tokens - len(row.token_ids),
        "stop_token_ids": list(sampling.stop_token_ids),
        # Without this, the model's own end of sequence would stop a request that names no stop token.
        "ignore_eos": not sampling.stop_token_ids,
        "stream_interval": stream_interval,
    }


def _refused(url: str, status: int, text: bytes) -> None:
    what = f"{url}/generate: status {status}: {text.decode(errors='replace')[:500]}"
    raise ConfigError(f"{what}; the request can't be served as it is") if status < 500 else Unavailable(what)
