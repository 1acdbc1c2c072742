"""Environments in files, as users have them, and an engine that says what the test told it to."""

import asyncio
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from filelock import FileLock
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from asyncrl.episodes.chat import TemplateChat
from asyncrl.episodes.conversations import Conversations
from asyncrl.episodes.session import Budget, Session
from asyncrl.generate.workload import EndedRequest, HeldGroup
from asyncrl.replay.log.rows import TRAIN_COLUMNS, TrainScore, decode_train, encode_rollouts, read_submitted
from asyncrl.types import (
    Episode,
    Generation,
    GenerationRequest,
    Prompt,
    Sampling,
    Span,
    Ticket,
    TrainRollout,
    Trajectory,
    Version,
)

if TYPE_CHECKING:
    from asyncrl.episodes.gateway import Gateway

ROOT = Path(__file__).resolve().parents[2]
INSTALL_S = 400.0
UV = [sys.executable, "-m", "uv"]
TOLD = ("msgspec", "numpy")  # what asyncrl needs in another interpreter
WIDE = Budget(tokens=1000, turn_tokens=4, context=1000)
CALL = '<tool_call>{"name":"look","arguments":{"at":"here"}}</tool_call>'  # a word of its own
WORDS = ["<pad>", "<eos>", "<user>", "<assistant>", "<tool>", "hello", "look", "here", "An", "answer.", "A", "question.", "nl"]
WORDS += ["<system>", CALL]
PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}<eos>{% endif %} nl {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WITH_TOOLS = "{% for t in tools or [] %}<system>{{ t.function.name }} nl {% endfor %}" + PLAIN


ENVIRONMENT = """
import asyncio, contextlib, os, re, signal, sys, threading, time
from asyncrl.episodes.environments import Step

class Echo:
    def __init__(self, turns=2, fail="", at=1, fifo=""):
        self.turns, self.fail, self.at, self.fifo, self.seen = turns, fail, at, fifo, 0

    def reset(self, task):
        self.task = task
        if self.at == 0:
            self.break_()
        return [{"role": "user", "content": task.row["prompt"]}]

    def step(self, reply):
        self.seen += 1
        if self.seen >= self.at:
            self.break_()
        return Step(messages=({"role": "tool", "content": "here"},), reward=0.5, done=self.seen == self.turns, parts={"n": 1.0})

    def break_(self):
        if self.fail == "raise":
            raise ValueError("no such tool")
        if self.fail == "exit":
            sys.exit(3)
        if self.fail == "die":
            os._exit(3)
        if self.fail == "hang":
            time.sleep(600)
        if self.fail == "fork":
            if os.fork() == 0:
                print("child", os.getpid(), flush=True)
                time.sleep(600)
            time.sleep(600)
        if self.fail == "flee":  # a double fork into a session of its own; and no signal helps
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    os.write(os.open(self.fifo, os.O_WRONLY), b"x")
                    time.sleep(600)
                os._exit(0)
            os.wait()
            for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
                signal.signal(number, signal.SIG_IGN)
            re.match("(a+)+$", "a" * 60 + "b")  # holds the GIL for years
        if self.fail == "leave":
            threading.Thread(target=time.sleep, args=(600,)).start()
        if self.fail == "memory":
            b"x" * (8 << 30)
        if self.fail == "close":
            os.closerange(3, 256)
        if self.fail in ("huge", "junk"):
            for number in range(3, 64):
                with contextlib.suppress(OSError):
                    os.write(number, bytes({"huge": [255] * 64, "junk": [0] * 7 + [1, 193]}[self.fail]))
        if self.fail == "print":
            print("x" * 1_000_000)

class Async:
    async def reset(self, task):
        await asyncio.sleep(0)
        return [{"role": "user", "content": "hello"}]

    async def step(self, reply):
        await asyncio.sleep(0)
        return Step(reward=1.0, done=True)

    async def close(self):
        print("closed", flush=True)

class Wrong(Echo):
    def reset(self, task):
        return [{"role": "user", "content": object()}]

class Empty(Echo):
    def reset(self, task):
        return []

async def ask(client, model, messages, **how):
    got = await client.chat.completions.create(model=model, messages=messages, **how)
    return got.choices[0].message

async def agent(task, *, base_url, api_key, model, kind=""):
    from openai import AsyncOpenAI, APIStatusError
    client = AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0)
    messages = [{"role": "user", "content": "hello"}]
    if kind == "raise":
        raise ValueError("no idea")
    if kind == "models":
        assert [one.id async for one in client.models.list()] == [model]
    if kind == "stream":
        said, ends = "", []
        async for chunk in await client.chat.completions.create(
            model=model, messages=messages, stream=True, stream_options={"include_usage": True}
        ):
            if chunk.choices:
                said += chunk.choices[0].delta.content or ""
                ends.append(chunk.choices[0].finish_reason)
            else:
                assert (chunk.usage.prompt_tokens, chunk.usage.completion_tokens) == (4, 2)
        assert (said, ends[-1]) == ("look", "stop"), (said, ends)
        return 1
    if kind == "many":  # more than max_turns
        for _ in range(9):
            messages += [await ask(client, model, messages), {"role": "user", "content": "here"}]
    if kind in ("long", "junk", "hide"):
        how = {"messages": "x"} if kind == "junk" else {}
        try:
            await ask(client, model, how.pop("messages", messages), **how)
        except APIStatusError as error:
            return {"score": error.status_code, kind: 1.0}
    first = await ask(client, model, messages, max_tokens=1 if kind == "short" else 50, temperature=0.2)
    again = [*messages, first, {"role": "user", "content": "here"}]
    if kind == "branch":
        await ask(client, model, [*messages, first, {"role": "user", "content": "look"}])
    await ask(client, model, again)
    return {"score": 0.5, "calls": 2}

def retrying(task, base_url, api_key):
    import json, urllib.request
    body = json.dumps({"messages": [{"role": "user", "content": "hello"}]}).encode()
    told = []
    for count in (0, 1, 2):
        request = urllib.request.Request(base_url + "/chat/completions", body, {"Authorization": "Bearer " + api_key,
            "x-stainless-retry-count": str(count)})
        told.append(json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"])
    assert told == ["look"] * 3
    return None

def stranger(task, base_url, api_key):
    import os, urllib.request, urllib.error
    assert (os.environ["OPENAI_BASE_URL"], os.environ["OPENAI_API_KEY"]) == (base_url, api_key)
    assert (os.environ["ANTHROPIC_BASE_URL"] + "/v1", os.environ["ANTHROPIC_API_KEY"]) == (base_url, api_key)
    try:
        urllib.request.urlopen(urllib.request.Request(base_url + "/chat/completions", b"{}", {"Authorization": "Bearer x"}))
    except urllib.error.HTTPError as error:
        return error.code

class Plain:
    def reset(self, task):
        return [{"role": "user", "content": "hello"}]

    def step(self, reply):
        return 5
"""


@pytest.fixture
def environment(tmp_path: Path) -> Callable[[str], str]:
    """environment(name): how a recipe names one of those above."""
    file = tmp_path / "environments.py"
    file.write_text(ENVIRONMENT)
    return lambda name: f"{file}:{name}"


@pytest.fixture
def make_ticket() -> Callable[..., Ticket]:
    def make(rollouts: Sequence[int] = (0,), group: int = 5, **fields: object) -> Ticket:
        return Ticket(
            group=group,
            attempt=0,
            prompt=Prompt(row=3, ids=(2, 5), data_source="test"),
            rollouts=tuple(rollouts),
            seeds=tuple(100 + r for r in rollouts),
            sampling=Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=4, stop_token_ids=(1,)),
            **fields,
        )

    return make


