"""Models are asked about samples before reward functions see them: classifiers, judges, and pairwise judges of whole groups.

    submit ──► AskFirst ── questions ──► what the run serves (served.py, in actors of their own), or an API
                  └── samples with the answers ──► RewardPool ──► poll

Everything that waits for models is a coroutine, in one thread beside the reward worker's.
"""

import asyncio
import queue
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain, groupby, permutations
from typing import Any, Generic, Self, TypeVar

import aiohttp
import msgspec
from msgspec.structs import replace

from asyncrl.config import QUESTIONS, JudgeSpec, RewardSpec, RewardTerm
from asyncrl.errors import Closed, Unavailable
from asyncrl.loops import LoopThread
from asyncrl.reward.opinions import Chat, api_key, conversation, question, read_prompt
from asyncrl.reward.pool import RewardPool
from asyncrl.reward.results import Opinion, Sample, Verdict
from asyncrl.rundir import MASK

T = TypeVar("T")
Send = Callable[[Chat], Awaitable[Opinion]]  # raises Unavailable where it is worth while to ask again; TimeoutError
Ask = Callable[[Sequence[Sample]], Awaitable[list[Opinion]]]  # about samples of one group; answers in their order

TRIES = 5
_AGAIN_S = 1.0  # before the second try; then twice as long each time
_HAND_OVER_S = 0.02  # how long answered samples may lie while functions work on others
_ANSWER_BYTES = 1 << 20
_CLOSE_S = 30.0


class _Unit(Generic[T]):
    """Samples that are asked about together, and returned together."""

    def __init__(self, samples: list[tuple[T, Sample]]) -> None:
        self.samples = samples
        self.verdicts: list[tuple[T, Verdict]] = []


class AskFirst(Generic[T]):
    """A RewardPool behind models, to be used as one. by_group: a unit is what a `submit` holds of a group, else each sample.

    asks: by the names of terms. apis: those that they ask, to be closed.
    """

    def __init__(
        self,
        pool: RewardPool[tuple[_Unit[T], T]],
        asks: Mapping[str, Ask],
        apis: "Sequence[ChatAPI]" = (),
        *,
        by_group: bool = False,
    ) -> None:
        self._pool, self._asks, self._apis, self._by_group = pool, asks, apis, by_group
        self._answered = queue.SimpleQueue[_Unit[T] | BaseException]()
        self._asking = 0  # samples
        self._loop = LoopThread("asking")

    def __enter__(self) -> Self:
        """As the pool's."""
        self._pool.__enter__()
        self._loop.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._pool.close()
        self._loop.close(Closed("nobody is asked any more"), self._end, _CLOSE_S)

    async def _end(self) -> None:
        for api in self._apis:
            await api.close()

    def submit(self, samples: Iterable[tuple[T, Sample]]) -> None:
        """Begins to ask about tagged samples. Never waits."""
        units = [[one] for one in samples]
        if self._by_group:
            units = [list(members) for _, members in groupby(chain(*units), key=lambda of: of[1].group)]
        for unit in map(_Unit, units):
            self._asking += len(unit.samples)
            self._loop.call(self._begin, unit)

    def _begin(self, unit: _Unit[T]) -> None:
        self._loop.spawn(self._ask(unit))

    async def _ask(self, unit: _Unit[T]) -> None:
        about = [sample for _, sample in unit.samples]
        try:
            columns = await asyncio.gather(*(ask(about) for ask in self._asks.values()))
            for place, row in enumerate(zip(*columns, strict=True)):
                tag, sample = unit.samples[place]
                unit.samples[place] = tag, replace(sample, asked=dict(zip(self._asks, row, strict=True)))
        except Exception as error:  # the worker's thread raises it
            self._answered.put(error)
        else:
            self._answered.put(unit)

    @property
    def restarts(self) -> int:
        """Processes of the pool that were replaced."""
        return self._pool.restarts

    @property
    def polls(self) -> int:
        """Rises while something is asked or scored, which all have limits of their own."""
        return self._pool.polls

    @property
    def pending(self) -> int:
        """Samples submitted and not yet returned by `poll`."""
        return self._asking + self._pool.pending

    @property
    def asking(self) -> bool:
        """Whether everything that is pending waits for models."""
        return self._asking > 0 and not self._pool.pending

    @property
    def has_capacity(self) -> bool:
        """Whether more samples are welcome."""
        return self._asking < QUESTIONS and self._pool.has_capacity

    def poll(self, wait_s: float) -> list[tuple[T, Verdict]]:
        """As the pool's; raises also what asking raised that was no answer: `Closed`, or a defect."""
        until = time.monotonic() + wait_s
        while True:
            left_s = max(0.0, until - time.monotonic())
            self._hand_over(0.0 if self._pool.pending else left_s)
            whole: list[tuple[T, Verdict]] = []
            slice_s = 0.0 if not self._pool.pending else min(left_s, _HAND_OVER_S) if self._asking else left_s
            for (unit, tag), verdict in self._pool.poll(slice_s):
                unit.verdicts.append((tag, verdict))
                whole += unit.verdicts if len(unit.verdicts) == len(unit.samples) else []
            if whole or time.monotonic() >= until or not self.pending:
                return whole

    def _hand_over(self, wait_s: float) -> None:
        """Gives answered samples to the pool; waits for the first."""
        try:
            while self._asking:
                unit = self._answered.get(timeout=wait_s)
                if isinstance(unit, BaseException):
                    raise unit
                self._asking -= len(unit.samples)
                self._pool.submit(((unit, tag), sample) for tag, sample in unit.samples)
                wait_s = 0.0
        except queue.Empty:
            pass


