"""Episodes: what waiting for tools costs the engine, and what a crowd of them costs the machine.

    python tests/bench/bench_episodes.py [tools] [crowd] [--seconds 15] [--in-flight N] [--episodes 4096]

tools   a generator with the embedded engine (0.8M parameters, 32 slots) for as long as `--seconds` say, after as long to warm
        up: episodes of 4 turns of 16 tokens, whose environment takes 0, 50 and 500 ms, against answers of 64 tokens without
        any. busy: the engine's share of time in steps; filled: slots in use, over time. The store is a counter.
crowd   512 episodes in flight, with a stand-in engine that answers at once and an environment that takes nothing: what is
        left is asyncrl's own. CPU of the host's thread and of the processes per turn; where that thread's goes; memory.
"""

import argparse
import json
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bench_engine import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from asyncrl.config import EpisodeSpec
from asyncrl.episodes.chat import TemplateChat
from asyncrl.episodes.children import EpisodePool
from asyncrl.episodes.host import EpisodeHost
from asyncrl.episodes.session import Budget, Session
from asyncrl.generate.embedded.engine import TorchEngine
from asyncrl.generate.generator import Generator
from asyncrl.interfaces import Tensors
from asyncrl.models.loading import named_weights
from asyncrl.types import Generation, GenerationRequest, Prompt, Reserved, Rollout, Sampling, Span, Ticket, Version

SLOTS, GROUP, TURNS, TOKENS, CROWD = 32, 8, 4, 16, 512
VERSION = Version(1, 0)
ENVIRONMENT = """
import time
from asyncrl.episodes.environments import Step

class Slow:
    def __init__(self, ms, turns):
        self.ms, self.left = ms, turns

    def reset(self, task):
        return task.row["prompt"]

    def step(self, reply):
        time.sleep(self.ms / 1000)
        self.left -= 1
        return Step(messages=({"role": "tool", "content": "w8 w9"},), done=self.left == 0)
"""
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PROMPT = [{"role": "user", "content": " ".join(f"w{i}" for i in range(16))}]


def make_chat() -> TemplateChat:
    """Of 32 words, as many as the model has tokens."""
    words = ["<pad>", "<eos>", "<user>", "<assistant>", "<tool>", *(f"w{i}" for i in range(27))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", additional_special_tokens=words[2:5]
    )
    tokenizer.chat_template = TEMPLATE
    return TemplateChat(tokenizer, (1,))


@contextmanager
def hosting(engine: Any, folder: Path, ms: int, in_flight: int | None, chat: TemplateChat) -> Iterator[EpisodeHost]:
    file = folder / "slow.py"
    file.write_text(ENVIRONMENT)
    arguments: dict[str, Any] = {"ms": ms, "turns": TURNS}
    spec = EpisodeSpec(environment=f"{file}:Slow", arguments=arguments, in_flight=in_flight)
    budget = Budget(tokens=10_000, turn_tokens=TOKENS, context=512)
    row = json.dumps({"prompt": PROMPT})
    host = EpisodeHost(engine, EpisodePool(spec), chat, spec, budget, lambda *_: row)
    try:
        yield host
    finally:
        host.close()


def ticket(group: int, tokens: int) -> Ticket:
    return Ticket(
        group=group,
        attempt=0,
        prompt=Prompt(row=0, ids=tuple(range(5, 21)), data_source="bench"),
        rollouts=tuple(range(GROUP)),
        seeds=tuple(range(GROUP)),
        sampling=Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=tokens, stop_token_ids=()),
    )


# --------------------------------------------------------------------------------------------------- tools


class Watched(TorchEngine):
    """Counts the time in steps, and slots over time."""

    busy_s = filled_s = 0.0

    def step(self) -> bool:
        began = time.monotonic()
        worked = super().step()
        took = time.monotonic() - began
        self.busy_s += took
        self.filled_s += took * self._batch.count / self.slots
        return worked