@pytest.fixture(scope="session")
def row_of() -> Callable[[Trajectory], TrainRollout]:
    """What the learner gets of an episode, by way of the store's rows."""

    def make(made: Trajectory) -> TrainRollout:
        ticket = Ticket(
            group=5,
            attempt=0,
            prompt=Prompt(row=3, ids=(2, 5), data_source="test"),
            rollouts=(0,),
            seeds=(100,),
            sampling=Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=4, stop_token_ids=(1,)),
        )
        ended = EndedRequest(HeldGroup(ticket, "", 0.0, 1), 0, Future(), 0.0)
        rows = read_submitted(encode_rollouts([ended.as_rollout(made, "", "g0")], "run"))
        return decode_train(rows.select(TRAIN_COLUMNS), [TrainScore(1.0, {})])[0]

    return make


class ScriptedEngine:
    """Answers at once, with `words`, then the end token; or not before `release`."""

    def __init__(self) -> None:
        self.slots = 4
        self.answers = [6, 1]
        self.script: list[list[int]] = []  # before these
        self.reason = "stop"
        self.held: list[tuple[GenerationRequest, Future[Generation]]] | None = None
        self.requests: list[GenerationRequest] = []
        self.aborted: list[int | None] = []
        self.arrived = threading.Semaphore(0)
        self.cancelled = threading.Semaphore(0)

    def submit_group(self, requests: Sequence[GenerationRequest]) -> "list[Future[Generation]]":
        futures: list[Future[Generation]] = [Future() for _ in requests]
        self.requests += requests
        for request, future in zip(requests, futures, strict=True):
            future.add_done_callback(lambda future: self.cancelled.release() if future.cancelled() else None)
            if self.held is None:
                future.set_result(self.answer(request))
            else:
                self.held.append((request, future))
            self.arrived.release()
        return futures

    def answer(self, request: GenerationRequest, reason: str = "") -> Generation:
        script = self.script.pop(0) if self.script else self.answers
        ids = script[: request.sampling.max_tokens]
        return Generation(
            id=request.id,
            token_ids=ids,
            logprobs=[-1.0] * len(ids),
            kept_logmass=None,
            spans=(Span(Version(1, 0), len(ids)),),
            finish_reason=reason or self.reason,  # type: ignore[arg-type]
        )

    def abort(self, group: int | None = None) -> None:
        self.aborted.append(group)
        for request, future in self.held or ():
            if not future.done():
                future.set_result(self.answer(request, "abort"))


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


