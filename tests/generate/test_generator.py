"""The generator as a plain object, between a scripted store, weight source and engine."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import pytest
from msgspec.structs import replace
from transformers import PreTrainedModel

from asyncrl.config import LimitsSpec
from asyncrl.errors import Closed, Fenced, Unavailable
from asyncrl.generate.embedded.engine import TorchEngine
from asyncrl.generate.generator import Generator
from asyncrl.generate.workload import EndedRequest, HeldGroup, SingleAnswers, Workload
from asyncrl.models.loading import named_weights
from asyncrl.types import Generation, Span, Ticket, Tokens, Version

V0, V1, V2 = Version(0, 0), Version(0, 1), Version(0, 2)
WAIT_S = 10.0
MakeTicket = Callable[..., Ticket]


def spelt(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))


class Running:
    """A generator in a thread of its own."""

    def __init__(self, engine: Any, store: Any, weights: Any, **settings: Any) -> None:
        waits = {name: settings.pop(name) for name in ("poll_s", "health_timeout_s") if name in settings}
        limits = LimitsSpec(**{"poll_s": 0.2, **waits})
        settings = {"group_size": 2, "limits": limits} | settings
        self.generator = Generator(engine, store, weights, spelt, name="generator-0", **settings)
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.generator.run()
        except BaseException as error:
            self.error = error

    def ends(self) -> BaseException | None:
        """Waits for the end of `run`; what it raised."""
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive()
        return self.error


@pytest.fixture
def start(fake_engine: Any, fake_store: Any, fake_weights: Any) -> Iterator[Callable[..., Running]]:
    running: list[Running] = []

    def start(**settings: Any) -> Running:
        running.append(Running(settings.pop("engine", fake_engine), fake_store, fake_weights, **settings))
        return running[-1]

    yield start
    for one in running:
        one.generator.stop()
        fake_weights.close()
        fake_store.recall()
        one.thread.join(WAIT_S)


def test_nothing_is_reserved_before_the_first_weights(
    start: Callable[..., Running], fake_engine: Any, fake_store: Any, fake_weights: Any
) -> None:
    start()
    fake_weights.publish(V1)
    fake_store.wait(lambda: len(fake_store.calls) > 0)
    assert fake_store.calls[0] == (2, V1, ())  # 4 slots, groups of 2
    assert fake_engine.swaps == [V1]


def test_the_baseline_of_a_group_is_greedy_and_says_so(
    start: Callable[..., Running], fake_engine: Any, fake_store: Any, fake_weights: Any, make_ticket: MakeTicket
) -> None:
    start(group_size=3)
    fake_weights.publish(V0)
    ticket = make_ticket(7, (0, 1, 2), baseline=2)
    fake_store.put(replace(ticket, sampling=replace(ticket.sampling, temperature=0.7, top_p=0.9, top_k=5)))
    fake_engine.wait(lambda: len(fake_engine.pending) == 3)
    asked = [request.sampling for request, *_ in fake_engine.pending.values()]
    assert [(s.temperature, s.top_p, s.top_k, s.max_tokens) for s in asked] == [(0.7, 0.9, 5, 4)] * 2 + [(0.0, 1.0, 0, 4)]
    for index in range(3):
        fake_engine.answer(f"7/{index}/0")
    fake_store.wait(lambda: len(fake_store.rollouts) == 3)
    assert {r.rollout: r.baseline for r in fake_store.rollouts} == {0: False, 1: False, 2: True}
    assert {(r.prompt_text, r.text) for r in fake_store.rollouts} == {("1 2 3", "5 6")}


def test_a_group_is_held_until_all_its_rollouts_are_submitted(
    start: Callable[..., Running], fake_engine: Any, fake_store: Any, fake_weights: Any, make_ticket: MakeTicket
) -> None:
    one = start()
    fake_weights.publish(V0)
    fake_store.put(make_ticket(7))
    fake_engine.answer("7/1/0")
    fake_store.wait(lambda: len(fake_store.rollouts) == 1)
    seen = len(fake_store.calls)
    fake_store.wait(lambda: len(fake_store.calls) > seen + 1)
    assert fake_store.calls[-1][2] == (7,)
    fake_engine.answer("7/0/0")
    fake_store.wait(lambda: len(fake_store.rollouts) == 2 and fake_store.calls[-1][2] == ())
    rollout = fake_store.rollouts[0]
    assert (rollout.group, rollout.rollout, rollout.attempt, rollout.worker) == (7, 1, 0, "generator-0")
    assert (rollout.response_ids, rollout.loss_mask, rollout.turns, rollout.spans) == ([5, 6], [1, 1], (0,), (Span(V0, 2),))
    assert rollout.times["reserved"] <= rollout.times["started"] <= rollout.times["finished"]
    gauges = one.generator.report().gauges
    assert (gauges["rollouts"], gauges["tokens"], gauges["swaps"], gauges["update"]) == (2, 4, 1, 0)
    assert gauges["waits/bound_full"] >= 1
    assert (gauges["recomputed_tokens"], gauges["discarded_tokens"]) == (3, 2)
    assert (gauges["engine/pending"], gauges["bus/versions"]) == (0, 1)


def test_what_ends_while_the_engine_is_at_work_is_submitted_together_and_the_last_one_at_once(
    start: Callable[..., Running],
    fake_engine: Any,
    fake_store: Any,
    fake_weights: Any,
    make_ticket: MakeTicket,
    monkeypatch: Any,
) -> None:
    monkeypatch.setattr("asyncrl.generate.generator.SUBMIT_EVERY_S", 1000.0)
    fake_store.put(make_ticket(0), make_ticket(1))
    fake_weights.publish(V0)
    start()
    for group in (0, 1):
        fake_engine.wait(lambda group=group: f"{group}/1/0" in fake_engine.pending)
    fake_engine.answer("0/0/0")
    fake_store.wait(lambda: len(fake_store.rollouts) == 1)  # it comes first, after a rest
    for request in ("1/1/0", "0/1/0", "1/0/0"):
        fake_engine.answer(request)
    fake_store.wait(lambda: len(fake_store.rollouts) == 4)
    assert fake_store.submits == [1, 3]


def test_only_a_thread_that_can_go_on_is_woken(
    start: Callable[..., Running],
    fake_engine: Any,
    fake_store: Any,
    fake_weights: Any,
    make_ticket: MakeTicket,
    monkeypatch: Any,
) -> None:
    waits: dict[str, int] = {}
    wait = threading.Condition.wait

    def counted(self: threading.Condition, timeout: float | None = None) -> bool:
        name = threading.current_thread().name
        waits[name] = waits.get(name, 0) + 1
        return wait(self, timeout)

    monkeypatch.setattr(threading.Condition, "wait", counted)
    fake_engine.slots = 16
    fake_store.put(make_ticket(0, tuple(range(16))))
    fake_weights.publish(V0)
    start(group_size=16, poll_s=60.0)
    fake_engine.wait(lambda: len(fake_engine.pending) == 16)
    before = waits["generator-0-feed"]
    for rollout in range(14):
        fake_engine.answer(f"0/{rollout}/0")
        fake_store.wait(lambda rollout=rollout: len(fake_store.rollouts) == rollout + 1)
    # There was never room for a group: it went to sleep once, at the most, after the first count.
    assert waits["generator-0-feed"] <= before + 1


def test_short_rollouts_are_asked_for_ahead_and_many_at_a_time(
    start: Callable[..., Running], fake_engine: Any, fake_store: Any, fake_weights: Any, make_ticket: MakeTicket
) -> None:
    fake_engine.slots = 8
    start(poll_s=60.0)
    fake_weights.publish(V0)
    fake_store.put(*(make_ticket(group) for group in range(200)))
    for group in range(60):
        for rollout in range(2):
            fake_engine.answer(f"{group}/{rollout}/0")  # far more than 80 a second
        assert len(fake_engine.pending) <= 2 * 8
    fake_engine.wait(lambda: len(fake_engine.pending) > 8)
    assert all(2 * k > 4 for k, *_ in fake_store.calls[-5:])  # half of what is asked for ahead


def test_the_pace_of_a_second_ago_counts_less(make_ticket: MakeTicket) -> None:
    work = Workload()
    for moment in range(500):
        work.finish(EndedRequest(HeldGroup(make_ticket(0), "", 0.0, 1), 0, Future(), 0.0), moment / 50)
    assert work.pace(499 / 50) == pytest.approx(50, rel=0.02)
    assert work.pace(499 / 50 + 3) < 3


def test_seeds_follow_the_missing_rollouts(
    start: Callable[..., Running], fake_engine: Any, fake_store: Any, fake_weights: Any, make_ticket: MakeTicket
) -> None:
    start()
    fake_weights.publish(V0)
    fake_store.put(make_ticket(3, rollouts=(1, 4)))
    fake_engine.wait(lambda: len(fake_engine.pending) == 2)
    assert {id: request.seed for id, (request, *_) in fake_engine.pending.items()} == {"3/1/0": 101, "3/4/0": 104}


def test_a_freed_slot_is_offered_at_once_and_full_slots_only_send_signs_of_life(
    start: Callable[..., Running], fake_engine: Any, fake_store: Any, fake_weights: Any, make_ticket: MakeTicket
) -> None:
    start(poll_s=WAIT_S)  # a heartbeat would come only after the test
    fake_weights.publish(V0)
    fake_store.put(make_ticket(0), make_ticket(1), make_ticket(2))
    fake_engine.wait(lambda: len(fake_engine.pending) == 4)
    for id in ("0/0/0", "1/0/0"):
        fake_engine.answer(id)
    fake_engine.wait(lambda: "2/0/0" in fake_engine.pending)
    assert all(k > 0 for k, *_ in fake_store.calls)


def test_fewer_slots_than_requests_unfinished_ask_for_nothing_until_there_is_room(
    start: Callable[..., Running], fake_engine: Any, fake_store: Any, fake_weights: Any, make_ticket: MakeTicket
) -> None:
    start(poll_s=0.05)
    fake_weights.publish(V0)
    fake_store.put(make_ticket(0), make_ticket(1))
    fake_engine.wait(lambda: len(fake_engine.pending) == 4)
    fake_store.wait(lambda: (0, V0, (0, 1)) in fake_store.calls)
    fake_engine.slots = 3
    began, seen = time.monotonic(), len(fake_store.calls)
    fake_engine.answer("0/0/0")
    fake_engine.answer("0/1/0")  # 2 unfinished of 3 slots: no room for a group of 2
    fake_store.wait(lambda: len(fake_store.rollouts) == 2 and len(fake_store.calls) >= seen + 4)
    assert {k for k, *_ in fake_store.calls[seen:]} == {0}
    # Signs of life only, at their pace: no busy loop. One more, as the first may have been due already.
    assert len(fake_store.calls) - seen <= (time.monotonic() - began) / 0.05 + 1
    fake_engine.slots = 4  # grown again: seen at the next sign of life at the latest
    fake_store.wait(lambda: fake_store.calls[-1][0] == 1)


def test_an_engine_with_less_than_a_group_of_slots_still_gets_one_group_at_a_time(
    start: Callable[..., Running], fake_engine: Any, fake_store: Any, fake_weights: Any, make_ticket: MakeTicket
) -> None:
    fake_engine.slots = 1
    start(poll_s=0.05)
    fake_weights.publish(V0)
    fake_store.put(make_ticket(0), make_ticket(1))
    for group in (0, 1):
        fake_engine.wait(lambda group=group: set(fake_engine.pending) == {f"{group}/0/0", f"{group}/1/0"})
        fake_engine.answer(f"{group}/0/0")
        fake_engine.answer(f"{group}/1/0")
    fake_store.wait(lambda: len(fake_store.rollouts) == 4)
    assert max(k for k, *_ in fake_store.calls) == 1


def test_full_slots_hear_of_cancellations_by_heartbeat(
    start: Callable[..., Running], fake_engine: Any, fake_store: Any, fake_weights: Any, make_ticket: MakeTicket
) -> None:
    start(poll_s=0.05)
    fake_weights.publish(V0)
    fake_store.put(make_ticket(0), make_ticket(1))
    fake_store.wait(lambda: (0, V0, (0, 1)) in fake_store.calls)
    fake_store.put(cancelled=[0])
    fake_engine.wait(lambda: 0 in fake_engine.aborted)
    fake_engine.answer("1/0/0")
    fake_engine.answer("1/1/0")
    fake_store.wait(lambda: len(fake_store.rollouts) == 2 and fake_store.calls[-1][2] == ())
    assert {rollout.group for rollout in fake_store.rollouts} == {1}  # the aborted ones are nobody's


def test_rollouts_that_finished_before_the_cancellation_arrived_are_dropped_with_it(
    start: Callable[..., Running], fake_engine: Any, fake_store: Any, fake_weights: Any, make_ticket: MakeTicket
) -> None:
    """The group comes back as a new attempt; late answers of the old one must not end it."""
    start()
    fake_weights.publish(V0)
    fake_store.put(make_ticket(0))
    fake_engine.wait(lambda: len(fake_engine.pending) == 2)
    fake_store.put(cancelled=[0])
    fake_engine.wait(lambda: 0 in fake_engine.aborted)
    fake_store.put(Ticket(**{f: getattr(make_ticket(0), f) for f in Ticket.__struct_fields__} | {"attempt": 1}))
    fake_engine.answer("0/0/1")
    fake_engine.answer("0/1/1")
    fake_store.wait(lambda: len(fake_store.rollouts) == 2)
    assert {rollout.attempt for rollout in fake_store.rollouts} == {1}


def test_a_swap_waits_for_eval_requests(
    start: Callable[..., Running], fake_engine: Any, fake_store: Any, fake_weights: Any, make_ticket: MakeTicket
) -> None:
    one = start()
    fake_weights.publish(V0)
    fake_store.put(make_ticket(9, purpose="eval", pinned=V0))
    fake_engine.wait(lambda: len(fake_engine.pending) == 2)
    fake_weights.publish(V1)
    # Training tickets keep coming meanwhile, at the pinned version.
    fake_store.put(make_ticket(1))
    fake_engine.answer("1/0/0")
    fake_engine.answer("9/0/0")
    fake_store.wait(lambda: len(fake_store.rollouts) == 2)
    assert fake_engine.swaps == [V0]
    fake_engine.answer("9/1/0")
    fake_engine.wait(lambda: fake_engine.swaps == [V0, V1])
    fake_store.wait(lambda: len(fake_store.rollouts) == 3)
    evals = [r for r in fake_store.rollouts if r.purpose == "eval"]
    assert [span.version for r in evals for span in r.spans] == [V0, V0]
    fake_store.wait(lambda: fake_store.calls[-1][1] == V1)  # the swap is over
    assert one.generator.report().gauges["pause_s_total"] == 0.5


class Waiting(SingleAnswers):
    """Episodes whose environments do not answer."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self.futures: list[Future[Any]] = []

    def submit(self, ticket: Ticket) -> "list[Future[Any]]":
        self.futures += [Future() for _ in ticket.rollouts]
        return self.futures[-len(ticket.rollouts) :]