class Endless:
    """A store that always has tickets, and a source of one version of weights."""

    def __init__(self, weights: Tensors, tokens: int) -> None:
        self._weights, self._tokens, self._given = weights, tokens, 0
        self.received = 0
        self.age_s = 0.0

    def recall(self) -> None: ...

    def reserve(self, k: int, version: Version, held: Sequence[int], wait_s: float) -> Reserved:
        if not k:
            threading.Event().wait(wait_s)
        first, self._given = self._given, self._given + k
        return Reserved(tickets=tuple(ticket(first + i, self._tokens) for i in range(k)))

    def submit(self, rollouts: Sequence[Rollout]) -> None:
        self.received += len(rollouts)
        self.age_s += sum(rollout.times["finished"] - rollout.times["started"] for rollout in rollouts)

    def next(self, after: Version | None, wait_s: float) -> tuple[Version, Tensors] | None:
        if after is None:
            return VERSION, self._weights
        threading.Event().wait(wait_s)
        return None

    def gauges(self) -> dict[str, float]:
        return {}


def measure(engine: Watched, store: Endless, seconds: float, host: EpisodeHost | None) -> dict[str, float]:
    generator = Generator(engine, store, store, lambda ids: "", name="bench", group_size=GROUP, episodes=host)
    thread = threading.Thread(target=generator.run)
    thread.start()

    def now() -> list[float]:
        waited_s = host.gauges()["environment_s"] if host else 0.0
        return [time.monotonic(), engine.busy_s, engine.filled_s, store.received, store.age_s, waited_s]

    time.sleep(seconds)
    before = now()
    time.sleep(seconds)
    wall, busy, filled, rollouts, age, waited = (b - a for a, b in zip(before, now(), strict=True))
    generator.stop()
    thread.join()
    turns = rollouts * TURNS / 1e3
    return {
        "busy": busy / wall,
        "filled": filled / wall,
        "per_s": rollouts / wall,
        "in_flight": age / wall,
        "waited": waited / turns,
        "decoded": (age - waited) / turns,
    }


def tools(folder: Path, seconds: float, in_flight: int | None) -> None:
    plain = 0.0
    for ms in (None, 0, 50, 500):
        model = tiny_model()
        engine = Watched(model, slots=SLOTS, max_length=512)
        store = Endless(dict(named_weights(tiny_model())), TURNS * TOKENS if ms is None else TOKENS)
        engine.start()
        if ms is None:
            got = measure(engine, store, seconds, None)
            plain = got["per_s"]
        else:
            with hosting(engine, folder, ms, in_flight, make_chat()) as host:
                got = measure(engine, store, seconds, host)
        engine.close()
        print(
            f"tools, {'none  ' if ms is None else f'{ms:3d} ms'}  engine busy {got['busy']:.2f}, slots filled "
            f"{got['filled']:.2f}; {got['per_s']:.1f} rollouts/s, {got['per_s'] / plain:.2f} × those without tools; "
            f"{got['in_flight'] / SLOTS:.1f} × slots in flight; of a turn {got['waited']:.0f} ms in the environment, "
            f"{got['decoded']:.0f} ms in the engine and its queue",
            flush=True,
        )


# --------------------------------------------------------------------------------------------------- crowd


class AtOnce:
    """An engine that answers at once."""

    slots, max_length = CROWD, 512

    def submit_group(self, requests: Sequence[GenerationRequest]) -> "list[Future[Generation]]":
        futures: list[Future[Generation]] = [Future() for _ in requests]
        for request, future in zip(requests, futures, strict=True):
            future.set_result(
                Generation(
                    id=request.id,
                    token_ids=[7] * TOKENS,
                    logprobs=[-1.0] * TOKENS,
                    kept_logmass=None,
                    spans=(Span(VERSION, TOKENS),),
                    finish_reason="stop",
                )
            )
        return futures

    def abort(self, group: int | None = None) -> None: ...


SPENT: Counter[str] = Counter()  # seconds of CPU of the host's thread, by what it did


def booked(kind: type, name: str, what: str) -> None:
    """Has the time in a method counted."""
    plain: Callable[..., Any] = getattr(kind, name)

    def timed(*args: Any, **how: Any) -> Any:
        began = time.thread_time()
        try:
            return plain(*args, **how)
        finally:
            SPENT[what] += time.thread_time() - began  # type: ignore[assignment]

    setattr(kind, name, timed)