class Serving:
    """A gateway with one open episode."""

    def __init__(self, gateway: "Gateway", session: Session, key: str, base_url: str) -> None:
        self.gateway, self.session, self.key, self.base_url = gateway, session, key, base_url
        self.headers = {"Authorization": f"Bearer {key}"}

    def trajectory(self) -> Trajectory:
        return self.session.trajectory(Episode())


@pytest.fixture
def serve(engine: ScriptedEngine, make_chat: Callable[..., Any]) -> Callable[..., AbstractAsyncContextManager[Serving]]:
    """serve(template, max_turns, budget, return_s): with the scripted engine, without processes."""

    @asynccontextmanager
    async def serving(
        template: str = WITH_TOOLS, max_turns: int = 8, budget: Budget = WIDE, counts: Counter[str] | None = None, **how: float
    ) -> AsyncIterator[Serving]:
        from asyncrl.episodes.gateway import Gateway

        sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=4, stop_token_ids=(1,))
        session = Session("5/0/0", 5, sampling, 77, budget)
        gateway = Gateway(Counter() if counts is None else counts, **how)
        base_url = await gateway.start()

        async def ask(request: GenerationRequest) -> Generation:
            return await asyncio.wrap_future(engine.submit_group([request])[0])

        key = gateway.open(Conversations(session, make_chat(template), ask, max_turns))
        try:
            yield Serving(gateway, session, key, base_url)
        finally:
            await gateway.stop()

    return serving


@pytest.fixture
def interpreter(request, monkeypatch) -> Callable[..., str]:
    """interpreter(*packages): a Python that has them, made once, from PyPI, in pytest's cache folder; by uv, as pip takes ten
    times as long. Skips where it is not there, unless CI says that it must be."""

    def make(*packages: str) -> str:
        folder = Path(request.config.cache.mkdir("-".join(packages).replace("==", "-")))
        python = folder / "bin/python"
        with FileLock(f"{folder}.lock"):  # another worker of the same pytest may be making it
            if not (folder / "made").exists():
                if "ASYNCRL_REQUIRE_AGENTS" not in os.environ:
                    pytest.skip(f"{' '.join(packages)} is not there yet, and takes a minute: set ASYNCRL_REQUIRE_AGENTS=1")
                subprocess.run([*UV, "venv", "-q", "--clear", f"--python={sys.executable}", folder], check=True)
                install = [*UV, "pip", "install", "-q", "--compile-bytecode", f"--python={python}", *packages, *TOLD]
                subprocess.run(install, check=True, timeout=INSTALL_S)
                (folder / "made").touch()
        monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{Path(__file__).parent / 'public'}")
        monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
        return str(python)

    return make


@pytest.fixture
def plain() -> str:
    """A chat template that shows messages as they are."""
    return PLAIN


@pytest.fixture
def ids() -> Callable[[str], list[int]]:
    return lambda text: [WORDS.index(word) for word in text.split()]


@pytest.fixture
def make_chat() -> Callable[..., TemplateChat]:
    """make_chat(template): over a tokenizer of WORDS."""

    def make(template: str = PLAIN) -> TemplateChat:
        backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", additional_special_tokens=[*WORDS[2:5], "<system>"]
        )
        tokenizer.chat_template = template
        return TemplateChat(tokenizer, (1,))

    return make