def test_a_swap_does_not_wait_for_evaluations_that_are_not_pinned(
    start: Callable[..., Running], fake_engine: Any, fake_store: Any, fake_weights: Any, make_ticket: MakeTicket
) -> None:
    episodes = Waiting(fake_engine)
    start(episodes=episodes)
    fake_weights.publish(V0)
    fake_store.put(make_ticket(9, purpose="eval"))
    fake_store.wait(lambda: len(fake_store.calls) > 0 and fake_store.calls[-1][2] == (9,))  # it is under way
    fake_weights.publish(V1)
    fake_engine.wait(lambda: fake_engine.swaps == [V0, V1])
    for rollout, future in enumerate(episodes.futures):
        future.set_result(Generation(
            id=f"9/{rollout}/0", token_ids=[5, 6], logprobs=[-1.0] * 2, kept_logmass=None,
            spans=(Span(V0, 1), Span(V1, 1)), finish_reason="stop",
        ))  # fmt: skip
    fake_store.wait(lambda: len(fake_store.rollouts) == 2)
    assert {r.purpose for r in fake_store.rollouts} == {"eval"}


def test_a_swap_waits_for_the_whole_evaluation_even_with_few_slots(
    start: Callable[..., Running], fake_engine: Any, fake_store: Any, fake_weights: Any, make_ticket: MakeTicket
) -> None:
    start()
    groups = range(fake_engine.slots)  # of two rollouts each: twice what fits at once
    fake_store.put(*(make_ticket(group, purpose="eval", pinned=V0) for group in groups))
    fake_weights.publish(V0)
    for group in groups:
        fake_engine.wait(lambda group=group: f"{group}/1/0" in fake_engine.pending)
        if group == 0:
            fake_weights.publish(V1)
        assert fake_engine.swaps == [V0]
        fake_engine.answer(f"{group}/0/0")
        fake_engine.answer(f"{group}/1/0")
    fake_engine.wait(lambda: fake_engine.swaps == [V0, V1])
    fake_store.wait(lambda: len(fake_store.rollouts) == 2 * len(groups))
    assert {span.version for rollout in fake_store.rollouts for span in rollout.spans} == {V0}


