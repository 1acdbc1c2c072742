"""OpenAI's chat API before the policy: an agent, of whatever framework, is trained by changing its base URL.

POST /v1/chat/completions (tools, streaming), GET /v1/models. An episode has a key of its own, by which its calls are told.

Sampling is the recipe's: temperature, top_p, stop and the like of a request are not heeded, for they would change the policy
that is trained; max_tokens may only shrink an answer. A call that a client repeats (its x-stainless-retry-count) joins the
one under way, or is answered as that was.
"""

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

from aiohttp import web

from asyncrl.episodes.child import MODEL
from asyncrl.episodes.conversations import Answer, CallRefused, Conversations

BODY_BYTES = 32 << 20


class Gateway:
    """Serves the episodes that are open. For one event loop."""

    def __init__(self) -> None:
        self._open: dict[str, Conversations] = {}  # by key
        self._calls: dict[tuple[str, bytes], asyncio.Task[Answer]] = {}
        app = web.Application(client_max_size=BODY_BYTES)
        app.add_routes([web.post("/v1/chat/completions", self._chat), web.get("/v1/models", self._models)])
        self._runner = web.AppRunner(app, access_log=None)

    async def start(self, host: str = "127.0.0.1") -> str:
        """Listens on a free port; returns the base URL."""
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, 0)
        await site.start()
        return f"http://{host}:{self._runner.addresses[0][1]}/v1"

    def open(self, key: str, conversations: Conversations) -> None:
        self._open[key] = conversations

    def close(self, key: str) -> None:
        """Ends an episode: calls under way are dropped, later ones refused."""
        self._open.pop(key, None)
        for name in [name for name in self._calls if name[0] == key]:
            self._calls.pop(name).cancel()

    async def stop(self) -> None:
        for key in list(self._open):
            self.close(key)
        await self._runner.cleanup()

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "asyncrl"}]})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        key = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if key not in self._open:
            return _error(410, "this key is of no episode that is under way", "episode_ended")
        body = await request.read()
        try:
            asked = json.loads(body)
            answer = await self._answer(key, body, asked, again=request.headers.get("x-stainless-retry-count", "0") != "0")
        except CallRefused as error:
            return _error(400, str(error), error.code)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return _error(400, f"not a chat completion's request: {error!r}", "invalid_request_error")
        except asyncio.CancelledError:
            return _error(410, "the episode has ended", "episode_ended")
        if not asked.get("stream"):
            return web.json_response(_completion(answer))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for chunk in _chunks(answer, (asked.get("stream_options") or {}).get("include_usage", False)):
            await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _answer(self, key: str, body: bytes, asked: dict[str, Any], again: bool) -> Answer:
        task = self._calls.get((key, body)) if again else None
        if task is None:
            longest = asked.get("max_completion_tokens") or asked.get("max_tokens") or sys.maxsize
            if asked.get("n", 1) != 1:
                raise CallRefused("n != 1: an episode goes on with one answer; ask again for another")
            call = self._open[key].complete(asked["messages"], asked.get("tools") or (), longest)
            self._calls[key, body] = task = asyncio.ensure_future(call)
        return await asyncio.shield(task)  # a client that is gone may come back for it


def _error(status: int, text: str, code: str) -> web.Response:
    return web.json_response({"error": {"message": text, "type": code, "code": code, "param": None}}, status=status)


def _message(answer: Answer) -> dict[str, Any]:
    """As OpenAI's API has it: arguments as JSON text."""
    message = dict(answer.message)
    if "tool_calls" in message:
        message["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
            for call in message["tool_calls"]
        ]
    return message


def _usage(answer: Answer) -> dict[str, int]:
    total = answer.prompt_tokens + answer.tokens
    return {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.tokens, "total_tokens": total}


def _completion(answer: Answer) -> dict[str, Any]:
    choice = {"index": 0, "message": _message(answer), "finish_reason": answer.finish_reason, "logprobs": None}
    head = {"id": "chatcmpl-0", "object": "chat.completion", "created": int(time.time()), "model": MODEL}
    return {**head, "choices": [choice], "usage": _usage(answer)}


def _chunks(answer: Answer, with_usage: bool) -> Iterator[dict[str, Any]]:
    """A whole answer as a stream: the role, what it says, its calls, why it ended."""
    head = {"id": "chatcmpl-0", "object": "chat.completion.chunk", "created": int(time.time()), "model": MODEL}
    message = _message(answer)
    calls = [{"index": index, **call} for index, call in enumerate(message.get("tool_calls", ()))]
    deltas = [{"role": "assistant", "content": ""}, {"content": message["content"]}]
    deltas += [{"tool_calls": calls}] if calls else []
    for delta in deltas:
        yield {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    yield {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": answer.finish_reason}]}
    if with_usage:
        yield {**head, "choices": [], "usage": _usage(answer)}
