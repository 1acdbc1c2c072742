import json
import threading
import time

import msgspec
import pytest

from asyncrl.errors import Closed, ConfigError
from asyncrl.report.timing import TimeInState
from asyncrl.reward.pool import RewardPool
from asyncrl.reward.worker import RewardWorker
from asyncrl.rundir import MASK
from asyncrl.types import Prompt, Score, Unscored, UnscoredLease

SOURCE = '''
import os, time

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    """Waits for the file that extra_info names; then exact match."""
    if extra_info:
        while not os.path.exists(extra_info["until"]):
            time.sleep(0.001)
    if solution_str == "9":
        raise ValueError("nine")
    if solution_str == "8":
        raise ValueError("password='hunter22'")
    return {"score": float(solution_str == ground_truth), "length": len(solution_str)}
'''


class FakeStore:
    """Hands out the given leases, then answers `ended`. `on_score` and `on_extend` see each call's outcome so far."""

    def __init__(self, *leases, lease_s=30.0, on_score=None, on_extend=None):
        self.leases = [UnscoredLease(lease=i, lease_s=lease_s, items=tuple(items)) for i, items in enumerate(leases)]
        self.asked, self.scores, self.extended = [], [], []
        self.on_score, self.on_extend = on_score, on_extend
        self.after = UnscoredLease(lease=-1, lease_s=lease_s, items=(), ended=True)

    def lease_unscored(self, k, wait_s):
        self.asked.append((k, wait_s))
        if isinstance(self.after, Exception) and not self.leases:
            raise self.after
        return self.leases.pop(0) if self.leases else self.after

    def extend(self, lease):
        self.extended.append(lease)
        if self.on_extend:
            self.on_extend(self)

    def score(self, lease, scores):
        self.scores += [(lease, score) for score in scores]
        if self.on_score:
            self.on_score(self)


def rollout(group, answer, until=None):
    extra = json.dumps({"until": str(until)} if until else None)
    prompt = Prompt(row=group, ids=(1,), data_source="sums", ground_truth='"12"', extra_info=extra)
    ids = [int(digit) for digit in answer]
    return Unscored(
        group=group, rollout=0, attempt=1, prompt=prompt, response_ids=ids, text=answer, purpose="train", finish_reason="stop"
    )


@pytest.fixture
def worker(tmp_path):
    path = tmp_path / "reward.py"
    path.write_text(SOURCE)

    def make(store, processes=1, deadline_s=20.0, poll_s=5.0, **fields):
        pool = RewardPool(f"{path}:compute_score", processes=processes, deadline_s=deadline_s)
        return RewardWorker(store, pool, name="reward-0", lease_size=8, poll_s=poll_s, **fields)

    return make


def test_every_rollout_gets_one_verdict_and_the_end_is_clean(worker, caplog):
    store = FakeStore([rollout(0, "12"), rollout(1, "9"), rollout(2, "2")], [rollout(3, "12")])
    reward, before = worker(store), time.time()
    reward.run()
    scored = [score.scoring for _, score in store.scores]
    assert [name for name, _, _ in scored] == ["reward-0/0"] * 4
    times = [at for _, began, ended in scored for at in (began, ended)]
    assert times == pytest.approx(sorted(times), abs=1e-5)  # one after the other
    assert before < times[0] < times[-1] < time.time() + 1e-5
    store.scores = [(lease, msgspec.structs.replace(score, scoring=None)) for lease, score in store.scores]
    ids = {"rollout": 0, "attempt": 1}
    (lease, right), (_, raised), (_, wrong), (last, later) = sorted(store.scores, key=lambda pair: pair[1].group)
    assert (lease, last) == (0, 1)
    assert right == Score(group=0, status="ok", reward=1.0, parts={"length": 2.0}, **ids)
    assert wrong == Score(group=2, status="ok", reward=0.0, parts={"length": 1.0}, **ids)
    assert (raised.status, raised.reward) == ("invalid", None)
    assert "ValueError: nine" in raised.error
    assert "group 1, rollout 0: invalid: ValueError: nine" in caplog.text
    assert later.group == 3
    gauges = reward.report().gauges
    assert (gauges["scored"], gauges["invalid"], gauges["timeout"], gauges["process_restarts"]) == (4, 1, 0, 0)