def test_the_end_of_an_evaluation_lets_a_swap_in_even_if_nothing_is_reserved_any_more(
    start: Callable[..., Running], fake_engine: Any, fake_store: Any, fake_weights: Any, make_ticket: MakeTicket
) -> None:
    start(poll_s=0.05)
    fake_weights.publish(V0)
    fake_store.put(make_ticket(9, purpose="eval", pinned=V0))
    fake_engine.wait(lambda: len(fake_engine.pending) == 2)
    fake_store.put(make_ticket(1))
    fake_engine.wait(lambda: len(fake_engine.pending) == 4)
    fake_store.put(ended=True)
    seen = len(fake_store.calls)
    fake_store.wait(lambda: len(fake_store.calls) > seen + 1)  # the generator has heard it
    fake_weights.publish(V1)
    fake_engine.answer("9/0/0")
    fake_engine.answer("9/1/0")
    fake_engine.wait(lambda: fake_engine.swaps == [V0, V1])
    fake_engine.answer("1/0/0")
    fake_engine.answer("1/1/0")


def test_eval_tickets_for_other_weights_are_left_to_others(
    start: Callable[..., Running], fake_engine: Any, fake_store: Any, fake_weights: Any, make_ticket: MakeTicket
) -> None:
    one = start()
    fake_weights.publish(V1)
    fake_store.put(make_ticket(5, purpose="eval", pinned=V0), make_ticket(6))
    fake_engine.wait(lambda: len(fake_engine.pending) == 2)
    seen = len(fake_store.calls)
    fake_store.wait(lambda: len(fake_store.calls) > seen + 1)
    assert fake_store.calls[-1][2] == (6,)
    assert one.generator.report().gauges["evals_left"] == 1


