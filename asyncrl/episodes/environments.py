"""What a user writes for an episode: an environment that answers the policy, turn by turn.

    class Guess:
        def reset(self, task): return [{"role": "user", "content": task.row["question"]}]
        def step(self, reply): return Step(reward=float(reply["content"] == "7"), done=True)
        def close(self): ...                                                             # may be left out

One object per episode, made by calling what the recipe names (`episode.environment`) with `episode.arguments`. It has a
process to itself while it lasts; the next one in that process sees what it left in modules. Methods may be `async def`. What
they print goes to the run's logs.
"""

from collections.abc import Awaitable, Sequence
from typing import Any, Protocol

from msgspec import Struct

Message = dict[str, Any]  # as in OpenAI's chat API: role, content, …


class Task(Struct, frozen=True, kw_only=True, tag="task"):
    """What an episode is about."""

    row: dict[str, Any]  # the dataset row by column, its prompt under "prompt"
    group: int  # the same for all episodes of a prompt
    rollout: int  # which of them
    attempt: int  # rises when it is done again, after a death: side effects elsewhere are then repeated
    seed: int  # the same for all episodes of a group: what starts them alike, so that they can be compared
    purpose: str  # "train" or "eval"


class Step(Struct, frozen=True, kw_only=True):
    """An environment's answer to one turn of the policy."""

    messages: tuple[Message, ...] = ()  # what the policy reads next
    reward: float = 0.0  # an episode's reward is the sum of its steps'
    done: bool = False
    parts: dict[str, float] = {}  # named figures, summed over the steps


class Environment(Protocol):
    """Sync or async. An exception ends the episode as `invalid`. An attribute `tools` lists, as JSON schemas, what the chat
    template tells the policy that it may call; calls are in `reply["tool_calls"]`, as in OpenAI's API, but for `arguments`,
    which is an object."""

    def reset(self, task: Task) -> Sequence[Message] | Awaitable[Sequence[Message]]:
        """The messages that the episode starts with."""

    def step(self, reply: Message) -> Step | Awaitable[Step]:
        """reply: the assistant's message, with its text as `content`."""
