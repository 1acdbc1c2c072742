"""An agent of pydantic-ai with a tool, as its documentation has them: `pydantic_agent.py API STREAMED BASE_URL KEY`.

Two runs, of which the second goes on with the first. Prints what the tool was asked, and what the last answer took, as JSON.
"""

import asyncio
import json
import sys
from typing import Any

from pydantic_ai import Agent
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider


def model_of(api: str, base_url: str, key: str) -> Any:
    if api == "messages":
        return AnthropicModel("policy", provider=AnthropicProvider(api_key=key, base_url=base_url.removesuffix("/v1")))
    provider = OpenAIProvider(base_url=base_url, api_key=key)
    return {"chat": OpenAIChatModel, "responses": OpenAIResponsesModel}[api]("policy", provider=provider)


async def talk(api: str, streamed: str, base_url: str, key: str) -> None:
    agent = Agent(model_of(api, base_url, key), instructions="here")
    looked = []

    @agent.tool_plain
    def look(at: str) -> str:
        """Looks.

        Args:
            at: Where.
        """
        looked.append(at)
        return "here"

    async def run(question: str, **how: Any) -> Any:
        if streamed != "True":
            return await agent.run(question, **how)
        async with agent.run_stream(question, **how) as stream:
            await stream.get_output()
        return stream

    first = await run("hello")
    second = await run("hello", message_history=first.all_messages())
    usage = second.new_messages()[-1].usage
    print(json.dumps([looked, usage.input_tokens, usage.output_tokens]))


if __name__ == "__main__":
    asyncio.run(talk(*sys.argv[1:]))