def test_weights_too_old_are_waited_for_here_and_newer_ones_asked_with_at_once(
    start: Callable[..., Running], fake_store: Any, fake_weights: Any
) -> None:
    fake_store.waiting_for = "weights too old"
    one = start(poll_s=WAIT_S)
    fake_weights.publish(V0)
    fake_store.wait(lambda: len(fake_store.calls) == 1)
    fake_weights.publish(V1)
    fake_store.wait(lambda: len(fake_store.calls) == 2)
    assert [(k, version) for k, version, _ in fake_store.calls] == [(2, V0), (2, V1)]
    assert one.generator.report().seconds["wait:weights"] > 0


def test_an_ended_store_ends_the_run_when_all_is_submitted(
    start: Callable[..., Running], fake_engine: Any, fake_store: Any, fake_weights: Any, make_ticket: MakeTicket
) -> None:
    one = start(poll_s=6 * WAIT_S)  # longer than it may take to end
    fake_weights.publish(V0)
    fake_store.put(make_ticket(0))
    fake_engine.wait(lambda: len(fake_engine.pending) == 2)
    fake_store.put(ended=True)
    fake_engine.answer("0/0/0")
    fake_store.wait(lambda: len(fake_store.rollouts) == 1)
    assert one.thread.is_alive()
    fake_engine.answer("0/1/0")
    assert one.ends() is None
    assert len(fake_store.rollouts) == 2


