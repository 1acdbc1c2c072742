"""The APIs that agents speak, as `Conversations` takes and answers calls: what is read of a request, and how answers are told,
whole or as a stream's events. An answer is streamed in one piece.
"""

import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta, Struct

from asyncrl.episodes.chat import call_of
from asyncrl.episodes.child import MODEL
from asyncrl.episodes.conversations import Answer, Asked, CallRefused, text_of
from asyncrl.episodes.environments import Message

Body = dict[str, Any]  # decoded JSON
Count = Annotated[int, Meta(ge=1)] | None


class Api(NamedTuple):
    read: Callable[[Body], Asked]
    whole: Callable[[Body, Sequence[Answer]], Body]  # of the request, and its answers
    events: Callable[[Body, Sequence[Answer]], Iterator[Body]]


class _Request(Struct):
    """What is read of a request, whichever API it is of."""

    messages: list[Message] = []
    input: str | list[Body] = []
    instructions: str | None = None
    system: str | list[Body] = ""
    tools: list[Body] | None = None
    previous_response_id: str | None = None
    max_tokens: Count = None
    max_completion_tokens: Count = None
    max_output_tokens: Count = None
    n: Count = None


def _function(kind: str, tool: Body, told: Body, parameters: str = "parameters") -> Body:
    """A tool as chat completions have it. kind: the `type` that a function has."""
    if tool.get("type", kind) != kind:
        raise CallRefused(f"tools of type {tool['type']!r} are not served; there are functions")
    shown = {"name": told["name"], "description": told.get("description"), "parameters": told.get(parameters)}
    return {"type": "function", "function": {name: value for name, value in shown.items() if value is not None}}


def _written(arguments: Body | str) -> str:
    """As JSON; a text is what the policy wrote and nobody can read: it goes to the client as it is, as OpenAI's do."""
    return arguments if isinstance(arguments, str) else json.dumps(arguments)


# ------------------------------------------------------------------------------------------- OpenAI's chat completions


def _read_chat(body: Body) -> Asked:
    asked = msgspec.convert(body, _Request)
    tools = [_function("function", tool, tool["function"]) for tool in asked.tools or ()]
    longest = asked.max_completion_tokens or asked.max_tokens
    return Asked(messages=asked.messages, tools=tools, max_tokens=longest, n=asked.n or 1)


def _chat(body: Body, answers: Sequence[Answer]) -> Body:
    choices = [
        {"index": index, "message": _chat_message(answer), "finish_reason": answer.finish_reason, "logprobs": None}
        for index, answer in enumerate(answers)
    ]
    return {**_chat_head("chat.completion", answers), "choices": choices, "usage": _chat_usage(answers)}


def _chat_events(body: Body, answers: Sequence[Answer]) -> Iterator[Body]:
    """Of each answer what it says and calls, then why it ended."""
    head = _chat_head("chat.completion.chunk", answers)
    for index, answer in enumerate(answers):
        delta = _chat_message(answer)
        if "tool_calls" in delta:
            delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(delta["tool_calls"])]
        yield {**head, "choices": [{"index": index, "delta": delta, "finish_reason": None}]}
        yield {**head, "choices": [{"index": index, "delta": {}, "finish_reason": answer.finish_reason}]}
    if (body.get("stream_options") or {}).get("include_usage"):
        yield {**head, "choices": [], "usage": _chat_usage(answers)}


def _chat_head(kind: str, answers: Sequence[Answer]) -> Body:
    return {"id": f"chatcmpl-{answers[0].number}", "object": kind, "created": int(time.time()), "model": MODEL}


def _chat_message(answer: Answer) -> Message:
    """Arguments of calls are JSON text."""
    calls = [
        call_of(call["id"], call["function"]["name"], _written(call["function"]["arguments"]))
        for call in answer.message.get("tool_calls", ())
    ]
    return answer.message | ({"tool_calls": calls} if calls else {})


def _chat_usage(answers: Sequence[Answer]) -> dict[str, int]:
    read, sampled = answers[0].prompt_tokens, sum(answer.tokens for answer in answers)
    return {"prompt_tokens": read, "completion_tokens": sampled, "total_tokens": read + sampled}


