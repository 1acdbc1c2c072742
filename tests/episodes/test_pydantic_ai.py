"""pydantic-ai's agents, as they are, over each API that the gateway speaks; in an interpreter of their own."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

AGENT = Path(__file__).parent / "pydantic_agent.py"
CALL = 14  # the word that calls `look`
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("api", "streamed"), [("chat", False), ("responses", True), ("messages", True)])
def test_an_agent_with_a_tool(interpreter, serve, engine, ids, api: str, streamed: bool) -> None:
    """Two calls of a tool at once, an answer, and a second run that goes on with the first: all one segment."""
    python = interpreter("pydantic-ai-slim[openai,anthropic]==2.68.0")
    engine.script = [[CALL, CALL, 1], [6, 1], [7, 1]]

    async def talk() -> Any:
        async with serve() as served:
            command = [python, str(AGENT), api, str(streamed), served.base_url, served.key]
            child = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
            printed, _ = await child.communicate()
            assert json.loads(printed) == [["here", "here"], 28, 2]
            return served.trajectory()

    made = asyncio.run(talk())
    assert made.prompt_ids == tuple(ids("<system> look nl <system> here nl <user> hello nl <assistant>"))
    tools, question = ids("nl <tool> here nl <tool> here nl <assistant>"), ids("nl <user> hello nl <assistant>")
    assert made.token_ids == [CALL, CALL, 1, *tools, 6, 1, *question, 7, 1]
    assert made.segments == (0,)
