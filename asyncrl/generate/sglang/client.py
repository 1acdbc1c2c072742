"""HTTP to one SGLang server. Every call has a deadline, except `generate`, which lasts as long as tokens do."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, NoReturn, TypeVar

import aiohttp
import msgspec
from msgspec import structs

from asyncrl.errors import ConfigError, Unavailable
from asyncrl.generate.sglang.segments import RequestRow
from asyncrl.generate.sglang.wire import ANYTHING, BATCH, CHUNK, REFUSAL, Chunk, Unreadable, decode
from asyncrl.rundir import MASK
from asyncrl.types import GenerationRequest

T = TypeVar("T")
_EVENT = b"data: "
_DONE = b"[DONE]"
UNAUTHORIZED = (401, 403)
# SGLang says what top-p and top-k kept only for a bounded top_k (its --sampling-mask-max-tokens); top_p alone gets this one.
MAX_TOP_K = 4096


class SGLangClient:
    """Call it only from the engine's event loop. Raises Unavailable, naming the server, when it can't be reached or
    its response makes no sense.

    key: sent with every request, and masked in every error; empty for a server that asks for none.
    """

    def __init__(self, url: str, key: str = "") -> None:
        self.url, self.key = url.rstrip("/"), key
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),  # one connection per group in flight
            timeout=aiohttp.ClientTimeout(total=None, connect=30.0),
        )
        self._headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
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

    async def get(self, path: str, decoder: msgspec.json.Decoder[T], deadline_s: float) -> T:
        """The response. Raises Unavailable for a status >= 400, or one that the decoder can't read; else as `post`."""
        return self._decode(path, decoder, await self._call("GET", path, deadline_s))

    async def post(self, path: str, body: dict[str, Any], deadline_s: float) -> Any:
        """The JSON of the response, None if it is none. Raises Unavailable for a status >= 400, or `success: false`;
        ConfigError if the server asks for another key."""
        try:
            reply = decode(ANYTHING, text := await self._call("POST", path, deadline_s, self._encoder.encode(body)))
        except Unreadable:
            return None
        if isinstance(reply, dict) and reply.get("success") is False:
            raise Unavailable(f"{self.url}{path}: status 200: {self.shown(text)}")
        return reply

    async def check(self, path: str, deadline_s: float) -> None:
        """A GET whose response says nothing but its status. Raises as `get`."""
        await self._call("GET", path, deadline_s)

    async def _call(self, method: str, path: str, deadline_s: float, data: bytes | None = None) -> bytes:
        async with (
            self._reaching(path, deadline_s),
            self._session.request(method, self.url + path, data=data, headers=self._headers) as response,
        ):
            text = await response.read()
        if response.status in UNAUTHORIZED:
            which = "refuses the key that it was sent" if self.key else "asks for a key"
            raise ConfigError(
                f"{self.url}{path}: status {response.status}: the server {which}, so nothing can be asked of it; set "
                "engine.sglang.api_key_file to a file with the key that the server was started with (--api-key)"
            )
        if response.status >= 400:
            raise Unavailable(f"{self.url}{path}: status {response.status}: {self.shown(text)}")
        return text

    async def takes_anybody(self, path: str, deadline_s: float) -> bool:
        """Whether the server answers a GET that comes without its key."""
        # SGLang decides by the path of an URL that web frameworks used to build from the Host header, too.
        for headers in ({}, {"host": "localhost/health?"}):
            async with self._reaching(path, deadline_s), self._session.get(self.url + path, headers=headers) as response:
                if response.status < 400:
                    return True
        return False

    def shown(self, text: bytes) -> str:
        """The beginning of what the server sent, for an error."""
        return self.masked(text.decode(errors="replace"))[:500]

    def masked(self, text: str) -> str:
        """The text without the key."""
        return text.replace(self.key, MASK) if self.key else text

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
            data = self._encoder.encode(body)
            response = await self._session.post(f"{self.url}/generate", data=data, headers=self._headers)
        unfinished = set(range(len(rows)))
        async with response:
            if response.status >= 400:
                self._refused(response.status, await self._read(response.read))
            async for chunk in self._events(response) if stream else self._batch(response):
                if chunk.index not in unfinished:
                    raise Unavailable(
                        f"{self.url}/generate sent news of its request {chunk.index}, of {len(rows)}, which has ended or "
                        "never was"
                    )
                if chunk.meta_info.finish_reason is not None:
                    unfinished.discard(chunk.index)
                yield chunk
        if unfinished:
            raise Unavailable(f"{self.url}/generate ended before {len(unfinished)} of its {len(rows)} requests had")

    async def _batch(self, response: aiohttp.ClientResponse) -> AsyncIterator[Chunk]:
        chunks = self._news(BATCH, await self._read(response.read))
        for index, chunk in enumerate(chunks):
            yield structs.replace(chunk, index=index)

    async def _events(self, response: aiohttp.ClientResponse) -> AsyncIterator[Chunk]:
        rest = b""
        while data := await self._read(response.content.readany):
            *events, rest = (rest + data).split(b"\n\n")
            for event in events:
                if event == _EVENT + _DONE:
                    return
                yield self._news(CHUNK, event.removeprefix(_EVENT))

    async def _read(self, read: Callable[[], Awaitable[bytes]]) -> bytes:
        """Waits for a part of a response, or all of it, as `read` does. Raises Unavailable."""
        async with self._reaching("/generate"):
            return await read()

    def _news(self, decoder: msgspec.json.Decoder[T], text: bytes) -> T:
        """Raises ConfigError where the server says instead that it can't serve the request."""
        try:
            return self._decode("/generate", decoder, text)
        except Unavailable:
            try:
                decode(REFUSAL, text)
            except Unreadable:
                pass
            else:
                self._refused(400, text)
            raise

    def _decode(self, path: str, decoder: msgspec.json.Decoder[T], text: bytes) -> T:
        try:
            return decode(decoder, text)
        except Unreadable as error:
            raise Unavailable(f"{self.url}{path} sent what asyncrl can't read ({error}): {self.shown(text)!r}") from error

    def _refused(self, status: int, text: bytes) -> NoReturn:
        """Raises what a /generate that was answered with an error means."""
        what = f"{self.url}/generate: status {status}: {self.shown(text)}"
        if status >= 500 or status in UNAUTHORIZED:
            raise Unavailable(what)
        raise ConfigError(f"{what}; the request can't be served as it is")


def check_top_k(request: GenerationRequest) -> ConfigError | None:
    """None, or the error for a request whose logprobs SGLang could not give."""
    if request.sampling.top_k <= MAX_TOP_K:
        return None
    return ConfigError(
        f"request {request.id}: top_k={request.sampling.top_k} > {MAX_TOP_K}: SGLang does not say what mass so many keep, "
        "so its logprobs would be wrong; lower top_k, or turn it off with 0"
    )


def request_id(row: RequestRow) -> str:
    """Names this segment of the row to the server, as nothing was named before: SGLang aborts the requests of a connection that
    has ended by name, two seconds later, and by then the same request may be with it again."""
    return f"{row.request.id}#{row.segments}.{row.nonce}"


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