# -------------------------------------------------------------------------------------------------- OpenAI's responses


def _read_response(body: Body) -> Asked:
    for name in ("conversation", "background", "prompt"):
        if body.get(name):
            raise CallRefused(f"{name} is not served; send the items, or previous_response_id")
    asked = msgspec.convert(body, _Request)
    return Asked(
        messages=[{"role": "user", "content": asked.input}] if isinstance(asked.input, str) else _from_items(asked.input),
        tools=[_function("function", tool, tool) for tool in asked.tools or ()],
        system=asked.instructions or "",
        follows=(asked.previous_response_id or "").removeprefix("resp_"),
        max_tokens=asked.max_output_tokens,
    )


def _from_items(items: list[Body]) -> list[Message]:
    """An answer's text and calls, which are items of their own here, are one message."""
    messages: list[Message] = []
    for item in items:
        match item.get("type", "message"):
            case "message":
                messages.append({"role": item["role"], "content": text_of(item["content"])})
            case "function_call":
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": ""})
                call = call_of(item["call_id"], item["name"], item["arguments"])
                messages[-1].setdefault("tool_calls", []).append(call)
            case "function_call_output":
                messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": text_of(item["output"])})
            case "reasoning":
                pass
            case other:
                raise CallRefused(f"items of type {other!r} are not taken; there are message, function_call and its output")
    return messages


def _response(body: Body, answers: Sequence[Answer]) -> Body:
    (answer,) = answers
    cut = answer.finish_reason == "length"
    head = {"id": f"resp_{answer.number}", "object": "response", "created_at": int(time.time()), "model": MODEL, "error": None}
    status = {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}} if cut else {"status": "completed"}
    echoed = {name: body.get(name) for name in ("instructions", "max_output_tokens", "previous_response_id", "metadata")}
    said = {"tools": body.get("tools") or [], "tool_choice": "auto", "parallel_tool_calls": True, "output": _to_items(answer)}
    read, sampled = answer.prompt_tokens, answer.tokens
    usage = {"input_tokens": read, "output_tokens": sampled, "total_tokens": read + sampled}
    of_input, of_output = {"cached_tokens": 0, "cache_write_tokens": 0}, {"reasoning_tokens": 0}
    details = {"input_tokens_details": of_input, "output_tokens_details": of_output}
    return {**head, "incomplete_details": None, **status, **echoed, **said, "usage": {**usage, **details}}


def _to_items(answer: Answer) -> list[Body]:
    """A message, unless there are only calls; then each call."""
    calls, text = answer.message.get("tool_calls", ()), answer.message["content"]
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    said = {"id": f"msg_{answer.number}", "type": "message", "status": "completed", "role": "assistant", "content": [part]}
    items: list[Body] = [said] if text or not calls else []
    for call in calls:
        function = {"name": call["function"]["name"], "arguments": _written(call["function"]["arguments"])}
        name = {"id": f"fc_{call['id']}", "call_id": call["id"]}
        items.append({"type": "function_call", "status": "completed", **name, **function})
    return items


def _response_events(body: Body, answers: Sequence[Answer]) -> Iterator[Body]:
    response, numbers = _response(body, answers), itertools.count()

    def event(kind: str, **fields: Any) -> Body:
        return {"type": f"response.{kind}", "sequence_number": next(numbers), **fields}

    begun = {**response, "status": "in_progress", "incomplete_details": None, "output": [], "usage": None}
    yield event("created", response=begun)
    yield event("in_progress", response=begun)
    for index, item in enumerate(response["output"]):
        at = {"item_id": item["id"], "output_index": index}
        empty: Body = {"content": []} if item["type"] == "message" else {"arguments": ""}
        yield event("output_item.added", output_index=index, item={**item, "status": "in_progress", **empty})
        if item["type"] == "message":
            at["content_index"], part = 0, item["content"][0]
            yield event("content_part.added", **at, part={**part, "text": ""})
            yield event("output_text.delta", **at, delta=part["text"], logprobs=[])
            yield event("output_text.done", **at, text=part["text"], logprobs=[])
            yield event("content_part.done", **at, part=part)
        else:
            yield event("function_call_arguments.delta", **at, delta=item["arguments"])
            yield event("function_call_arguments.done", **at, name=item["name"], arguments=item["arguments"])
        yield event("output_item.done", output_index=index, item=item)
    yield event(response["status"], response=response)


