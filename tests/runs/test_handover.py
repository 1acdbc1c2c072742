"""A generator is killed in the middle of long answers: another one goes on with them."""

import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from asyncrl import Trainer
from asyncrl.config import Deployment, EngineSpec, GeneratorsSpec, LimitsSpec, ModelSpec, SamplingSpec, StalenessSpec
from asyncrl.replay import open as open_log
from asyncrl.replay.log import events as ev
from asyncrl.report.pace import restarts
from asyncrl.report.summary import RunSummary

pytestmark = pytest.mark.ray
INTERVAL, LENGTH = 64, 1000


def model_that_never_ends(arithmetic: Any, folder: Path) -> Path:
    """Random, but for a constant in the first number of every hidden state, which makes the end of sequence unlikely."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    config = Qwen3Config(vocab_size=17, **shape, **heads, tie_word_embeddings=False, pad_token_id=0, eos_token_id=1)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
        model.model.embed_tokens.weight[:, 0] = 1.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[1, 0] = -20.0
    model.save_pretrained(folder)
    arithmetic.make_tokenizer().save_pretrained(folder)
    return folder


class Killer:
    """Kills the generator once every answer has got so far, and remembers when."""

    def __init__(self, runs: Path, answers: int, tokens: int) -> None:
        self._runs, self._answers, self._tokens = runs, answers, tokens
        self.at = 0.0
        self.told = ""

    def __call__(self, run: RunSummary) -> None:
        self.told = restarts(run)
        if self.at == 0.0 and "generator-0" in run.pids and (self._runs / run.name / "replay" / "events").is_dir():
            so_far = Counter[tuple[int, int]]()
            for event in open_log(self._runs / run.name).decoded(ev.RolloutStreamed):
                so_far[event.group, event.rollout] += event.length
            if len(so_far) == self._answers and min(so_far.values()) >= self._tokens:
                os.kill(run.pids["generator-0"], signal.SIGKILL)
                self.at = time.time()


@pytest.mark.timeout(180)
def test_long_answers_survive_their_generator(
    local_ray, arithmetic, tiny_recipe, events_of, assert_nothing_lost, metrics_of, tmp_path
):
    model = ModelSpec(path=str(model_that_never_ends(arithmetic, tmp_path / "model")))
    recipe = tiny_recipe(
        model=model, sampling=SamplingSpec(n=4, max_response_length=LENGTH), staleness=StalenessSpec(max_lag=0), total_steps=1
    )
    generators = GeneratorsSpec(engine=EngineSpec(stream_interval=INTERVAL, slots=16))
    killer = Killer(tmp_path, 16, 2 * INTERVAL)
    deployment = Deployment(generators=generators, limits=LimitsSpec(poll_s=0.5))
    with Trainer(recipe, deployment, runs_dir=tmp_path, observe=killer) as trainer:
        trainer.fit()
        result = trainer.finish()
    events = events_of(result.run_dir)
    assert_nothing_lost(events, result)
    assert result.restarts == {"generator-0": 1}

    died = next(i for i, e in enumerate(events) if isinstance(e, ev.HolderDied))
    kept = Counter[tuple[int, int]]()
    for e in events[:died]:
        if isinstance(e, ev.RolloutStreamed):
            kept[e.group, e.rollout] += e.length
    again = [e for e in events if isinstance(e, ev.GroupReissued)]
    assert [e.dropped for e in again] == [()] * 4
    assert sum(e.lost for e in again) == 16 * INTERVAL  # at the most
    assert f"{sum(kept.values()):,} tokens kept, {16 * INTERVAL:,} lost at most" in killer.told

    log = open_log(result.run_dir)
    table = log.events(["time", "kind"]).to_pylist()
    times = sorted({line["time"] for line in table if line["kind"] == "streamed" and line["time"] <= killer.at})
    pace = INTERVAL * (len(times) - 1) / (times[-1] - times[0])  # tokens of an answer per second
    print(f"kept {sum(kept.values())}, lost about {16 * pace * (killer.at - times[-1]):.0f} tokens of {16 * LENGTH}")

    rows = {(row["group"], row["rollout"]): row for row in log.rollouts().to_pylist()}
    assert len(rows) == 16
    assert {len(row["response_ids"]) for row in rows.values()} == {LENGTH}
    pieces = pq.read_table(Path(result.run_dir) / "replay" / "pieces").to_pylist()
    assert {piece["attempt"] for piece in pieces} == {0, 1}
    for piece in pieces:  # of both generators: exactly what was trained
        row, part = rows[piece["group"], piece["rollout"]], slice(piece["start"], piece["start"] + len(piece["token_ids"]))
        assert (row["response_ids"][part], row["logprobs"][part]) == (piece["token_ids"], piece["logprobs"])
    (step,) = metrics_of(result.run_dir, "step")
    assert step["gap/logprob_max_abs"] <= 1e-5
    assert step["staleness/lag_max"] == 0
