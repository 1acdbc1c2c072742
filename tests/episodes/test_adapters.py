"""Environments of other frameworks, unmodified."""

import asyncio
from typing import Any

import pytest

from asyncrl.episodes.adapters import environment_of
from asyncrl.episodes.environments import Task
from asyncrl.errors import ConfigError


def task(**row: object) -> Task:
    row = {"prompt": [{"role": "system", "content": "You play."}, {"role": "user", "content": "Go."}], **row}
    return Task(row=row, group=0, rollout=0, attempt=0, seed=1 << 40, purpose="train")


def say(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize("named", ["make", "class"])
def test_skyrl_gyms_gsm8k(named: str) -> None:
    skyrl_gym = pytest.importorskip("skyrl_gym", reason="needs skyrl-gym (pip install 'asyncrl[test]')")
    from skyrl_gym.envs.gsm8k.multi_turn_env import GSM8kMultiTurnEnv

    make, arguments = (skyrl_gym.make, {"id": "gsm8k_multi_turn"}) if named == "make" else (GSM8kMultiTurnEnv, {})
    environment = environment_of(make, arguments)
    asked = task(reward_spec={"ground_truth": "42"}, extra_info={"max_turns": 3})
    assert environment.reset(asked) == asked.row["prompt"]
    first = environment.step(say("6 times 7 is\n#### 41"))
    assert (first.reward, first.done, first.messages[0]["role"]) == (pytest.approx(0.2 / 3), False, "user")
    assert "#### ANSWER" in first.messages[0]["content"]
    assert environment.step(say("I do not know")).reward == 0.0
    last = environment.step(say("#### 42"))
    assert (last.reward, last.done, last.messages) == (1.0, True, ())
    environment.close()


def test_gymnasiums_frozen_lake() -> None:
    gymnasium = pytest.importorskip("gymnasium", reason="needs gymnasium (pip install 'asyncrl[test]')")
    environment = environment_of(gymnasium.make, {"id": "FrozenLake-v1", "is_slippery": False})
    begun = environment.reset(task())
    assert [message["content"] for message in begun] == ["You play.", "Go.\n0"]
    wrong = environment.step(say("down"))
    assert (wrong.reward, wrong.done) == (0.0, False)
    assert wrong.messages[0]["content"] == "no action: 'down' is not in Discrete(4)"
    path = ["1", "1", "2", "2", "1", "2"]  # 1: down, 2: right
    steps = [environment.step(say(move)) for move in path]
    assert [step.messages[0]["content"] for step in steps] == ["4", "8", "9", "10", "14", "15"]
    assert [(step.reward, step.done) for step in steps] == [(0.0, False)] * 5 + [(1.0, True)]
    environment.close()


def test_a_class_of_the_users_own_that_derives_from_theirs() -> None:
    gymnasium = pytest.importorskip("gymnasium", reason="needs gymnasium (pip install 'asyncrl[test]')")

    class Echo(gymnasium.Env):
        action_space = gymnasium.spaces.Text(8, charset="abc")

        def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[str, dict]:
            return "a", {}

        def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
            return action, 0.5, False, True, {}

    environment = environment_of(Echo, {})
    environment.reset(task())
    step = environment.step(say("cab"))
    assert (step.messages[0]["content"], step.reward, step.done) == ("cab", 0.5, True)
    assert environment.step(say("xyz")).messages[0]["content"].startswith("no action: 'xyz'")


# --------------------------------------------------------------------------------------------------- TRL


def multiply(a: int, b: int) -> int:
    """Multiplies two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a * b


async def slow_add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: The first.
        b: The second.
    """
    await asyncio.sleep(0)
    return a + b


class Counter:
    """An environment as TRL's `environment_factory` makes it."""

    def reset(self, goal: int, **columns: object) -> str:
        self.goal, self.count = goal, 0
        return f" Count to {goal}."

    def increment(self, step: int) -> str:
        """Counts on.

        Args:
            step: By how much.
        """
        self.count += step
        return f"at {self.count}"

    def get_reward(self) -> float:
        return float(self.count == self.goal)


def call(name: str, number: int = 0, **arguments: object) -> dict[str, Any]:
    return {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def test_tools_of_trl() -> None:
    environment = environment_of(None, {}, [multiply, slow_add])
    assert [tool["function"]["name"] for tool in environment.tools] == ["multiply", "slow_add"]
    assert environment.tools[0]["function"]["parameters"]["required"] == ["a", "b"]
    assert "return" not in environment.tools[0]["function"]

    async def play() -> None:
        assert await environment.reset(task()) == task().row["prompt"]
        calls = [call("multiply", 0, a=6, b=7), call("slow_add", 1, a=1, b=2), call("divide", 2), call("multiply", 3, a=1)]
        step = await environment.step({**say(""), "tool_calls": calls})
        assert [(m["role"], m["name"], m["tool_call_id"]) for m in step.messages[:2]] == [
            ("tool", "multiply", "call_0"),
            ("tool", "slow_add", "call_1"),
        ]
        told = [message["content"] for message in step.messages]
        assert told[:2] == ["42", "3"]
        assert "there is no tool 'divide'; there are multiply, slow_add" in told[2]
        assert "error: TypeError: multiply() missing 1 required positional argument: 'b'" in told[3]
        assert (step.done, step.parts) == (False, {"tool_calls": 4.0, "tool_failures": 2.0})
        last = await environment.step(say("It is 42."))
        assert (last.done, last.messages, last.reward) == (True, (), 0.0)

    asyncio.run(play())


def test_an_environment_of_trl() -> None:
    environment, other = (environment_of(Counter, {}, [multiply]) for _ in range(2))
    assert all(one is another for one, another in zip(environment.tools, other.tools, strict=True))  # described once

    async def play() -> None:
        begun = await environment.reset(task(goal=5))
        assert begun[-1]["content"] == "Go. Count to 5."
        assert [tool["function"]["name"] for tool in environment.tools] == ["multiply", "increment"]
        rewards = []
        for steps in ([2], [3], []):
            calls = [call("increment", step=step) for step in steps]
            rewards.append((await environment.step({**say(""), "tool_calls": calls})).reward)
        assert rewards == [0.0, 1.0, 0.0]  # their sum is what it says in the end

    asyncio.run(play())


def test_a_tool_without_a_description_is_refused() -> None:
    def bare(x):  # type: ignore[no-untyped-def]
        return x

    with pytest.raises(ConfigError, match=r"episode\.tools: bare can't be described to a model: .*no docstring"):
        environment_of(None, {}, [bare])


def test_tools_that_nobody_would_call_are_refused() -> None:
    class Own:
        def reset(self, task: Task) -> list: ...
        def step(self, reply: dict) -> None: ...

    with pytest.raises(ConfigError, match=r"episode\.tools with an episode\.environment that has a step of its own"):
        environment_of(Own, {}, [multiply])