def test_stop_ends_the_run_and_aborts_what_is_unfinished(
    start: Callable[..., Running], fake_engine: Any, fake_store: Any, fake_weights: Any, make_ticket: MakeTicket
) -> None:
    one = start()
    fake_weights.publish(V0)
    fake_store.put(make_ticket(0))
    fake_engine.wait(lambda: len(fake_engine.pending) == 2)
    one.generator.stop()
    assert one.ends() is None
    assert fake_engine.aborted[-1] is None
    assert fake_store.rollouts == []


def test_the_store_hears_of_answers_that_go_on_and_of_the_rest_when_the_generator_leaves(
    start: Callable[..., Running], fake_engine: Any, fake_store: Any, fake_weights: Any, make_ticket: MakeTicket
) -> None:
    def tokens(*ids: int) -> Tokens:
        return Tokens(token_ids=[*ids], logprobs=[-1.0] * len(ids), kept_logmass=None, spans=(Span(V0, len(ids)),))

    def end(rollout: int, reason: str, *ids: int) -> None:
        request, future, _ = fake_engine.pending.pop(f"0/{rollout}/0")
        lists = {name: getattr(tokens(*ids), name) for name in Tokens.__struct_fields__}
        future.set_result(Generation(id=request.id, finish_reason=reason, **lists))

    fake_engine.hands_over = True
    one = start()
    fake_weights.publish(V0)
    fake_store.put(make_ticket(0, (0, 1, 2), begun={1: tokens(7, 8)}))
    fake_engine.wait(lambda: len(fake_engine.pending) == 3)
    requests = [request for request, *_ in fake_engine.pending.values()]
    assert [request.known_ids[3:] for request in requests] == [(), (7, 8), ()]
    fake_engine.told(requests[1], 2, tokens(9))
    fake_store.wait(lambda: len(fake_store.pieces) == 1)
    assert (fake_store.pieces[0].rollout, fake_store.pieces[0].start, fake_store.pieces[0].token_ids) == (1, 2, [9])

    def abort(group: int | None = None) -> None:
        end(0, "abort", 4)
        end(1, "abort", 7, 8, 9, 10)
        end(2, "stop", 5)

    fake_engine.abort = abort
    one.generator.stop()
    assert one.ends() is None
    assert [(p.rollout, p.start, p.token_ids) for p in fake_store.pieces[1:]] == [(0, 0, [4]), (1, 3, [10])]
    assert [(r.rollout, r.response_ids) for r in fake_store.rollouts] == [(2, [5])]
    assert one.generator.report().gauges["tokens"] == 1  # what others sampled, or will, is not its own


