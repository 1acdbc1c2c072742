"""SGLang on CPU behind the generator: `python tests/bench/bench_sglang.py` (deploy/sglang-cpu/install first).

throughput   tokens/s of Generator + SGLangEngine over those of the bare server under the same requests: 64 at a time, in
             groups of 8, from one aiohttp client that sends each group as one batch, or each rollout by itself. The store is
             a list in this process: what is measured is the generator and its engine. In turns, three each; medians.
updates      20 swaps under 32 concurrent rollouts, per update mode: pause (median, p99), tokens/s meanwhile over those of an
             undisturbed server, what was recomputed or thrown away
death        SIGKILL of the scheduler under the same load: until a new server serves, and what became of the rollouts

Run it on a quiet machine. The model is a Qwen3 of 0.85M parameters, fp32; one thread for SGLang.
"""

import asyncio
import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from asyncrl.config import EngineSpec, GeneratorsSpec, ModelSpec, SGLangSpec, UpdateMode
from asyncrl.generate.engines import EngineSite
from asyncrl.generate.generator import Generator
from asyncrl.generate.sglang.build import sglang_engine
from asyncrl.generate.sglang.engine import SGLangEngine
from asyncrl.generate.sglang.keys import RunningServer
from asyncrl.interfaces import Tensors
from asyncrl.models.loading import load_model, named_weights
from asyncrl.types import GenerationRequest, Prompt, Reserved, Rollout, Sampling, Ticket, Version

SLOTS, GROUP, PROMPT, VOCABULARY = 64, 8, 32, 512
ARGS: dict[str, str | int | float | bool] = {"max-total-tokens": 65536}


def make_model(folder: Path) -> ModelSpec:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=1,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return ModelSpec(path=str(folder))


@contextmanager
def running(model: ModelSpec, folder: Path, weights: Tensors, **sglang: Any) -> Iterator[SGLangEngine]:
    mode: UpdateMode = sglang.pop("update_mode", "in_flight")
    spec = EngineSpec(
        kind="sglang",
        slots=SLOTS,
        max_length=1024,
        update_mode=mode,
        stream_interval=16,
        sglang=SGLangSpec(**({"command": ("sglang-cpu-server",), "args": ARGS} | sglang)),
    )
    generators = GeneratorsSpec(engine=spec)
    engine = sglang_engine(EngineSite(generators=generators, model=model, logs=folder, name=f"{mode}-{len(sglang)}"))
    engine.start()
    try:
        engine.update_weights(Version(1, 0), weights)
        yield engine
    finally:
        engine.close()


def prompt(group: int) -> tuple[int, ...]:
    return tuple(2 + (group * 37 + position * 11) % (VOCABULARY - 2) for position in range(PROMPT))


def sampling(tokens: int) -> Sampling:
    return Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=tokens, stop_token_ids=())


# ---------------------------------------------------------------------------------------------- throughput


class ListStore:
    """Tickets from a counter, and a count of what comes back."""

    def __init__(self, groups: int, tokens: int) -> None:
        self._left, self._tokens = list(range(groups)), tokens
        self.received = 0
        self.last = 0.0

    def recall(self) -> None: ...

    def reserve(self, k: int, version: Version, held: Sequence[int], wait_s: float) -> Reserved:
        groups, self._left = self._left[:k], self._left[k:]
        tickets = tuple(
            Ticket(
                group=group,
                attempt=0,
                prompt=Prompt(row=group, ids=prompt(group), data_source="bench"),
                rollouts=tuple(range(GROUP)),
                seeds=tuple(range(GROUP)),
                sampling=sampling(self._tokens),
            )
            for group in groups
        )
        return Reserved(tickets=tickets, ended=not self._left)

    def submit(self, rollouts: Sequence[Rollout]) -> None:
        self.received += sum(len(rollout.response_ids) for rollout in rollouts)
        self.last = time.perf_counter()