def processes() -> list[int]:
    """All below this one."""
    found, new = list[int](), [os.getpid()]
    while new:
        tasks = (task for pid in new for task in Path(f"/proc/{pid}/task").iterdir())
        new = [int(child) for task in tasks for child in (task / "children").read_text().split()]
        found += new
    return found


def cpu_s(pids: Sequence[int]) -> float:
    """Of those processes' main threads."""
    return sum(int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) for pid in pids) / 1e9


def pss_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


class Feeder:
    """Keeps so many episodes in flight until so many have ended."""

    def __init__(self, host: EpisodeHost, episodes: int) -> None:
        self._host, self._left, self._running = host, episodes, 0
        self._next = 0
        self._lock, self.over = threading.Lock(), threading.Event()

    def begin(self, groups: int) -> None:
        for _ in range(groups):
            with self._lock:
                group, self._next = self._next, self._next + 1
                self._running += GROUP
                self._left -= GROUP
            for future in self._host.submit(ticket(group, TOKENS)):
                future.add_done_callback(self._ended)

    def _ended(self, future: "Future[Generation]") -> None:
        future.result()
        with self._lock:
            self._running -= 1
            more = (CROWD - self._running) // GROUP if self._left > 0 else 0
            if self._left <= 0 and self._running == 0:
                self.over.set()
        if more:
            self.begin(more)


def crowd(folder: Path, episodes: int) -> None:
    for kind, names, what in (
        (TemplateChat, ("prompt", "next_prompt"), "template and tokenizer"),
        (TemplateChat, ("reply",), "answers as messages"),
        (Session, ("request", "record", "room", "trajectory"), "record of tokens"),
    ):
        for name in names:
            booked(kind, name, what)
    began = time.monotonic()
    with hosting(AtOnce(), folder, 0, CROWD, make_chat()) as host:
        loaded_s = time.monotonic() - began
        first = Feeder(host, CROWD)
        began = time.monotonic()
        first.begin(CROWD // GROUP)
        first.over.wait()
        started_s, pids = time.monotonic() - began, processes()
        clock = time.pthread_getcpuclockid(host._loop._thread.ident or 0)
        SPENT.clear()
        before = time.monotonic(), time.clock_gettime(clock), cpu_s(pids)
        rest = Feeder(host, episodes)
        rest.begin(CROWD // GROUP)
        rest.over.wait()
        wall, mine, theirs = (
            b - a for a, b in zip(before, (time.monotonic(), time.clock_gettime(clock), cpu_s(pids)), strict=True)
        )
        turns = episodes * TURNS
        parts = ", ".join(f"{what} {1e6 * spent / turns:.0f}" for what, spent in SPENT.most_common())
        other = mine - sum(SPENT.values())
        print(
            f"crowd: the environment loaded in {loaded_s:.2f} s; the first {CROWD} episodes, with forks, in {started_s:.2f} s"
        )
        print(f"crowd: {episodes / wall:.0f} episodes/s, {turns / wall:.0f} turns/s with {len(pids)} processes")
        print(
            f"crowd: CPU of a turn, µs: host's thread {1e6 * mine / turns:.0f} ({parts}, all else {1e6 * other / turns:.0f}), "
            f"processes {1e6 * theirs / turns:.0f}; of an episode {1e6 * (mine + theirs) / episodes:.0f}"
        )
        sizes = [pss_mib(pid) for pid in pids]
        print(
            f"crowd: memory (PSS) of {len(pids)} processes: {sum(sizes) / CROWD:.1f} MiB an episode, at most {max(sizes):.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["tools", "crowd"], metavar="tools|crowd")
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--in-flight", type=int)
    parser.add_argument("--episodes", type=int, default=4096)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        if "tools" in options.parts:
            tools(Path(name), options.seconds, options.in_flight)
        if "crowd" in options.parts:
            crowd(Path(name), options.episodes)


if __name__ == "__main__":
    main()