def test_evaluations_are_not_streamed(
    start: Callable[..., Running], fake_engine: Any, fake_store: Any, fake_weights: Any, make_ticket: MakeTicket
) -> None:
    fake_engine.hands_over = True
    start()
    fake_weights.publish(V0)
    fake_store.put(make_ticket(0, purpose="eval", pinned=V0))
    fake_engine.wait(lambda: len(fake_engine.pending) == 2)
    assert fake_engine.told is None


@pytest.mark.parametrize(("error", "raised"), [(Unavailable("gone"), True), (Closed("end"), False), (Fenced("zombie"), False)])
def test_a_failing_store_is_raised_unless_it_says_that_the_run_is_over(
    start: Callable[..., Running], fake_store: Any, fake_weights: Any, error: Exception, raised: bool
) -> None:
    one = start()
    fake_weights.publish(V0)
    fake_store.put(error=error)
    assert one.ends() is (error if raised else None)


def test_a_failing_request_is_raised(
    start: Callable[..., Running], fake_engine: Any, fake_store: Any, fake_weights: Any, make_ticket: MakeTicket
) -> None:
    one, error = start(), Unavailable("the engine failed")
    fake_weights.publish(V0)
    fake_store.put(make_ticket(0))
    fake_engine.wait(lambda: len(fake_engine.pending) == 2)
    fake_engine.pending.pop("0/0/0")[1].set_exception(error)
    assert one.ends() is error


