"""pydantic-ai's agents, as they are, over each API that the gateway speaks."""

import asyncio
from typing import Any

import pytest

pydantic_ai = pytest.importorskip("pydantic_ai", reason="needs pydantic-ai-slim[openai] (pip install 'asyncrl[test]')")
CALL = 14  # the word that calls `look`


def model_of(kind: str, served: Any) -> Any:
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    if kind == "messages":
        pytest.importorskip("anthropic", reason="needs anthropic (pip install 'asyncrl[test]')")
        from pydantic_ai.models.anthropic import AnthropicModel
        from pydantic_ai.providers.anthropic import AnthropicProvider

        provider = AnthropicProvider(api_key=served.key, base_url=served.base_url.removesuffix("/v1"))
        return AnthropicModel("policy", provider=provider)
    provider = OpenAIProvider(base_url=served.base_url, api_key=served.key)
    return {"chat": OpenAIChatModel, "responses": OpenAIResponsesModel}[kind]("policy", provider=provider)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("kind", ["chat", "responses", "messages"])
def test_an_agent_with_a_tool(serve, engine, ids, kind: str, streamed: bool) -> None:
    """Two calls of a tool at once, an answer, and a second run that goes on with the first: all one segment."""
    engine.script = [[CALL, CALL, 1], [6, 1], [7, 1]]
    looked = []

    async def talk() -> Any:
        async with serve() as served:
            agent = pydantic_ai.Agent(model_of(kind, served), instructions="here")

            @agent.tool_plain
            def look(at: str) -> str:
                """Looks.

                Args:
                    at: Where.
                """
                looked.append(at)
                return "here"

            async def run(question: str, **how: Any) -> Any:
                if not streamed:
                    return await agent.run(question, **how)
                async with agent.run_stream(question, **how) as stream:
                    await stream.get_output()
                return stream

            first = await run("hello")
            second = await run("hello", message_history=first.all_messages())
            usage = second.new_messages()[-1].usage
            assert (usage.input_tokens, usage.output_tokens) == (28, 2)
            return served.trajectory()

    made = asyncio.run(talk())
    assert looked == ["here", "here"]
    assert made.prompt_ids == tuple(ids("<system> look nl <system> here nl <user> hello nl <assistant>"))
    tools, question = ids("nl <tool> here nl <tool> here nl <assistant>"), ids("nl <user> hello nl <assistant>")
    assert made.token_ids == [CALL, CALL, 1, *tools, 6, 1, *question, 7, 1]
    assert made.segments == (0,)
