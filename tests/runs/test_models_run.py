"""Whole runs whose rewards come from a classifier and from judges; their processes die meanwhile."""

import asyncio
import json
import os
import signal
import threading
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import pyarrow.parquet as parquet
import pytest
import torch
from aiohttp import web
from msgspec.structs import replace
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Qwen3Config, Qwen3ForSequenceClassification

from asyncrl import launch
from asyncrl.cli import main
from asyncrl.config import AlgorithmSpec, EvaluationSpec, JudgeSpec, LearnerSpec, ModelSpec, RewardSpec, RewardTerm
from asyncrl.replay import open as open_replay

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def likes_sevens(tmp_path_factory, arithmetic) -> Path:
    """A classifier that has learned how many of the last six characters are sevens."""
    folder = tmp_path_factory.mktemp("likes-sevens")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = Qwen3ForSequenceClassification(Qwen3Config(vocab_size=17, num_labels=1, pad_token_id=0, **sizes, **heads))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        ids_bt = torch.randint(1, 17, (64, 12))
        worth_b = (ids_bt[:, -6:] == 11).float().mean(1)  # <pad> <eos> <user> <assistant> 0 … 7
        loss = (model(input_ids=ids_bt).logits[:, 0] - worth_b).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    arithmetic.make_tokenizer().save_pretrained(folder)
    return folder


def test_a_policy_learns_what_a_classifier_likes_through_its_death(
    local_ray, tiny_recipe, likes_sevens, tmp_path, metrics_of, capsys
):
    killed = []

    def kill(run) -> None:
        if run.committed >= 3 and not killed:
            killed.append(run.pids["model-0.0"])
            os.kill(killed[0], signal.SIGKILL)

    rewards = (
        RewardTerm(model=ModelSpec(path=str(likes_sevens)), name="rm", weight=2.0),
        RewardTerm(function="asyncrl.reward.verify:regex", name="seven", arguments={"pattern": "7"}),
    )
    recipe = tiny_recipe(reward=RewardSpec(functions=rewards), learner=LearnerSpec(batch_groups=8, lr=3e-3), total_steps=16)
    held_out = EvaluationSpec(files=recipe.data.files, limit=32, freq=16)
    recipe = replace(recipe, evaluation=held_out)
    result = launch(recipe, runs_dir=tmp_path, observe=kill)
    assert (result.steps, result.invalid, result.timeout, result.restarts) == (16, 0, 0, {"model-0.0": 1})
    steps = [line["reward/rm"] for line in metrics_of(result.run_dir, "step")]
    assert fmean(steps[-4:]) > fmean(steps[:4]) + 0.1

    model, tokenizer = (auto.from_pretrained(likes_sevens) for auto in (AutoModelForSequenceClassification, AutoTokenizer))
    rows = [row for row in open_replay(result.run_dir).rollouts().to_pylist() if row["status"] == "ok"]
    for row in rows[:: len(rows) // 50]:
        parts = dict(row["parts"])
        ids = torch.tensor([tokenizer(row["prompt"] + row["response"])["input_ids"]])
        with torch.no_grad():
            assert parts["rm"] == pytest.approx(model(input_ids=ids).logits[0, 0].item(), abs=1e-5)
        assert row["reward"] == pytest.approx(2.0 * parts["rm"] + parts["seven"])
    noted = json.loads((Path(result.run_dir) / "rewards" / "rm.json").read_text())
    assert (noted["model"], noted["commit"], len(noted["weights"])) == (str(likes_sevens), "", 64)

    capsys.readouterr()
    out = tmp_path / "samples.parquet"
    asked = ["eval", result.run_dir, "--limit", "32", "--reward-processes", "1", "--device", "cpu", "--out", str(out)]
    assert main(asked) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["score"] == pytest.approx(result.last_score, abs=0.05)  # greedy, in other batches
    assert report["rewards"] == {"rm": noted}
    known = {(row["prompt"], row["response"]): row["reward"] for row in rows if row["purpose"] == "eval"}
    said = [(one["score"], known.get((one["prompt"], one["response"]))) for one in parquet.read_table(out).to_pylist()]
    again = [both for both in said if both[1] is not None]
    assert len(again) >= 28
    assert all(score == pytest.approx(before, abs=1e-5) for score, before in again)


class JudgeServer:
    """Of two answers the one with more sevens; now and then it is in trouble, or says nothing that can be read."""

    def __init__(self) -> None:
        self.asked = 0
        self._loop = asyncio.new_event_loop()
        self._began = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()
        assert self._began.wait(10)

    def _run(self) -> None:
        self._loop.run_until_complete(self._start())
        self._began.set()
        self._loop.run_forever()

    async def _start(self) -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._respond)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}/v1"

    async def _respond(self, request: web.Request) -> web.Response:
        self.asked += 1
        if self.asked % 50 == 0:
            return web.Response(status=503)
        a, b = (await request.json())["messages"][0]["content"].split("\n")
        better = "A" if a.count("7") > b.count("7") else "B" if b.count("7") > a.count("7") else "C"
        text = "I can't tell" if self.asked % 201 == 0 else f"I say [[{better}]]"
        return web.json_response({"choices": [{"message": {"content": text}}]})

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)


def test_a_judge_compares_the_answers_of_a_group_for_dpo(local_ray, tiny_recipe, tmp_path, metrics_of):
    judge = JudgeServer()
    prompt = tmp_path / "better.txt"
    prompt.write_text("{response_a}\n{response_b}")
    spec = JudgeSpec(prompt=str(prompt), url=judge.url, pairwise=True)
    recipe = tiny_recipe(
        reward=RewardSpec(functions=(RewardTerm(judge=spec),)),
        algorithm=AlgorithmSpec(policy_loss="dpo"),
        learner=LearnerSpec(batch_groups=8, lr=1e-3),
        total_steps=8,
    )
    try:
        result = launch(recipe, runs_dir=tmp_path)
    finally:
        judge.close()
    assert result.steps == 8
    assert metrics_of(result.run_dir, "step")[-1]["preferences"] > 0
    groups = defaultdict(list)
    for row in open_replay(result.run_dir).rollouts().to_pylist():
        if row["scored_time"] is not None:
            groups[row["group"]].append(row)
    exact = 0
    for rows in groups.values():
        if [row["status"] for row in rows] != ["ok"] * 4:
            assert {row["status"] for row in rows} == {"ok", "invalid"}, "both of an unread pair, and no other"
            continue
        sevens = [row["response"].count("7") for row in rows]
        for row, own in zip(rows, sevens, strict=True):
            share = (sum((own > other) + 0.5 * (own == other) for other in sevens) - 0.5) / 3
            assert dict(row["parts"])["judge/better"] == row["reward"] == pytest.approx(share)
            assert dict(row["said"])["judge/better"].count("I say [[") == 6
            exact += 1
    assert exact > 4 * 8 * 8 // 2
    assert any(row["status"] == "invalid" for rows in groups.values() for row in rows)
