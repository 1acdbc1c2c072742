"""What an episode earned and what it took, told apart."""

from asyncrl.episodes.environments import Step
from asyncrl.episodes.story import Story


def test_calls_of_tools_are_counted_beside_what_was_earned() -> None:
    story = Story()
    calls = [{"function": {"name": "look", "arguments": arguments}} for arguments in ({}, {"at": 1}, "{")]
    told = {"tool_calls": 3.0, "tool_failures": 2.0, "n": 1.0}  # the environment's own count of calls is not needed
    story.add({"role": "assistant", "content": "", "tool_calls": calls}, Step(parts=told))
    story.add({"role": "assistant", "content": "done"}, Step(parts={"n": 1.0}))
    assert story.ended("ok", "done").parts == {"n": 2.0}
    figures = story.figures()
    assert (figures["tool_calls"], figures["tool_failures"], figures["malformed_calls"]) == (3, 2, 1)
