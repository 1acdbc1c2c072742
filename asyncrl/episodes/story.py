"""What is known of an episode that goes on, but for its tokens."""

from collections import Counter
from collections.abc import Mapping

import msgspec

from asyncrl.episodes.chat import unreadable
from asyncrl.episodes.environments import Message, Step
from asyncrl.types import Episode, EpisodeStop, Status


class Story:
    """What was said, what was earned so far, and what it took."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.broken: Exception | None = None  # what the engine answered with: then the episode is worth nothing
        self.environment_s = self.engine_s = 0.0  # in the user's code, and waiting for answers
        self.calls: Counter[str] = Counter(tool_calls=0, tool_failures=0, malformed_calls=0)
        self._reward: float | None = None
        self._turn_rewards: list[float] = []
        self._parts: Counter[str] = Counter()

    def add(self, reply: Message, step: Step) -> None:
        self.messages += [reply, *step.messages]
        self._turn_rewards.append(step.reward)
        calls = reply.get("tool_calls", ())
        failed = step.parts.get("tool_failures", 0.0)
        self.calls.update({"tool_calls": len(calls), "tool_failures": failed, "malformed_calls": unreadable(reply)})
        self.earned(step.reward, step.parts)

    def earned(self, reward: float | None, parts: Mapping[str, float]) -> None:
        """Adds to what was earned; None says nothing."""
        if reward is not None:
            self._reward = (self._reward or 0.0) + reward
        self._parts.update(parts)

    def ended(self, status: Status, stop: EpisodeStop, error: str = "") -> Episode:
        return Episode(
            status=status,
            reward=self._reward if status == "ok" else None,
            parts={name: value for name, value in self._parts.items() if name not in self.calls},
            turn_rewards=tuple(self._turn_rewards) or None,
            stop=stop,
            error=error,
            messages=msgspec.json.encode(self.messages).decode(),
        )

    def figures(self) -> dict[str, float]:
        """Calls of tools, and seconds."""
        return {**self.calls, "environment_s": self.environment_s, "engine_s": self.engine_s}