def test_secrets_in_an_error_are_masked(worker):
    store = FakeStore([rollout(0, "8")])
    worker(store).run()
    [(_, score)] = store.scores
    assert "hunter22" not in score.error
    assert f"password='{MASK}'" in score.error


def test_verdicts_that_come_soon_after_each_other_are_delivered_in_one_call(worker, monkeypatch):
    monkeypatch.setattr("asyncrl.reward.pool._BATCH_S", 20.0)
    calls = []
    store = FakeStore(
        [rollout(group, "12") for group in range(8)], [rollout(8, "12")], on_score=lambda s: calls.append(len(s.scores))
    )
    began = time.monotonic()
    worker(store).run()
    assert calls == [8, 9]  # and the ninth, behind which there is none, at once
    assert time.monotonic() - began < 20.0


def test_a_slow_sample_holds_up_no_other_of_its_lease(worker, tmp_path):
    gate = tmp_path / "gate"
    open_gate = lambda store: gate.touch() if len(store.scores) == 3 else None  # noqa: E731
    store = FakeStore([rollout(0, "12", until=gate), *[rollout(group, "12") for group in (1, 2, 3)]], on_score=open_gate)
    worker(store, processes=2).run()  # times out unless the three others are delivered while the first waits
    assert [score.group for _, score in store.scores][-1] == 0
    assert {score.status for _, score in store.scores} == {"ok"}


def test_a_free_process_is_given_the_next_lease_while_another_is_stuck(worker, tmp_path):
    gate = tmp_path / "gate"
    open_gate = lambda store: gate.touch() if store.scores[-1][0] == 1 else None  # noqa: E731
    store = FakeStore([rollout(0, "12", until=gate)], [rollout(1, "12")], on_score=open_gate)
    worker(store, processes=2).run()
    assert [(lease, score.status) for lease, score in store.scores] == [(1, "ok"), (0, "ok")]
    assert store.asked[1] == (8, 0.0)  # it does not wait in the store while it owes verdicts


def test_a_lease_is_renewed_while_its_samples_are_scored(worker, tmp_path):
    gate = tmp_path / "gate"
    open_gate = lambda store: gate.touch() if len(store.extended) == 3 else None  # noqa: E731
    store = FakeStore([rollout(0, "12", until=gate)], lease_s=0.06, on_extend=open_gate)
    worker(store).run()
    assert len(store.extended) >= 3
    assert [score.status for _, score in store.scores] == ["ok"]


def test_a_lease_number_that_comes_again_is_another_lease(worker, tmp_path):
    gate = tmp_path / "gate"
    open_gate = lambda store: gate.touch() if store.scores[-1][1].group == 1 else None  # noqa: E731
    store = FakeStore([rollout(0, "12", until=gate)], [rollout(1, "12")], on_score=open_gate)
    store.leases[1] = msgspec.structs.replace(store.leases[1], lease=0)  # the store restarted in between
    worker(store, processes=2).run()
    assert [(lease, score.group) for lease, score in store.scores] == [(0, 1), (0, 0)]


def test_a_timeout_is_reported_as_such(worker, tmp_path):
    store = FakeStore([rollout(0, "12", until=tmp_path / "never")])
    reward = worker(store, deadline_s=0.2)
    reward.run()
    assert [(score.status, score.reward) for _, score in store.scores] == [("timeout", None)]
    assert reward.report().gauges["timeout"] == 1
    assert reward.report().gauges["process_restarts"] == 1


def test_stop_ends_the_loop_and_its_processes(worker):
    store = FakeStore()
    reward = worker(store)
    store.after = UnscoredLease(lease=-1, lease_s=30.0, items=())

    def lease_unscored(k, wait_s):
        asked.set()
        return store.after

    asked = threading.Event()
    store.lease_unscored = lease_unscored
    thread = threading.Thread(target=reward.run)
    thread.start()
    assert asked.wait(20)
    reward.stop()
    thread.join(20)
    assert not thread.is_alive()


def test_a_closed_store_is_a_clean_end(worker):
    store = FakeStore([rollout(0, "12")])
    store.after = Closed("the run is stopping")
    worker(store).run()
    assert len(store.scores) == 1