# ---------------------------------------------------------------------------------------- what is asked


def behind_models(pool: RewardPool[Any], spec: RewardSpec, served: Callable[[RewardTerm], Send]) -> AskFirst[Any]:
    """The pool behind the models and judges of a recipe. served: what asks the model that the run serves for a term. Raises
    ConfigError for a judge without a prompt, or a key."""
    asks, apis = dict[str, Ask](), list[ChatAPI]()
    for term in spec.terms():
        if judge := term.judge:
            apis += [ChatAPI(judge, spec.deadline_s)] if judge.url else []
            write, send = partial(question, read_prompt(judge)), apis[-1] if judge.url else served(term)
            asks[term.name] = ask_by(send, write, n=judge.n, pairwise=judge.pairwise)
        elif term.model:
            asks[term.name] = ask_by(served(term), conversation)
    return AskFirst(pool, asks, apis, by_group=spec.pairwise)


def ask_by(send: Send, write: Callable[..., Chat], *, n: int = 1, pairwise: bool = False) -> Ask:
    """Asks `n` times about each sample what `write(sample)` says; or about each two, in both orders: of an evaluation about
    none, as answers of one policy say nothing of it when they are compared with each other.

    write: raises ValueError for what can't be asked.
    """
    room = asyncio.Semaphore(QUESTIONS)

    async def one(*samples: Sample) -> Opinion:
        try:
            return await _insistent(send, write(*samples), room)
        except ValueError as error:
            return Opinion("invalid", error=str(error))

    async def each(samples: Sequence[Sample]) -> list[Opinion]:
        answers = await asyncio.gather(*(one(sample) for sample in samples for _ in range(n)))
        return [_joined(answers[place : place + n]) for place in range(0, len(answers), n)]

    async def pairs(samples: Sequence[Sample]) -> list[Opinion]:
        compared = samples if samples[0].purpose == "train" else ()
        orders = list(permutations(range(len(compared)), 2))
        of = dict(zip(orders, await asyncio.gather(*(one(samples[a], samples[b]) for a, b in orders)), strict=True))
        return [_joined([of[pair] for a, b in orders if a == i for pair in ((a, b), (b, a))]) for i in range(len(samples))]

    return pairs if pairwise else each


def _joined(answers: Sequence[Opinion]) -> Opinion:
    """All their texts; or the first failure among them. A single one as it is."""
    failed = next((answer for answer in answers if answer.status != "ok"), None)
    if failed or len(answers) == 1:
        return failed or answers[0]
    return Opinion("ok", texts=[text for answer in answers for text in answer.texts])


async def _insistent(send: Send, chat: Chat, room: asyncio.Semaphore) -> Opinion:
    """Asks, when there is room, and again where that may help; what does not is `timeout` or `invalid`."""
    for attempt in range(TRIES):
        if attempt:
            await asyncio.sleep(_AGAIN_S * 2 ** (attempt - 1))
        try:
            async with room:
                return await send(chat)
        except TimeoutError:
            return Opinion("timeout", error="no answer within reward.deadline_s")
        except Unavailable as error:
            why = str(error)
    return Opinion("invalid", error=f"no answer to {TRIES} requests: {why}")


# -------------------------------------------------------------------------------------------------- an API


class ChatAPI:
    """A judge behind an OpenAI-compatible API. Call it from one event loop, and `close` it there.

    Raises ConfigError if its key is not in the environment. The key is in no error: also not where the API repeats it.
    """

    def __init__(self, judge: JudgeSpec, deadline_s: float) -> None:
        self._judge, self._deadline_s = judge, deadline_s
        self._url = f"{judge.url.rstrip('/')}/chat/completions"
        self._key = api_key(judge)
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, chat: Chat) -> Opinion:
        """The text of its answer. Raises TimeoutError, and Unavailable where it can't be reached or has trouble of its own."""
        if self._session is None:
            headers = {"authorization": f"Bearer {self._key}"} if self._key else None
            self._session = aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=None))
        body: dict[str, Any] = {"messages": [{"role": "user", "content": chat}], "model": self._judge.served_name or "default"}
        body |= {"temperature": self._judge.temperature, "max_tokens": self._judge.max_tokens}
        try:
            async with (
                asyncio.timeout(self._deadline_s),
                self._session.post(self._url, json=body, allow_redirects=False) as response,
            ):
                text = b""
                async for piece in response.content.iter_any():
                    text += piece
                    if len(text) > _ANSWER_BYTES:
                        return Opinion("invalid", error=f"{self._url}: an answer of more than {_ANSWER_BYTES} bytes")
        except aiohttp.ClientError as error:
            raise Unavailable(f"{self._url}: {type(error).__name__}: {error}") from error
        if response.status == 429 or response.status >= 500:
            raise Unavailable(self._shown(response.status, text))
        try:
            choice = msgspec.json.decode(text)["choices"][0]  # it refuses what could not be encoded again
            if response.status == 200 and isinstance(said := choice["message"]["content"], str):
                if choice.get("finish_reason") == "length":  # what it quotes could be taken for its score
                    return Opinion("invalid", error=f"the judge's text was cut at max_tokens={self._judge.max_tokens}")
                return Opinion("ok", texts=[said])
        except (msgspec.MsgspecError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            pass  # told as it came
        return Opinion("invalid", error=self._shown(response.status, text))

    def _shown(self, status: int, text: bytes) -> str:
        said = text.decode(errors="replace")
        return f"{self._url}: status {status}: {said.replace(self._key, MASK) if self._key else said}"[:500]

    async def close(self) -> None:
        """Ends its connections."""
        if self._session is not None:
            await self._session.close()
