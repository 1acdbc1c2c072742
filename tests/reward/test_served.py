"""A served model: questions from many threads become packs, and each has its own answer."""

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from asyncrl.errors import ConfigError, Unavailable
from asyncrl.reward.results import Opinion
from asyncrl.reward.served import Classifier, Judge, ServedModel
from asyncrl.types import Generation, Sampling

SAMPLING = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_tokens=4, stop_token_ids=(0,))


class Scorer:
    """Scores a sequence by its sum; the first pack waits for the gate."""

    def __init__(self):
        self.packs, self.gate, self.entered = [], threading.Event(), threading.Event()

    def __call__(self, sequences):
        self.packs.append([len(ids) for ids in sequences])
        self.entered.set()
        assert self.gate.wait(20)
        if any(ids[0] == 13 for ids in sequences):
            raise RuntimeError("out of memory")
        return [float(sum(ids)) for ids in sequences]


def encode(chat):
    if not chat:
        raise ValueError("the template refuses it")
    return [ord(letter) - 96 for letter in chat]


def test_whoever_comes_while_a_pack_is_computed_is_in_the_next_within_the_tokens():
    scorer = Scorer()
    classifier = Classifier(encode, scorer, max_length=8, pack_tokens=8, deadline_s=60.0)
    with ThreadPoolExecutor(8) as threads:
        first = threads.submit(classifier, "a")
        assert scorer.entered.wait(20)
        others = [threads.submit(classifier, chat) for chat in ("bb", "cccc", "d", "eeee")]
        while len(classifier._waiting) < 4:
            pass
        scorer.gate.set()
        assert first.result() == Opinion("ok", 1.0)
        assert [future.result().score for future in others] == [4.0, 12.0, 4.0, 20.0]
    assert scorer.packs[0] == [1]
    assert sum(map(len, scorer.packs)) == 5
    assert all(max(pack) * len(pack) <= 8 for pack in scorer.packs), "padding counts"
    assert len(scorer.packs) < 5


def test_what_cannot_be_asked_is_invalid_and_never_cut():
    scorer = Scorer()
    classifier = Classifier(encode, scorer, max_length=3, pack_tokens=8, deadline_s=60.0)
    assert classifier("") == Opinion("invalid", error="the template refuses it")
    assert classifier("aaaa") == Opinion("invalid", error="4 tokens: rewards.models.engine.max_length=3")
    assert scorer.packs == []


def test_a_pack_that_fails_fails_all_of_it_and_no_other():
    scorer = Scorer()
    scorer.gate.set()
    classifier = Classifier(encode, scorer, max_length=3, pack_tokens=8, deadline_s=60.0)
    with pytest.raises(RuntimeError, match="out of memory"):
        classifier("m")
    assert classifier("a").score == 1.0


def test_a_question_whose_deadline_has_passed_is_not_computed():
    scorer = Scorer()
    classifier = Classifier(encode, scorer, max_length=8, pack_tokens=1, deadline_s=0.05)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(classifier, "a")
        assert scorer.entered.wait(20)
        late = threads.submit(classifier, "bb")
        while not classifier._waiting:
            pass
        asked = time.monotonic()
        while time.monotonic() < asked + 0.05:
            pass
        scorer.gate.set()
        assert first.result() == Opinion("ok", 1.0)
        assert late.result().status == "timeout"
    assert scorer.packs == [[1]]


class FakeEngine:
    def __init__(self, *endings):
        self.endings, self.requests = list(endings), []

    def submit_group(self, requests):
        self.requests += requests
        future = Future()
        ending = self.endings.pop(0)
        self.future = future
        if ending is None:
            return [future]
        if isinstance(ending, Exception):
            future.set_exception(ending)
        else:
            blank = {"logprobs": [], "kept_logmass": None, "spans": ()}
            future.set_result(Generation(id="", token_ids=[7, 8], finish_reason=ending, **blank))
        return [future]


def test_a_judge_writes_with_the_engine_what_its_template_makes_of_the_question():
    engine = FakeEngine("stop", ConfigError("request: 99 tokens > max_length"), "abort", "length", None)
    judge = Judge(engine, lambda chat: [len(chat), len(chat[0]["content"])], str, SAMPLING, 60.0)
    assert judge("Good?") == Opinion("ok", texts=["[7, 8]"])
    assert (engine.requests[0].prompt_ids, engine.requests[0].sampling) == ((1, 5), SAMPLING)
    assert judge("long").status == "invalid"
    with pytest.raises(Unavailable):
        judge("given up")
    assert judge("cut") == Opinion("invalid", error="the judge's text was cut at max_tokens=4")
    judge._deadline_s = 0.01
    assert judge("late").status == "timeout"
    assert engine.future.cancelled(), "it gives its slot back"


def test_a_model_that_fails_is_started_anew_and_its_question_asked_again():
    def respond(chat):
        raise RuntimeError("CUDA error")

    served = ServedModel("model-0.0", respond, lambda: None)
    with pytest.raises(Unavailable, match="RuntimeError: CUDA error"):
        served.answer("x")
    with pytest.raises(RuntimeError, match="CUDA error"):
        served.run()


def test_the_stage_answers_counts_and_ends_with_its_model():
    looked = threading.Event()

    def health():
        looked.set()
        raise Unavailable("the server died")

    served = ServedModel("model-0.0", lambda chat: Opinion("ok" if chat else "invalid", 1.0), health)
    assert served.answer("x") == Opinion("ok", 1.0)
    served.answer("")
    report = served.report()
    assert (report.gauges, report.progress) == ({"answered": 2.0, "invalid": 1.0}, 2)
    with pytest.raises(Unavailable, match="the server died"):
        served.run()
    assert looked.is_set()
    served.stop()
    served.run()  # returns
