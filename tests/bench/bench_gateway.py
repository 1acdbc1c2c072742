"""What a call of an agent costs beside the generation: gateway, chat template and session, with an engine that answers at once.

    python tests/bench/bench_gateway.py [--calls 1000]

Milliseconds per call, one after the other and 64 side by side, each an episode of its own of 10 calls: wall clock, CPU of the
gateway's process, and CPU of the client's: the openai SDK, or a bare aiohttp session.
"""

import argparse
import asyncio
import importlib.util
import multiprocessing
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from asyncrl.episodes.chat import TemplateChat
from asyncrl.episodes.conversations import Conversations
from asyncrl.episodes.gateway import Gateway
from asyncrl.episodes.session import Budget, Session
from asyncrl.types import Generation, GenerationRequest, Sampling, Span, Version

TURNS, SIDE_BY_SIDE = 10, 64
SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=4, stop_token_ids=(1,))
WIDE = Budget(tokens=1 << 30, turn_tokens=4, context=1 << 30)
Ask = Callable[[str, list[Any]], Awaitable[Any]]  # key, messages -> the answer's message


def serve(pipe: Any) -> None:
    """A gateway: answers each `open` with a key, `close` with nothing, `cpu` with the seconds that it took so far."""
    path = Path(__file__).parents[2] / "recipes" / "pointers.py"
    spec = importlib.util.spec_from_file_location("pointers", path)
    assert spec is not None
    assert spec.loader is not None
    pointers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pointers)
    tokenizer = pointers.make_tokenizer()
    chat = TemplateChat(tokenizer, (1,))
    answer = [*tokenizer.encode("call b", add_special_tokens=False), 1]

    async def generate(request: GenerationRequest) -> Generation:
        spans = (Span(Version(1, 0), len(answer)),)
        return Generation(
            id=request.id,
            token_ids=answer,
            logprobs=[-1.0] * len(answer),
            kept_logmass=None,
            spans=spans,
            finish_reason="stop",
        )

    async def run() -> None:
        gateway = Gateway(Counter())
        pipe.send(await gateway.start())
        while (asked := await asyncio.to_thread(pipe.recv)) is not None:
            match asked:
                case "cpu":
                    pipe.send(time.process_time())
                case "open":
                    pipe.send(gateway.open(Conversations(Session("0/0/0", 0, SAMPLING, 1, WIDE), chat, generate, TURNS)))
                case key:
                    gateway.close(key)
        await gateway.stop()

    asyncio.run(run())


async def episodes(pipe: Any, ask: Ask, count: int) -> None:
    for _ in range(count):
        pipe.send("open")
        key, messages = pipe.recv(), [{"role": "user", "content": "find a"}]
        for _ in range(TURNS):
            messages += [await ask(key, messages), {"role": "tool", "content": "-> b"}]
        pipe.send(key)


async def measure(pipe: Any, name: str, ask: Ask, calls: int) -> None:
    await episodes(pipe, ask, 3)
    for side_by_side in (1, SIDE_BY_SIDE):
        each = max(1, calls // TURNS // side_by_side)
        pipe.send("cpu")
        server, client, began = pipe.recv(), time.process_time(), time.perf_counter()
        await asyncio.gather(*(episodes(pipe, ask, each) for _ in range(side_by_side)))
        wall, client = time.perf_counter() - began, time.process_time() - client
        pipe.send("cpu")
        server = pipe.recv() - server
        ms = [1000 * value / (each * TURNS * side_by_side) for value in (wall, server, client)]
        print(
            f"{name}, {side_by_side:2d} side by side: {ms[0]:.2f} ms a call; CPU {ms[1]:.2f} ms gateway, {ms[2]:.2f} ms client"
        )


async def main(calls: int) -> None:
    import aiohttp
    from openai import AsyncOpenAI

    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    server = context.Process(target=serve, args=(theirs,), daemon=True)
    server.start()
    base_url = pipe.recv()
    connector = aiohttp.TCPConnector(limit=SIDE_BY_SIDE)
    async with aiohttp.ClientSession(connector=connector) as session, AsyncOpenAI(base_url=base_url, api_key="-") as openai:

        async def bare(key: str, messages: list[Any]) -> Any:
            body, headers = {"model": "policy", "messages": messages}, {"Authorization": f"Bearer {key}"}
            async with session.post(f"{base_url}/chat/completions", json=body, headers=headers) as response:
                return (await response.json())["choices"][0]["message"]

        async def sdk(key: str, messages: list[Any]) -> Any:
            headers = {"Authorization": f"Bearer {key}"}
            got = await openai.chat.completions.create(model="policy", messages=messages, extra_headers=headers)
            return got.choices[0].message

        await measure(pipe, "aiohttp", bare, calls)
        await measure(pipe, "openai ", sdk, calls)
    pipe.send(None)
    server.join()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2560)
    asyncio.run(main(parser.parse_args().calls))
