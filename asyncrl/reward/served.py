"""A model that a run serves for its rewards, frozen: reward workers ask it, whoever and wherever they are."""

import itertools
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from asyncrl.errors import AsyncRLError, ConfigError, Unavailable
from asyncrl.interfaces import Engine
from asyncrl.report.timing import TimeInState
from asyncrl.reward.opinions import Chat
from asyncrl.reward.results import Opinion
from asyncrl.types import GenerationRequest, Report, Sampling, Status

_WATCH_S = 1.0  # between two looks at its health
_LATE = Opinion("timeout", error="no answer within reward.deadline_s")

Encode = Callable[[Chat], list[int]]  # raises ValueError for what can't be written with the model's template
Respond = Callable[[Chat], Opinion]  # thread-safe; waits


class ServedModel:
    """A stage (interfaces.Stage): `run` only watches over the model, questions come by `answer`.

    health: raises Unavailable if the model can't answer any more.
    """

    def __init__(self, name: str, respond: Respond, health: Callable[[], None]) -> None:
        self._name, self._respond, self._health = name, respond, health
        self._stop, self._broken = threading.Event(), Future[None]()
        self._counts: Counter[Status] = Counter()
        self._time, self._lock, self._asked = TimeInState(), threading.Lock(), 0

    def run(self) -> None:
        """Until `stop`. Raises what the model's health raises, or what made an answer fail: the model is to start anew."""
        while not self._stop.wait(_WATCH_S):
            if self._broken.done():
                self._broken.result()
            self._health()

    def stop(self) -> None:
        self._stop.set()

    def answer(self, chat: Chat) -> Opinion:
        """Waits for it. Called from several threads."""
        with self._lock:
            self._asked += 1
            self._time.enter("busy")
        try:
            answer = self._respond(chat)
            with self._lock:
                self._counts[answer.status] += 1
            return answer
        except AsyncRLError:
            raise
        except Exception as error:
            with self._lock:
                if not self._broken.done():
                    self._broken.set_exception(error)
            raise Unavailable(f"{self._name}: {type(error).__name__}: {error}") from error
        finally:
            with self._lock:
                self._asked -= 1
                if not self._asked:
                    self._time.enter("wait:questions")

    def report(self) -> Report:
        """Answers so far, and how many were none."""
        answered = self._counts.total()
        gauges = {"answered": float(answered), "invalid": float(self._counts["invalid"])}
        return Report(name=self._name, role="model", seconds=self._time.seconds(), gauges=gauges, progress=answered)


class Classifier:
    """Scores conversations in packs: whoever comes while one is computed waits, and all that has gathered goes next.

    logits: of sequences of token ids. pack_tokens: of a pack, its padding included. deadline_s: after which nobody waits for an
    answer any more.
    """

    def __init__(
        self,
        encode: Encode,
        logits: Callable[[Sequence[list[int]]], list[float]],
        *,
        max_length: int,
        pack_tokens: int,
        deadline_s: float,
    ) -> None:
        self._encode, self._logits, self._max_length, self._pack_tokens = encode, logits, max_length, pack_tokens
        self._deadline_s = deadline_s
        self._waiting = deque[tuple[list[int], Future[float]]]()
        self._encoding, self._computing = threading.Lock(), threading.Lock()

    def __call__(self, chat: Chat) -> Opinion:
        until = time.monotonic() + self._deadline_s
        try:
            with self._encoding:
                ids = self._encode(chat)
        except ValueError as error:
            return Opinion("invalid", error=str(error))
        if not 0 < len(ids) <= self._max_length:
            return Opinion("invalid", error=f"{len(ids)} tokens: rewards.models.engine.max_length={self._max_length}")
        score = Future[float]()
        self._waiting.append((ids, score))
        with self._computing:
            if time.monotonic() > until and not score.done():
                self._waiting.remove((ids, score))
                return _LATE
            while not score.done():
                self._score_pack()
        return Opinion("ok", score.result())

    def _score_pack(self) -> None:
        pack, longest = [self._waiting.popleft()], 0
        while self._waiting:
            longest = max(longest, len(pack[-1][0]), len(self._waiting[0][0]))
            if longest * (len(pack) + 1) > self._pack_tokens:
                break
            pack.append(self._waiting.popleft())
        try:
            values = self._logits([ids for ids, _ in pack])
        except BaseException as error:
            for _, score in pack:
                score.set_exception(error)
            return
        for (_, score), value in zip(pack, values, strict=True):
            score.set_result(value)


class Judge:
    """Writes texts with an engine whose weights stay as they are. deadline_s: for each."""

    def __init__(
        self, engine: Engine, encode: Encode, decode: Callable[[list[int]], str], sampling: Sampling, deadline_s: float
    ) -> None:
        self._engine, self._encode, self._decode, self._sampling = engine, encode, decode, sampling
        self._deadline_s = deadline_s
        self._numbers, self._encoding = itertools.count(1), threading.Lock()

    def __call__(self, chat: Chat) -> Opinion:
        with self._encoding:
            number, ids = next(self._numbers), self._encode([{"role": "user", "content": chat}])
        request = GenerationRequest(
            id=f"judge-{number}", group=number, prompt_ids=tuple(ids), sampling=self._sampling, seed=number
        )
        future = self._engine.submit_group([request])[0]
        try:
            generation = future.result(self._deadline_s)
        except ConfigError as error:  # too long for the engine
            return Opinion("invalid", error=str(error))
        except TimeoutError:
            future.cancel()  # which gives its slot back
            return _LATE
        if generation.finish_reason == "abort":
            raise Unavailable("the engine gave up a judge's text")
        if generation.finish_reason == "length":  # what it quotes could be taken for its score
            return Opinion("invalid", error=f"the judge's text was cut at max_tokens={self._sampling.max_tokens}")
        with self._encoding:
            return Opinion("ok", texts=[self._decode(generation.token_ids)])
