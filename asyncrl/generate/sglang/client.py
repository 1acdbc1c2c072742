"""HTTP to one SGLang server. Every call has a deadline, except `generate`, which lasts as long as tokens do."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, NoReturn, TypeVar

import aiohttp
import msgspec
from msgspec import structs

from asyncrl.errors import ConfigError, Unavailable
from asyncrl.generate.sglang.segments import Chunk, RequestRow
from asyncrl.types import GenerationRequest

T = TypeVar("T")
_EVENT = b"data: "
_DONE = b"[DONE]"
# SGLang says what top-p and top-k kept only for a bounded top_k (its --sampling-mask-max-tokens); top_p alone gets this one.
MAX_TOP_K = 4096


class SGLangClient:
    """Call it only from the engine's event loop. Raises Unavailable, naming the server, when it can't be reached or
    its response makes no sense."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),  # one connection per group in flight
            timeout=aiohttp.ClientTimeout(total=None, connect=30.0),
            headers={"content-type": "application/json"},
        )
        self._chunks = msgspec.json.Decoder(Chunk)
        self._batches = msgspec.json.Decoder(list[Chunk])
        self._waiting: set[asyncio.Timeout] = set()
        self._closed = False
        self._encoder = msgspec.json.Encoder()

    async def close(self) -> None:
        """Whoever waits for the server gets Unavailable. Idempotent."""
        if not self._closed:
            self._closed = True
            for timeout in self._waiting:
                timeout.reschedule(0)
            await self._session.close()

    @asynccontextmanager
    async def _reaching(self, path: str, deadline_s: float | None = None) -> AsyncIterator[None]:
        """Has whatever goes wrong inside raise Unavailable: also its deadline, and `close`, at which aiohttp would wait on."""
        if self._closed:
            raise Unavailable(f"{self.url}{path} can't be reached: its client was closed")
        timeout = asyncio.timeout(deadline_s)
        self._waiting.add(timeout)
        try:
            async with timeout:
                yield
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            what = f": {type(error).__name__}: {error}"
            if timeout.expired():
                what = ": its client was closed" if self._closed else f" did not respond in {deadline_s:g} s"
            raise Unavailable(f"{self.url}{path}{what}") from error
        finally:
            self._waiting.discard(timeout)

    async def get(self, path: str, deadline_s: float) -> Any:
        """The JSON of the response."""
        return await self._call("GET", path, deadline_s)

    async def post(self, path: str, body: dict[str, Any], deadline_s: float) -> Any:
        """The JSON of the response, None if it is none. Raises Unavailable for a status >= 400, or `success: false`."""
        return await self._call("POST", path, deadline_s, self._encoder.encode(body))

    async def _call(self, method: str, path: str, deadline_s: float, data: bytes | None = None) -> Any:
        async with self._reaching(path, deadline_s), self._session.request(method, self.url + path, data=data) as response:
            text = await response.read()
        try:
            decoded = msgspec.json.decode(text) if text else None
        except msgspec.DecodeError:
            decoded = None
        if response.status >= 400 or (isinstance(decoded, dict) and decoded.get("success") is False):
            raise Unavailable(f"{self.url}{path}: status {response.status}: {text.decode(errors='replace')[:500]}")
        return decoded

    async def generate(self, rows: Sequence[RequestRow], *, salt: str | None, stream_interval: int) -> AsyncIterator[Chunk]:
        """Sends rows as one batch and yields the news of them as it comes, each row's last one with its finish reason.

        salt: keeps the server's prefix cache from mixing versions; None where there is no such cache.
        Raises ConfigError for a request that the server refuses; Unavailable if it ends before all rows have.
        """
        parameters = [_sampling(row, stream_interval) for row in rows]
        # What ends before it would be reported comes in one piece, which costs the server and us half as much.
        stream = any(of_row["max_new_tokens"] > stream_interval for of_row in parameters)
        body: dict[str, Any] = {
            "input_ids": [[*row.request.prompt_ids, *row.token_ids] for row in rows],
            "sampling_params": parameters,
            "rid": [request_id(row) for row in rows],
            "return_logprob": True,
            "return_sampling_mask": [row.cut for row in rows],
            "stream": stream,
        }
        if salt is not None:
            body["extra_key"] = [salt] * len(rows)
        async with self._reaching("/generate"):
            response = await self._session.post(f"{self.url}/generate", data=self._encoder.encode(body))
        async with response:
            if response.status >= 400:
                _refused(self.url, response.status, await self._read(response.read))
            if not stream:
                chunks = self._decode(self._batches, await self._read(response.read))
                for index, chunk in enumerate(chunks):
                    yield structs.replace(chunk, index=index)
                return
            rest = b""
            while data := await self._read(response.content.readany):
                *events, rest = (rest + data).split(b"\n\n")
                for event in events:
                    if event == _EVENT + _DONE:
                        return
                    yield self._decode(self._chunks, event.removeprefix(_EVENT))
            raise Unavailable(f"{self.url}/generate ended before all of its requests had")

    async def _read(self, read: Callable[[], Awaitable[bytes]]) -> bytes:
        """Waits for a part of a response, or all of it, as `read` does. Raises Unavailable."""
        async with self._reaching("/generate"):
            return await read()

    def _decode(self, decoder: msgspec.json.Decoder[T], text: bytes) -> T:
        try:
            return decoder.decode(text)
        except msgspec.DecodeError as error:
            if b'"error"' in text:
                _refused(self.url, 400, text)
            raise Unavailable(f"{self.url}/generate sent what asyncrl can't read ({error}): {text[:300]!r}") from error


def check_top_k(request: GenerationRequest) -> ConfigError | None:
    """None, or the error for a request whose logprobs SGLang could not give."""
    if request.sampling.top_k <= MAX_TOP_K:
        return None
    return ConfigError(
        f"request {request.id}: top_k={request.sampling.top_k} > {MAX_TOP_K}: SGLang does not say what mass so many keep, "
        "so its logprobs would be wrong; lower top_k, or turn it off with 0"
    )


def request_id(row: RequestRow) -> str:
    """Names this segment of the row to the server."""
    return f"{row.request.id}#{row.segments}"


def _sampling(row: RequestRow, stream_interval: int) -> dict[str, Any]:
    sampling = row.request.sampling
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or (MAX_TOP_K if row.cut else -1),
        "max_new_tokens": sampling.max_tokens - len(row.token_ids),
        "stop_token_ids": list(sampling.stop_token_ids),
        # Without this, the model's own end of sequence would stop a request that names no stop token.
        "ignore_eos": not sampling.stop_token_ids,
        "stream_interval": stream_interval,
    }


def _refused(url: str, status: int, text: bytes) -> NoReturn:
    """Raises what a /generate that was answered with an error means."""
    what = f"{url}/generate: status {status}: {text.decode(errors='replace')[:500]}"
    raise ConfigError(f"{what}; the request can't be served as it is") if status < 500 else Unavailable(what)
