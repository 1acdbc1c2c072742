"""What a run's directory says of its costs, where it is known what they were."""

import json
from pathlib import Path

import pytest

from asyncrl.config import StoreSpec
from asyncrl.errors import DataError
from asyncrl.replay.log import events as ev
from asyncrl.replay.log.log import ReplayLog
from asyncrl.replay.log.rows import encode_rollouts, read_submitted
from asyncrl.simulate.measured import measure
from asyncrl.types import Prompt, Rollout, Span, Version

STEP_S, ROW_S, UPDATE_S, TOKEN_S, PAUSE_S, START = 0.02, 0.001, 0.5, 0.002, 0.03, 1_700_000_000.0


def rollout(group: int, index: int, began: float, ended: float, tokens: int, swaps: int) -> Rollout:
    spans = [Span(Version(1, update), 1) for update in range(swaps)] + [Span(Version(1, swaps), tokens - swaps)]
    return Rollout(
        group=group,
        rollout=index,
        attempt=0,
        prompt=Prompt(row=0, ids=(1,), data_source="s"),
        response_ids=[1] * tokens,
        logprobs=[0.0] * tokens,
        kept_logmass=None,
        loss_mask=[1] * tokens,
        turns=(0,),
        spans=tuple(spans),
        finish_reason="stop",
        worker="generator-0",
        times={"started": began, "finished": ended},
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """20 updates of groups of 2, 4 or 8 rollouts of 5 to 9 tokens, one group at a time; every third one meets a swap."""
    rollouts, lines, now = [], [], START
    for update in range(1, 21):
        size, tokens, swaps = (2, 4, 8)[update % 3], 5 + update % 5, int(update % 3 == 0)
        ended = now + tokens * (STEP_S + size * ROW_S) + swaps * PAUSE_S
        rollouts += [rollout(update, i, now, ended, tokens, swaps) for i in range(size)]
        now = ended + 1.0
        trained = size * tokens
        step = {"kind": "step", "time": now, "step": update, "samples": size, "tokens/policy": trained}
        times = {"step": UPDATE_S + TOKEN_S * trained, "commit": 0.004, "publish": 0.01, "rows": 0.02}
        lines.append(step | {f"timing_s/{name}": seconds for name, seconds in times.items()})
    actors = {"swaps": 10, "pause_s_total": 10 * PAUSE_S, "update": 20, "swapped_at": now + 0.5 + PAUSE_S}
    said = {f"generator-0/{name}": value for name, value in actors.items()} | {"reward-0/scored": 90, "reward-0/busy_s": 0.9}
    said |= {"learner/busy_s": 9.0, "learner-1/busy_s": 9.0}  # one when the run began, as its deployment says
    lines.append({"kind": "actors", "time": now + 1, "step": 20, **said})
    log = ReplayLog(tmp_path / "replay", StoreSpec())
    log.append_rows(read_submitted(encode_rollouts(rollouts, "run")))
    log.append_events([ev.RolloutSubmitted(r.group, r.rollout, 0, i, 0, 1, 1) for i, r in enumerate(rollouts)])
    log.append_events([ev.GroupSettled(group, "filtered", False) for group in (2, 8, 12, 16, 20)])
    trained = tuple(group for group in range(1, 21) if group not in (2, 8, 12, 16, 20))
    log.append_events([ev.BatchCommitted(1, Version(1, 1), trained, {}, now)])
    log.close()
    (tmp_path / "deployment.yaml").write_text("learner: {ranks: 1}\nrewards: {processes: 3}\n")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_costs_are_found_again(run: Path) -> None:
    costs, lengths, said = measure(str(run))
    assert (costs.step_s, costs.row_s) == pytest.approx((STEP_S, ROW_S), rel=1e-3)
    assert (costs.update_s, costs.token_s) == pytest.approx((UPDATE_S, 2 * TOKEN_S))  # two ranks shared the tokens
    assert (costs.pause_s, costs.deliver_s, costs.publish_s) == pytest.approx((PAUSE_S, 0.5, 0.014))
    assert (costs.score_s, costs.call_s, costs.rows_s, costs.filtered_share) == pytest.approx((0.03, 0.004, 0.02, 4 / 15))
    assert lengths == [[5 + update % 5] * (2, 4, 8)[update % 3] for update in range(6, 21)]
    assert said.startswith("15 updates of that run, at ")


def test_what_was_made_on_other_ranks_is_left_out(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as metrics:
        for role, step in (("generator", 9), ("learner", 5), ("learner", 8)):
            metrics.write(json.dumps({"kind": "scale", "step": step, "role": role}) + "\n")
    assert measure(str(run))[2].startswith("9 updates of that run, at ")


def test_responses_that_take_longer_than_the_updates_looked_at_are_measured_all_the_same(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines[:-1]:
        line["time"] = lines[-1]["time"] + line["step"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    costs, lengths, _ = measure(str(run))
    assert (costs.step_s, costs.row_s) == pytest.approx((STEP_S, ROW_S), rel=1e-3)
    assert len(lengths) == 20


def test_a_run_in_which_too_little_has_happened_is_refused(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:9]))
    with pytest.raises(DataError, match=r"metrics.jsonl: 9 finished updates < 10: .*let the run go on"):
        measure(str(run))
    (run / "metrics.jsonl").unlink()
    with pytest.raises(DataError, match="0 finished updates"):
        measure(str(run))
    with pytest.raises(DataError, match="no run directory"):
        measure(str(run / "elsewhere"))