def test_a_function_that_cannot_be_loaded_fails_before_anything_is_leased(tmp_path):
    store = FakeStore([rollout(0, "12")])
    pool = RewardPool(str(tmp_path / "missing.py:compute_score"))
    with pytest.raises(ConfigError, match="no file"):
        RewardWorker(store, pool, name="reward-0").run()
    assert store.asked == []


def test_time_divides_into_busy_and_waiting(worker):
    clock = iter(range(1000))
    spent = TimeInState(clock=lambda: float(next(clock)))
    store = FakeStore([rollout(0, "12")])
    reward = worker(store)
    reward._time = spent
    reward.run()
    seconds = spent.seconds()
    assert set(seconds) == {"wait:start", "busy", "wait:store", "wait:end"}
    assert sum(seconds.values()) == next(clock) - 1


def test_training_rewards_are_shaped_and_held_out_ones_are_not(worker):
    held_out = msgspec.structs.replace(rollout(1, "12"), purpose="eval")
    store = FakeStore([rollout(0, "12"), held_out, rollout(2, "9")])
    worker(store, shape=lambda reward, ids: (reward - len(ids), {"penalty": -float(len(ids))})).run()
    scores = {score.group: score for _, score in store.scores}
    assert (scores[0].reward, scores[0].parts) == (-1.0, {"length": 2.0, "penalty": -2.0})
    assert (scores[1].reward, scores[1].parts) == (1.0, {"length": 2.0})
    assert (scores[2].status, scores[2].reward, scores[2].parts) == ("invalid", None, {})


def test_token_rewards_travel_with_training_scores(tmp_path):
    path = tmp_path / "turns.py"
    path.write_text(
        "def f(solution_str, ground_truth, response_ids, turns):\n"
        "    return {'score': 1.0, 'turn_rewards': [0.5] * len(turns), 'token_rewards': response_ids}"
    )
    turns = msgspec.structs.replace(rollout(0, "123"), turns=(0, 1))
    held_out = msgspec.structs.replace(rollout(1, "12"), purpose="eval")
    store = FakeStore([turns, held_out])
    RewardWorker(store, RewardPool(f"{path}:f"), name="reward-0").run()
    earned = {score.group: (score.reward, score.token_rewards) for _, score in store.scores}
    assert earned == {0: (1.0, [1.5, 2.0, 3.5]), 1: (1.0, None)}


def test_a_function_of_trls_kind_sees_its_row_and_the_tokens(tmp_path):
    path = tmp_path / "trl.py"
    path.write_text(
        "def f(prompts, completion_ids, level, **columns):\n    return [len(prompts[0]) + level[0] + sum(completion_ids[0])]"
    )
    store = FakeStore([rollout(4, "12")])
    record = lambda item: json.dumps({"prompt": "6+6=", "level": 10 * item.prompt.row})  # noqa: E731
    pool = RewardPool(f"{path}:f")
    RewardWorker(store, pool, name="reward-0", record=record).run()
    assert [score.reward for _, score in store.scores] == [4 + 40 + 3]


def test_a_sample_that_is_being_scored_is_progress(worker, tmp_path):
    gate, seen = tmp_path / "gate", []

    def note(store):
        seen.append(reward.report().progress)
        if len(seen) == 4:
            gate.touch()

    reward = worker(FakeStore([rollout(0, "12", until=gate)], lease_s=0.06, on_extend=note))
    reward.run()
    assert seen == sorted(set(seen)), "it has its deadline, so it is no stall"
    assert reward.report().progress > seen[-1]


def test_a_verdict_for_whoever_asks_is_not_the_stores(worker):
    store = FakeStore([rollout(0, "12")])
    store.after = UnscoredLease(lease=-1, lease_s=30.0, items=())  # nothing more for now
    reward = worker(store, poll_s=0.05)
    running = threading.Thread(target=reward.run)
    running.start()
    asked = msgspec.structs.replace(reward.verdict(rollout(-1, "12")), scoring=None)
    assert asked == Score(group=-1, rollout=0, attempt=1, status="ok", reward=1.0, parts={"length": 2.0})
    assert "ValueError: nine" in reward.verdict(rollout(-1, "9")).error
    reward.stop()
    running.join(20)
    assert [score.group for _, score in store.scores] == [0]
    assert reward.report().gauges["scored"] == 1
    with pytest.raises(Closed):
        reward.verdict(rollout(-1, "12"))
