"""Episodes beside an engine: the policy answers an environment, or an agent's calls, many episodes at a time.

ticket ─► an episode for each rollout ─► Trajectory (future)
              environment.reset ─► prompt ─► engine ─► reply ─► environment.step ─► prompt ─► …
              agent ─► HTTP ─► gateway ─► prompt ─► engine ─► reply ─► agent ─► …
              (a process of its own)                            (waits for nobody else's)
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

import msgspec
from msgspec.structs import replace

from asyncrl.config import EpisodeSpec
from asyncrl.config.callables import describe
from asyncrl.episodes.chat import Chat, Turn
from asyncrl.episodes.children import EpisodeFailed, EpisodePool, Running
from asyncrl.episodes.conversations import Conversations
from asyncrl.episodes.environments import Task
from asyncrl.episodes.session import Budget, Session
from asyncrl.episodes.story import Story
from asyncrl.errors import Closed
from asyncrl.interfaces import Engine
from asyncrl.loops import LoopThread
from asyncrl.types import EpisodeStop, Generation, GenerationRequest, Ticket, Trajectory, derive_seed

CLOSE_TIMEOUT_S = 10.0
MOST = 4  # episodes per slot of the engine, if the recipe says nothing
T = TypeVar("T")


class EpisodeHost:
    """Runs the episodes of tickets in a thread of its own, with an engine that others own. Thread-safe; never waits.

    record: the dataset row of a prompt as JSON, by its number and the ticket's purpose. pool: owned, and closed with it.
    """

    def __init__(
        self,
        engine: Engine,
        pool: EpisodePool,
        chat: Chat,
        spec: EpisodeSpec,
        budget: Budget,
        record: Callable[[int, str], str],
        seed: int = 0,
    ) -> None:
        self._engine, self._pool, self._chat, self._spec, self._budget = engine, pool, chat, spec, budget
        self._record, self._seed = record, seed
        self._tasks: dict[int, set[asyncio.Task[None]]] = {}  # by group
        self._counts: Counter[str] = Counter()
        self._environment_s = self._engine_s = self._alive_s = 0.0
        self._away = 0  # episodes that the engine has nothing to do for
        self._loop = LoopThread("episodes")
        self._loop.start()
        self._gateway, self._base_url = None, ""
        if spec.agent:
            from asyncrl.episodes.gateway import Gateway  # it needs aiohttp

            self._gateway = Gateway(self._counts)
            self._base_url = self._loop.ask(self._gateway.start()).result(CLOSE_TIMEOUT_S)

    def submit(self, ticket: Ticket) -> "list[Future[Generation]]":
        """Begins an episode for each rollout of the ticket. The futures end as an engine's do."""
        futures: list[Future[Generation]] = [Future() for _ in ticket.rollouts]

        def begin() -> None:
            tasks = self._tasks.setdefault(ticket.group, set())
            for rollout, seed, future in zip(ticket.rollouts, ticket.seeds, futures, strict=True):
                task = self._loop.spawn(self._run(ticket, rollout, seed, future))
                tasks.add(task)
                task.add_done_callback(lambda task: self._ended(ticket.group, task))

        if (ended := self._loop.call(begin)) is not None:
            for future in futures:
                future.set_exception(ended)
        return futures

    @property
    def slots(self) -> int:
        """Episodes that are welcome at a time: those that wait for their environments leave their slots to others."""
        slots = self._engine.slots
        return min(self._spec.in_flight or MOST * slots, slots + self._away)

    def abort(self, group: int) -> None:
        """Ends a group's episodes: their processes are killed, and the engine drops what it does for them."""

        def end() -> None:
            for task in self._tasks.get(group, ()):
                self._loop.call(task.cancel)  # later: before its first step it would not answer for its future

        self._loop.call(end)
        self._engine.abort(group)

    def close(self) -> None:
        """Ends all. Futures that are left end as aborted. Idempotent."""
        self._loop.close(Closed("the episodes were ended"), self._end, CLOSE_TIMEOUT_S)

    async def _end(self) -> None:
        try:
            if self._gateway is not None:
                await self._gateway.stop()
        finally:
            self._pool.close()

    def gauges(self) -> dict[str, float]:
        """Episodes by how they stopped, turns, seconds spent in environments and in the engine (summed over episodes side by
        side), processes that fork replaced: totals."""
        counts = {name: float(count) for name, count in list(self._counts.items())}
        seconds = {"environment_s": self._environment_s, "engine_s": self._engine_s}
        return {**counts, **seconds, "pool_restarts": float(self._pool.restarts)}

    def progress(self) -> int:
        """Rises while episodes run, which have limits of their own."""
        if self._tasks:
            self._alive_s = time.monotonic()
        return self._counts["turns"] + int(self._alive_s)

    def _ended(self, group: int, task: "asyncio.Task[None]") -> None:
        self._tasks[group].discard(task)
        if not self._tasks[group]:
            del self._tasks[group]

    async def _run(self, ticket: Ticket, rollout: int, seed: int, future: "Future[Generation]") -> None:
        name = ticket.name_of(rollout)
        session = Session(name, ticket.group, ticket.sampling_of(rollout), seed, self._budget)
        try:
            future.set_result(await self._episode(self._task(ticket, rollout), session))
        except (asyncio.CancelledError, _Aborted):  # the store has it done again, or does not want it any more
            future.set_result(
                Generation(id=name, token_ids=[], logprobs=[], kept_logmass=None, spans=(), finish_reason="abort")
            )
        except Exception as error:  # the engine's, or that no environment can be started: it ends the generator
            future.set_exception(error)

    def _task(self, ticket: Ticket, rollout: int) -> Task:
        return Task(
            row=msgspec.json.decode(self._record(ticket.prompt.row, ticket.purpose)),
            group=ticket.group,
            rollout=rollout,
            attempt=ticket.attempt,
            seed=derive_seed(self._seed, ticket.group),
            purpose=ticket.purpose,
        )

    async def _episode(self, task: Task, session: Session) -> Trajectory:
        """One episode to its end, however it ends."""
        story, before_s = Story(), 0.0
        running: Running | None = None
        try:
            async with asyncio.timeout(self._spec.deadline_s):
                running = await self._pool.start()
                self._away += 1
                before_s = running.busy_s
                play = self._play if self._gateway is None else self._serve
                stop = await play(running, task, session, story)
            episode = story.ended("ok", stop)
        except TimeoutError:
            episode = story.ended("timeout", "deadline", f"no end within episode.deadline_s={self._spec.deadline_s:g}")
        except _Late as error:
            episode = story.ended("timeout", "deadline", str(error))
        except EpisodeFailed as error:
            if story.broken:
                raise story.broken from error
            episode = story.ended("invalid", "error", str(error))
        finally:
            if running is not None:
                self._away -= 1
                self._pool.done(running)
                # An agent's process is busy while it waits for the policy, too.
                story.environment_s = max(0.0, running.busy_s - before_s - (story.engine_s if self._gateway else 0.0))
            self._environment_s += story.environment_s
            self._engine_s += story.engine_s
        self._counts.update({"episodes": 1, f"stop/{episode.stop}": 1})
        return session.trajectory(replace(episode, figures=story.figures()))

    async def _play(self, running: Running, task: Task, session: Session, story: Story) -> EpisodeStop:
        """Turns until one side ends it. Why it ended."""
        begun = await self._in_time(running.begin(task))
        story.messages += begun.messages
        prompt_ids = _shown(self._chat.prompt, begun.messages, begun.tools)
        if not session.room(prompt_ids):
            room = f"engine.max_length={self._budget.context}"
            raise EpisodeFailed(f"its prompt of {len(prompt_ids)} tokens leaves no room for an answer in {room}; raise that")
        for _ in range(self._spec.max_turns):
            if not session.room(prompt_ids):
                return "max_tokens"
            request = session.request(prompt_ids)
            answer = await self._generated(story, request)
            session.record(request, answer)
            turn = Turn(prompt_ids, answer.token_ids, answer.finish_reason == "stop")
            reply = self._chat.reply(turn, begun.tools)
            step = await self._in_time(running.step(reply))
            story.add(reply, step)
            if step.done:
                return "done"
            following = _shown(self._chat.next_prompt, turn, step.messages, begun.tools)
            prompt_ids = following or _shown(self._chat.prompt, story.messages, begun.tools)
        return "max_turns"

    async def _serve(self, running: Running, task: Task, session: Session, story: Story) -> EpisodeStop:
        """Answers what an agent asks, until it ends."""
        assert self._gateway is not None
        conversations = Conversations(session, self._chat, partial(self._generated, story), self._spec.max_turns)
        key = self._gateway.open(conversations)
        try:
            ended = await running.engage(task, self._base_url, key)
        finally:
            self._gateway.close(key)
            story.messages = conversations.messages
            story.calls.update({**conversations.parts, "malformed_calls": conversations.parts["tool_failures"]})
        if story.broken:
            raise story.broken
        story.earned(ended.reward, ended.parts)
        return "done"

    async def _generated(self, story: Story, request: GenerationRequest) -> Generation:
        self._away -= 1
        began = time.monotonic()
        try:
            answer = await asyncio.wrap_future(self._engine.submit_group([request])[0])
            if answer.finish_reason == "abort":
                raise _Aborted
        except Exception as error:  # an agent sees a call that failed, and may go on
            story.broken = error
            raise
        finally:
            self._away += 1
            story.engine_s += time.monotonic() - began
        self._counts["turns"] += 1
        return answer

    async def _in_time(self, call: Awaitable[T]) -> T:
        limit_s = self._spec.step_deadline_s
        try:
            async with asyncio.timeout(limit_s):
                return await call
        except TimeoutError:
            raise _Late(f"the environment did not answer within episode.step_deadline_s={limit_s:g}") from None


def _shown(render: Callable[..., T], *what: Any) -> T:
    """Messages as token ids. What a template makes of an environment's messages is the environment's to answer for."""
    try:
        return render(*what)
    except Exception as error:
        raise EpisodeFailed(f"the chat template can't show the environment's messages: {describe(error)}") from error


class _Late(Exception):
    """The environment passed the deadline of a step."""


class _Aborted(Exception):
    """The engine gave up an answer."""
