"""The policy behind the APIs that agents speak: of whatever framework, they are trained by changing their base URL.

    POST /v1/chat/completions, /v1/responses      OpenAI's, with tools and streaming; GET /v1/models
    POST /v1/messages, /v1/messages/count_tokens  Anthropic's, the same

An episode has a key of its own, by which its calls are told: as the API's key, or in the URL, /sessions/KEY/v1/…, for a
framework that drops keys. Keys are never logged.

Sampling is the recipe's: temperature, top_p, tool_choice and the like of a request are counted, and not heeded, for they would
change the policy that is trained; max_tokens may only shrink an answer. A call that a client repeats (its
x-stainless-retry-count) joins the one under way, or is answered as that was. One for which nobody waits any more is given up.
"""

import asyncio
import hashlib
import secrets
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from itertools import chain
from typing import NamedTuple

import msgspec
from aiohttp import web

from asyncrl.episodes.apis import APIS, CHAT, MESSAGES, Body, told_error
from asyncrl.episodes.child import MODEL
from asyncrl.episodes.conversations import Answer, Asked, CallRefused, Conversations

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
BODY_BYTES = 32 << 20
RETURN_S = 10.0  # in which a client that is gone may come back for its call: SDKs do within 8 s
NOT_HEEDED = """temperature top_p top_k stop stop_sequences seed frequency_penalty presence_penalty logit_bias tool_choice
    response_format text thinking reasoning reasoning_effort"""
USUAL = (None, "auto", {"type": "auto"}, {"type": "text"}, {"format": {"type": "text"}})  # values that ask for nothing


class Call:
    """A call under way or answered, and how many connections wait for it."""

    def __init__(self, work: Awaitable[list[Answer]]) -> None:
        self.answers, self.waiting = asyncio.ensure_future(work), 0


class Served(NamedTuple):
    """An episode that is open, and its calls by what was asked, the newest last."""

    conversations: Conversations
    calls: defaultdict[tuple[str, bytes], list[Call]]


class Gateway:
    """Serves the episodes that are open. For one event loop. counts: where it counts what it did not heed."""

    def __init__(self, counts: Counter[str], return_s: float = RETURN_S) -> None:
        self._counts, self._return_s = counts, return_s
        self._open: dict[str, Served] = {}  # by key
        self._mark = secrets.token_urlsafe(6)  # keys of this gateway begin with it
        app = web.Application(client_max_size=BODY_BYTES, middlewares=[_shape_errors])
        for prefix in ("", "/sessions/{key}"):
            for path in APIS:
                app.router.add_post(prefix + path, self._call)
            app.router.add_post(prefix + "/v1/messages/count_tokens", self._count)
            app.router.add_get(prefix + "/v1/models", self._models)
        app.router.add_route("*", "/{path:.*}", self._nothing)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0)

    async def start(self, host: str = "127.0.0.1") -> str:
        """Listens on a free port; returns the base URL."""
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, 0)
        await site.start()
        return f"http://{host}:{self._runner.addresses[0][1]}/v1"

    def open(self, conversations: Conversations) -> str:
        """Begins an episode; returns its key."""
        key = self._mark + secrets.token_urlsafe(24)
        self._open[key] = Served(conversations, defaultdict(list))
        return key

    def close(self, key: str) -> None:
        """Ends an episode: calls under way are given up, later ones refused."""
        if (served := self._open.pop(key, None)) is not None:
            for call in chain.from_iterable(served.calls.values()):
                call.answers.cancel()

    async def stop(self) -> None:
        for key in list(self._open):
            self.close(key)
        await self._runner.cleanup()

    async def _models(self, request: web.Request) -> web.Response:
        self._served(request)
        model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "asyncrl", "type": "model", "display_name": MODEL}
        return _json({"object": "list", "data": [model], "has_more": False})

    async def _nothing(self, request: web.Request) -> web.Response:
        there = f"there are POST {', '.join(APIS)}, GET /v1/models"
        raise CallRefused(f"{request.method} {request.path} is not served; {there}", "not_found", 404)

    def _served(self, request: web.Request) -> Served:
        """The episode that is asked for."""
        bearer = request.headers.get("Authorization", "").removeprefix("Bearer ")
        key = request.match_info.get("key") or request.headers.get("x-api-key") or bearer
        if key in self._open:
            return self._open[key]
        if key.startswith(self._mark):
            raise CallRefused("the episode of this key has ended", "episode_ended", 410)
        raise CallRefused("this key is of no episode of this gateway", "invalid_api_key", 401)

    async def _count(self, request: web.Request) -> web.Response:
        served = self._served(request)
        _, asked = _parsed(MESSAGES, await _body(request))
        return _json({"input_tokens": served.conversations.count(asked)})

    async def _call(self, request: web.Request) -> web.StreamResponse:
        served, path = self._served(request), request.path[request.path.index("/v1/") :]
        written = await _body(request)
        body, asked = _parsed(path, written)
        name = path, hashlib.blake2b(written).digest()
        calls, again = served.calls[name], request.headers.get("x-stainless-retry-count", "0") != "0"
        call = calls[-1] if again and calls else None
        if call is None or call.answers.cancelled():
            ignored = [field for field in NOT_HEEDED.split() if body.get(field) not in USUAL]
            self._counts.update(f"not_heeded/{field}" for field in ignored)
            calls.append(call := Call(served.conversations.complete(asked)))
        answers = await self._answers(call)
        if not body.get("stream"):
            return _json(APIS[path].whole(body, answers))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for event in APIS[path].events(body, answers):
            named = f"event: {event['type']}\n".encode() if "type" in event else b""
            await response.write(named + b"data: " + msgspec.json.encode(event) + b"\n\n")
        if path == CHAT:
            await response.write(b"data: [DONE]\n\n")
        return response

    async def _answers(self, call: Call) -> list[Answer]:
        call.waiting += 1
        try:
            return await asyncio.shield(call.answers)
        except asyncio.CancelledError:
            if call.answers.cancelled():
                raise CallRefused("the episode has ended", "episode_ended", 410) from None
            raise  # the client is gone
        finally:
            call.waiting -= 1
            if not call.waiting and not call.answers.done():
                asyncio.get_running_loop().call_later(self._return_s, self._give_up, call)

    def _give_up(self, call: Call) -> None:
        if not call.waiting and call.answers.cancel():
            self._counts["calls_given_up"] += 1


async def _body(request: web.Request) -> bytes:
    """Raises HTTPRequestEntityTooLarge before it has read more than BODY_BYTES."""
    if (size := request.content_length or 0) > BODY_BYTES:
        raise web.HTTPRequestEntityTooLarge(BODY_BYTES, size)
    return await request.read()


def _parsed(path: str, written: bytes) -> tuple[Body, Asked]:
    try:
        body = msgspec.json.decode(written, type=Body)
        return body, APIS[path].read(body)
    except (msgspec.MsgspecError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CallRefused(f"not a request of {path}: {error!r}") from error


def _json(value: Body, status: int = 200, **headers: str) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), status=status, content_type="application/json", headers=headers)


@web.middleware
async def _shape_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Errors as the API has them that was spoken. None is worth a retry."""
    try:
        return await handler(request)
    except CallRefused as error:
        refused = error
    except web.HTTPRequestEntityTooLarge:
        refused = CallRefused(f"a request may have {BODY_BYTES:,} bytes", "request_too_large", 413)
    except Exception as error:
        refused = CallRefused(f"{type(error).__name__}: {error}", "server_error", 500)
    return _json(told_error(request.path, refused), refused.status, **{"x-should-retry": "false"})