# ------------------------------------------------------------------------------------------------ Anthropic's messages

_STOPS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_ERRORS = {401: "authentication_error", 404: "not_found_error", 413: "request_too_large", 500: "api_error"}


def _read_message(body: Body) -> Asked:
    asked = msgspec.convert(body, _Request)
    if asked.messages and asked.messages[-1]["role"] == "assistant":
        raise CallRefused("the last message is the assistant's: the policy can't go on with what it has not sampled")
    return Asked(
        messages=[message for said in asked.messages for message in _from_blocks(said["role"], said["content"])],
        tools=[_function("custom", tool, tool, "input_schema") for tool in asked.tools or ()],
        system=text_of(asked.system),
        max_tokens=asked.max_tokens,
    )


def _from_blocks(role: str, content: str | list[Body]) -> list[Message]:
    """Results of tools, which are blocks of a user's message here, are messages of their own, before what the user says."""
    results: list[Message] = []
    calls, texts = [], []
    for block in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        match block["type"]:
            case "tool_result":
                text = text_of(block.get("content"))
                results.append({"role": "tool", "tool_call_id": block["tool_use_id"], "content": text})
            case "tool_use":
                calls.append(call_of(block["id"], block["name"], block["input"]))
            case "thinking" | "redacted_thinking":
                pass
            case _:
                texts.append(block)
    said = {"role": role, "content": text_of(texts)} | ({"tool_calls": calls} if calls else {})
    return results if results and not texts else [*results, said]


def _anthropic_message(body: Body, answers: Sequence[Answer]) -> Body:
    (answer,) = answers
    calls, text = answer.message.get("tool_calls", ()), answer.message["content"]
    blocks: list[Body] = [{"type": "text", "text": text}] if text or not calls else []
    for call in calls:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        shown = arguments if isinstance(arguments, dict) else {"unreadable": arguments}  # it must be an object
        blocks.append({"type": "tool_use", "id": call["id"], "name": name, "input": shown})
    head = {"id": f"msg_{answer.number}", "type": "message", "role": "assistant", "model": MODEL, "content": blocks}
    usage = {"input_tokens": answer.prompt_tokens, "output_tokens": answer.tokens}
    return {**head, "stop_reason": _STOPS[answer.finish_reason], "stop_sequence": None, "usage": usage}


def _anthropic_events(body: Body, answers: Sequence[Answer]) -> Iterator[Body]:
    message = _anthropic_message(body, answers)
    begun = {**message, "content": [], "stop_reason": None, "usage": {**message["usage"], "output_tokens": 0}}
    yield {"type": "message_start", "message": begun}
    for index, block in enumerate(message["content"]):
        empty: Body = {"input": {}}
        delta = {"type": "input_json_delta", "partial_json": json.dumps(block.get("input"))}
        if block["type"] == "text":
            empty, delta = {"text": ""}, {"type": "text_delta", "text": block["text"]}
        yield {"type": "content_block_start", "index": index, "content_block": block | empty}
        yield {"type": "content_block_delta", "index": index, "delta": delta}
        yield {"type": "content_block_stop", "index": index}
    ended = {"stop_reason": message["stop_reason"], "stop_sequence": None}
    yield {"type": "message_delta", "delta": ended, "usage": {"output_tokens": message["usage"]["output_tokens"]}}
    yield {"type": "message_stop"}


def told_error(path: str, refused: CallRefused) -> Body:
    """As the API has it that is served there."""
    if "/v1/messages" in path:
        kind = _ERRORS.get(refused.status, "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": str(refused)}}
    return {"error": {"message": str(refused), "type": refused.code, "code": refused.code, "param": None}}


CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
APIS = {
    CHAT: Api(_read_chat, _chat, _chat_events),
    "/v1/responses": Api(_read_response, _response, _response_events),
    MESSAGES: Api(_read_message, _anthropic_message, _anthropic_events),
}