def test_an_engine_that_hangs_is_raised(start: Callable[..., Running], fake_engine: Any, fake_weights: Any) -> None:
    one = start(health_timeout_s=0.1)
    fake_weights.publish(V0)
    fake_engine.wait(lambda: fake_engine.swaps == [V0])  # alive and well
    fake_engine.hangs = True
    assert str(one.ends()) == "no step in 0.05 s"


def test_a_real_engine_between_store_and_bus(
    start: Callable[..., Running],
    fake_store: Any,
    fake_weights: Any,
    make_ticket: MakeTicket,
    make_model: Callable[..., PreTrainedModel],
) -> None:
    """Rollouts of two versions, seconds that add up to the wall clock, a clean end."""
    model = make_model()
    tensors = {name: tensor.clone() for name, tensor in named_weights(model).items()}
    offer = fake_weights.next
    fake_weights.next = lambda after, wait_s: (news := offer(after, wait_s)) and (news[0], tensors)
    engine = TorchEngine(model, slots=4, max_length=32)
    engine.start()
    one = start(engine=engine)
    fake_weights.publish(V0)
    fake_store.put(*(make_ticket(group) for group in range(6)))
    fake_store.wait(lambda: len(fake_store.rollouts) == 12)
    fake_weights.publish(V1)
    fake_store.wait(lambda: fake_store.calls[-1][1] == V1)
    fake_store.put(*(make_ticket(group) for group in range(6, 9)), ended=True)
    assert one.ends() is None
    engine.close()
    assert len({(r.group, r.rollout) for r in fake_store.rollouts}) == 18
    assert {r.spans for r in fake_store.rollouts} == {(Span(V0, 4),), (Span(V1, 4),)}
    report = one.generator.report()
    assert report.gauges["tokens"] == 72
    assert report.gauges["swaps"] == 2
    assert report.seconds["busy"] > 0
    assert report.seconds["sync"] > 0


def test_progress_is_that_of_unfinished_requests_and_of_weights_on_their_way(
    start: Callable[..., Running], fake_engine: Any, fake_weights: Any
) -> None:
    generator = start().generator
    before = generator.report().progress
    fake_engine.tokens += 3
    assert generator.report().progress == before + 3
    fake_weights.received_bytes += 5
    assert generator.report().progress == before + 8


def test_an_answer_for_whoever_asks_is_not_the_stores(
    start: Callable[..., Running], fake_engine: Any, fake_store: Any, fake_weights: Any, make_ticket: MakeTicket
) -> None:
    running, got = start(), Future()
    asked = make_ticket(-1, rollouts=(0,))
    threading.Thread(target=lambda: got.set_result(running.generator.answer(asked)), daemon=True).start()
    fake_weights.publish(V1)  # before, there is nothing to answer with
    fake_engine.answer(asked.name_of(0))
    answer = got.result(WAIT_S)
    assert (answer.response_ids, answer.logprobs, answer.text, answer.spans) == ([5, 6], [-1.0, -1.0], "5 6", (Span(V1, 2),))
    assert fake_store.rollouts == []
    assert running.generator.report().gauges["held_groups"] == 0
    running.generator.stop()
    with pytest.raises(Closed):
        running.generator.answer(asked)
