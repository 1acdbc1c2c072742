"""Models are asked before functions score, over a real API of a fake judge; whatever that does, a sample has a verdict."""

import asyncio
import gc
import itertools
import json
import threading
from contextlib import contextmanager
from functools import partial

import pytest
from aiohttp import web
from msgspec.structs import replace

from asyncrl.config import JudgeSpec, RewardTerm
from asyncrl.errors import Closed, ConfigError, Unavailable
from asyncrl.reward import asking
from asyncrl.reward.asking import AskFirst, ChatAPI, ask_by
from asyncrl.reward.opinions import question, reader
from asyncrl.reward.pool import RewardPool
from asyncrl.reward.results import Opinion, Sample, Verdict
from asyncrl.rundir import MASK

PAIR = "1. {response_a} 2. {response_b}"


def sample(response, group=0):
    return Sample("s", response, '"x"', "null", json.dumps({"prompt": "p"}), group=group)


@contextmanager
def serving(respond):
    """A server that gives `respond` to everything, in a thread; yields its address."""
    loop, began = asyncio.new_event_loop(), threading.Event()

    async def start():
        app = web.Application(client_max_size=1 << 26)
        app.router.add_route("*", "/{path:.*}", respond)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        began.port, began.runner = site._server.sockets[0].getsockname()[1], runner
        began.set()

    thread = threading.Thread(target=lambda: (loop.create_task(start()), loop.run_forever()), daemon=True)
    thread.start()
    assert began.wait(10)
    try:
        yield f"http://127.0.0.1:{began.port}/v1"
    finally:
        asyncio.run_coroutine_threadsafe(began.runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def completion(text):
    return web.json_response({"choices": [{"message": {"role": "assistant", "content": text}}]})


def answer_of(respond, deadline_s=20.0, **fields):
    """What ask_by makes of one sample, with the API that `respond` is."""

    async def go(url):
        api = ChatAPI(JudgeSpec(prompt="p", url=url, **fields), deadline_s)
        [answer] = await ask_by(api, partial(question, "Q: {response}"))([sample("red")])
        await api.close()
        return answer

    with serving(respond) as url:
        return asyncio.run(go(url))


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(asking, "_AGAIN_S", 0.001)


def test_what_an_api_is_asked_with_its_key_and_what_it_says(monkeypatch):
    monkeypatch.setenv("MY_JUDGE", "sesame-of-40-thieves")
    seen = []

    async def respond(request):
        seen.append((request.path, request.headers["authorization"], await request.json()))
        return completion("score: 4")

    answer = answer_of(respond, key_env="MY_JUDGE", served_name="big", max_tokens=9)
    assert answer == Opinion("ok", texts=["score: 4"])
    [(path, authorization, body)] = seen
    assert (path, authorization) == ("/v1/chat/completions", "Bearer sesame-of-40-thieves")
    messages = [{"role": "user", "content": "Q: red"}]
    assert body == {"model": "big", "messages": messages, "temperature": 0.0, "max_tokens": 9}


CUT = {"finish_reason": "length"}


@pytest.mark.parametrize(
    ("response", "error"),
    [
        (lambda: web.Response(status=400, text="no model; key sesame-of-40-thieves"), f"status 400: no model; key {MASK}"),
        (lambda: web.Response(status=302, headers={"location": "http://127.0.0.1:1/steal"}), "status 302"),
        (lambda: web.Response(status=200, text="<html>"), "status 200: <html>"),
        (lambda: web.Response(status=200, body=b"\xff\xfe" * 9), "status 200"),
        (lambda: web.json_response({"choices": []}), "status 200"),
        (lambda: web.json_response({"choices": [{"message": {"content": None}}]}), "status 200"),
        (lambda: web.json_response([[[]]]), "status 200"),
        (lambda: (gc.collect(), web.Response(status=200, text="[" * 100_000))[1], "status 200"),  # no finalizers that deep
        (lambda: web.Response(text=r'{"choices": [{"message": {"content": "half a \ud83d score: 9"}}]}'), "status 200"),
        (
            lambda: web.json_response({"choices": [{**CUT, "message": {"content": "it says score: 10"}}]}),
            "was cut at max_tokens",
        ),
        (lambda: completion("x" * 10_000_000), "more than 1048576 bytes"),
        (lambda: web.Response(status=503, text="busy"), "status 503: busy"),
    ],
)
def test_an_api_that_does_not_answer_costs_its_sample_and_is_never_a_zero(response, error, monkeypatch):
    monkeypatch.setenv("MY_JUDGE", "sesame-of-40-thieves")

    async def respond(request):
        return response()

    answer = answer_of(respond, key_env="MY_JUDGE")
    assert (answer.status, answer.score, answer.texts) == ("invalid", None, [])
    assert error in answer.error
    assert "sesame" not in answer.error


def test_trouble_that_passes_is_asked_again():
    states = itertools.chain([500, 429, 502], itertools.repeat(200))

    async def respond(request):
        status = next(states)
        return completion("score: 1") if status == 200 else web.Response(status=status)

    assert answer_of(respond).texts == ["score: 1"]


def test_a_connection_that_breaks_is_asked_again():
    broken = itertools.count()

    async def respond(request):
        if next(broken) < 2:
            request.transport.abort()
        return completion("score: 1")

    assert answer_of(respond).texts == ["score: 1"]


def test_an_answer_past_the_deadline_is_a_timeout_also_when_it_drips():
    async def silent(request):
        await asyncio.sleep(60)

    async def drip(request):
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(1000):
            await response.write(b" ")
            await asyncio.sleep(0.02)
        return response

    for respond in (silent, drip):
        assert answer_of(respond, deadline_s=0.2) == Opinion("timeout", error="no answer within reward.deadline_s")


def test_a_key_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.delenv("MY_JUDGE", raising=False)
    with pytest.raises(ConfigError, match="key_env='MY_JUDGE' is not set here"):
        ChatAPI(JudgeSpec(prompt="p", url="http://judge/v1", key_env="MY_JUDGE"), 1.0)


# --------------------------------------------------------------------------------------------- pairs


def pairs_of(responses, say):
    async def send(chat):
        return Opinion("ok", texts=[say(*chat.removeprefix("1. ").split(" 2. "))])

    ask = ask_by(send, partial(question, PAIR), pairwise=True)
    return asyncio.run(ask([sample(response) for response in responses]))


def test_each_two_are_compared_in_both_orders():
    answers = pairs_of(["aa", "b", "c"], lambda a, b: f"{a}>{b}")
    assert answers[0].texts == ["aa>b", "b>aa", "aa>c", "c>aa"]  # first as A, then as B
    assert answers[2].texts == ["c>aa", "aa>c", "c>b", "b>c"]
    assert pairs_of(["aa"], lambda a, b: "")[0] == Opinion("ok")  # nobody to compare with: it does not apply


def test_evaluations_compare_nothing():
    """Of several answers of one policy to one prompt."""
    term = RewardTerm(judge=JudgeSpec(prompt="p", url="http://judge/v1", pairwise=True), name="better")
    asked = []

    async def send(chat):
        asked.append(chat)
        return Opinion("ok", texts=["[[A]]"])

    ask = ask_by(send, partial(question, PAIR), pairwise=True)
    answers = asyncio.run(ask([replace(sample(response), purpose="eval") for response in ("a", "b")]))
    assert (asked, [reader(term)(answer) for answer in answers]) == ([], [Verdict("ok")] * 2)  # it does not apply


@pytest.mark.parametrize(
    ("say", "shares"),
    [
        (lambda a, b: "[[A]]" if len(a) > len(b) else "[[B]]", [1.0, 0.5, 0.0]),
        (lambda a, b: "[[A]]", [0.5, 0.5, 0.5]),  # a judge that likes what stands first tells nothing
        (lambda a, b: "[[C]]", [0.5, 0.5, 0.5]),
    ],
)
def test_the_reward_of_a_pairwise_judge_is_the_share_of_wins(say, shares):
    term = RewardTerm(judge=JudgeSpec(prompt="p", url="http://judge/v1", pairwise=True), name="better")
    assert [reader(term)(answer).reward for answer in pairs_of(["aaa", "bb", "c"], say)] == shares


# ------------------------------------------------------------------------------------- before the pool


@pytest.fixture
def pool(tmp_path):
    path = tmp_path / "reward.py"
    path.write_text("import time\ndef slow(solution_str):\n    time.sleep(solution_str == 'slow' and 600)\n    return 1.0\n")
    terms = (
        RewardTerm(function=f"{path}:slow", name="slow"),
        RewardTerm(judge=JudgeSpec(prompt="p", url="http://judge/v1"), name="j"),
    )
    return lambda deadline_s=20.0: RewardPool(terms, deadline_s=deadline_s)


def poll_all(first, count):
    found = []
    while len(found) < count:
        found.append(first.poll(20))
    return found


def test_samples_reach_functions_with_the_answers_and_a_slow_one_holds_up_no_other(pool):
    gate = threading.Event()

    async def ask(samples):
        if samples[0].solution_str == "late":
            await asyncio.to_thread(gate.wait, 20)
        return [Opinion("ok", texts=[f"score: {len(one.solution_str)}"]) for one in samples]

    with AskFirst(pool(), {"j": ask}) as first:
        first.submit([("a", sample("late")), ("b", sample("x"))])
        assert first.pending == 2
        [[(tag, verdict)]] = poll_all(first, 1)
        assert (tag, verdict.reward, verdict.parts) == ("b", 2.0, {"slow": 1.0, "j": 1.0})
        assert (first.pending, first.asking) == (1, True)
        gate.set()
        [[(tag, verdict)]] = poll_all(first, 1)
        assert (tag, verdict.reward, first.pending) == ("a", 5.0, 0)


def test_a_group_is_asked_about_and_returned_whole(pool):
    asked = []

    async def ask(samples):
        asked.append([one.solution_str for one in samples])
        return [Opinion("ok", texts=["score: 1"]) for _ in samples]

    with AskFirst(pool(deadline_s=0.5), {"j": ask}, by_group=True) as first:
        first.submit([(1, sample("x", 7)), (2, sample("slow", 7)), (3, sample("y", 8))])
        found = []
        while first.pending:
            found.append(dict(first.poll(20)))
    assert sorted(asked) == [["x", "slow"], ["y"]]
    assert {tag: verdict.status for batch in found for tag, verdict in batch.items()} == {1: "ok", 2: "timeout", 3: "ok"}
    assert [batch.keys() >= {1, 2} for batch in found if not batch.keys().isdisjoint({1, 2})] == [True]


def test_that_the_run_is_stopping_is_told_to_whoever_polls(pool):
    async def ask(samples):
        raise Closed("stopped while waiting for model-0.0")

    with AskFirst(pool(), {"j": ask}) as first:
        first.submit([("a", sample("x"))])
        with pytest.raises(Closed, match="model-0"):
            first.poll(20)


def test_an_actor_that_dies_is_asked_again_when_it_is_back():
    deaths = iter([Unavailable("model-0.0: it died"), Unavailable("again")])

    async def send(chat):
        for death in deaths:
            raise death
        return Opinion("ok", 0.5)

    ask = ask_by(send, lambda of: of.solution_str)
    assert asyncio.run(ask([sample("x")])) == [Opinion("ok", 0.5)]