class NoNews:
    """A weight source with one version, which is there at once."""

    def __init__(self, weights: Tensors) -> None:
        self._weights = weights

    def next(self, after: Version | None, wait_s: float) -> tuple[Version, Tensors] | None:
        if after is None:
            return Version(1, 1), self._weights
        threading.Event().wait(wait_s)
        return None

    def gauges(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass


def through_generator(engine: SGLangEngine, weights: Tensors, groups: int, tokens: int) -> float:
    """Tokens per second of a whole generator, from its start to the last rollout that the store gets."""
    store = ListStore(groups, tokens)
    generator = Generator(engine, store, NoNews(weights), lambda ids: "", name="bench", group_size=GROUP)
    started = time.perf_counter()
    generator.run()
    seconds = store.last - started
    assert store.received == groups * GROUP * tokens
    return store.received / seconds


async def bare(server: RunningServer, groups: int, tokens: int, batched: bool) -> float:
    """Tokens per second of the server alone."""
    parameters = {"temperature": 1.0, "max_new_tokens": tokens, "ignore_eos": True}
    requests: list[dict[str, Any]] = []
    for group in range(groups):
        if batched:
            requests.append({"input_ids": [list(prompt(group))] * GROUP, "sampling_params": [parameters] * GROUP})
        else:
            requests += [{"input_ids": list(prompt(group)), "sampling_params": parameters}] * GROUP
    received = 0
    headers = {"content-type": "application/json", "authorization": f"Bearer {server.key}"}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=headers) as session:

        async def worker() -> None:
            nonlocal received
            while requests:
                body = msgspec.json.encode(requests.pop(0) | {"return_logprob": True})
                async with session.post(f"{server.url}/generate", data=body) as answer:
                    rows = msgspec.json.decode(await answer.read())
                received += sum(len(row["output_ids"]) for row in (rows if batched else [rows]))

        started = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(SLOTS // GROUP if batched else SLOTS)))
        seconds = time.perf_counter() - started
    assert received == groups * GROUP * tokens
    return received / seconds


def throughput(model: ModelSpec, folder: Path, weights: Tensors) -> None:
    with running(model, folder, weights) as engine:
        server = engine.servers()[0]
        for tokens, groups in ((8, 64), (64, 24), (256, 8)):
            figures: dict[str, list[float]] = {"generator": [], "bare, batches": [], "bare, single": []}
            for _ in range(4):
                figures["generator"].append(through_generator(engine, weights, groups, tokens))
                figures["bare, batches"].append(asyncio.run(bare(server, groups, tokens, batched=True)))
                figures["bare, single"].append(asyncio.run(bare(server, groups, tokens, batched=False)))
            best = {name: statistics.median(values[1:]) for name, values in figures.items()}  # the first of each warms up
            print(
                f"throughput, {tokens:3d} tokens  generator {best['generator']:6.0f} tok/s  over bare server: "
                f"{best['generator'] / best['bare, batches']:.2f} (batches, {best['bare, batches']:.0f}) "
                f"{best['generator'] / best['bare, single']:.2f} (single requests, {best['bare, single']:.0f})",
                flush=True,
            )


# ------------------------------------------------------------------------------------------------- updates


class Load:
    """Keeps `rows` rollouts of 384 tokens in flight, in groups, and counts the tokens of those that end."""

    def __init__(self, engine: SGLangEngine, rows: int) -> None:
        self._engine, self._stopping = engine, False
        self.rollouts = self.tokens = self.bad = 0
        self._cond = threading.Condition()
        self._unfinished = 0
        self._sent = 0
        self._rows = rows
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopping:
            with self._cond:
                self._cond.wait_for(lambda: self._unfinished <= self._rows - GROUP or self._stopping)
                if self._stopping:
                    return
                self._unfinished += GROUP
            self._sent += 1
            requests = [
                GenerationRequest(
                    id=f"{self._sent}/{i}", group=self._sent, prompt_ids=prompt(self._sent), sampling=sampling(384), seed=i
                )
                for i in range(GROUP)
            ]
            for future in self._engine.submit_group(requests):
                future.add_done_callback(self._done)

    def _done(self, future: Any) -> None:
        answer = future.result()
        with self._cond:
            self.rollouts += 1
            self.tokens += len(answer.token_ids)
            whole = sum(span.length for span in answer.spans) == len(answer.token_ids) == len(answer.logprobs) == 384
            self.bad += not (whole and answer.finish_reason == "length")
            self._unfinished -= 1
            self._cond.notify_all()

    def until(self, rollouts: int) -> None:
        with self._cond:
            assert self._cond.wait_for(lambda: self.rollouts >= rollouts, timeout=300)

    def stop(self) -> None:
        with self._cond:
            self._stopping = True
            self._cond.notify_all()
            assert self._cond.wait_for(lambda: self._unfinished == 0, timeout=300)


@contextmanager
def clocked(engine: SGLangEngine) -> Iterator[list[float]]:
    """Seconds, and tokens per second that the servers reported, of what happens inside; known at its end."""
    figures: list[float] = []
    began, tokens = time.perf_counter(), engine.gauges()["tokens"]
    yield figures
    seconds = time.perf_counter() - began
    figures += [seconds, (engine.gauges()["tokens"] - tokens) / seconds]


def updates(model: ModelSpec, folder: Path, weights: Tensors, mode: UpdateMode, prefix_cache: bool = False) -> None:
    with running(model, folder, weights, update_mode=mode, prefix_cache=prefix_cache) as engine:
        load = Load(engine, rows=32)
        load.until(32)
        with clocked(engine) as undisturbed:
            load.until(load.rollouts + 64)
        reports = []
        with clocked(engine) as disturbed:
            for update in range(1, 21):
                threading.Event().wait(1.0)  # the learner's step
                reports.append(engine.update_weights(Version(1, update), weights))
        load.stop()
        pauses = sorted(report.pause_s for report in reports)
        name = mode + (" + prefix cache" if prefix_cache else "")
        recomputed, discarded = sum(r.recomputed_tokens for r in reports), sum(r.discarded_tokens for r in reports)
        print(
            f"updates, {name:24s} pause median {1e3 * statistics.median(pauses):5.1f} ms, p99 (the worst) "
            f"{1e3 * pauses[-1]:6.1f} ms; 20 updates in {disturbed[0]:5.1f} s; {disturbed[1]:5.0f} tokens/s meanwhile, "
            f"{disturbed[1] / undisturbed[1]:.2f} of undisturbed; {recomputed} tokens recomputed, {discarded} discarded; "
            f"{load.rollouts} rollouts ended, {load.bad} of them wrong",
            flush=True,
        )


# --------------------------------------------------------------------------------------------------- death


def death(model: ModelSpec, folder: Path, weights: Tensors) -> None:
    with running(model, folder, weights) as engine:
        load = Load(engine, rows=32)
        load.until(64)
        begun = engine.gauges()["tokens"]
        while engine.gauges()["tokens"] < begun + 32 * 128:  # in the middle of their answers
            threading.Event().wait(0.02)
        scheduler = [pid for pid in engine.pids() if Path(f"/proc/{pid}/comm").read_text().startswith("sglang::schedul")]
        os.kill(scheduler[0], signal.SIGKILL)
        ended = load.rollouts
        load.until(ended + 64)
        load.stop()
        gauges = engine.gauges()
        print(
            f"death of the scheduler     served again after {gauges['recovery_s']:.1f} s; {gauges['resumed']:.0f} rollouts "
            f"resumed, {gauges['reissued']:.0f} reissued, {gauges['lost_tokens']:.0f} tokens lost; {load.rollouts} rollouts "
            f"ended, {load.bad} of them wrong",
            flush=True,
        )


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = make_model(folder / "model")
        weights = named_weights(load_model(model))
        throughput(model, folder, weights)
        for mode in ("in_flight", "keep_kv", "drain", "restart"):
            updates(model, folder, weights, mode)  # type: ignore[arg-type]
        updates(model, folder, weights, "in_flight", prefix_cache=True)
        death(model, folder, weights)


if __name__ == "__main__":
    main()
