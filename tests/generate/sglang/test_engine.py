"""The `sglang` engine over real SGLang servers: every token's logprob and version are true, whatever befalls the servers."""

import itertools
import json
import os
import random
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from asyncrl.config import EngineSpec, GeneratorsSpec, LimitsSpec, ModelSpec, SGLangSpec
from asyncrl.errors import Closed, ConfigError, Unavailable
from asyncrl.generate.engines import EngineSite
from asyncrl.generate.sglang.build import sglang_engine
from asyncrl.generate.sglang.distributed import Distributed
from asyncrl.generate.sglang.engine import SGLangEngine
from asyncrl.generate.sglang.keys import RunningServer
from asyncrl.generate.sglang.server import SGLangServer
from asyncrl.interfaces import Told
from asyncrl.models.loading import load_model, load_weights, named_weights
from asyncrl.types import Generation, GenerationRequest, Sampling, SwapReport, Tokens, Version

WAIT_S = 90.0  # bound of every wait
PROBE_S = 6.0
UPDATE_S = 8.0
TOLERANCE = 5e-5  # nats, fp32
Asked = tuple[GenerationRequest, "Future[Generation]"]


class Policy:
    """The weights of every version, and what a plain Hugging Face forward says of an answer under them."""

    def __init__(self, folder: Path) -> None:
        self._model = load_model(ModelSpec(path=str(folder), dtype="float32"))
        self._base = {name: tensor.clone() for name, tensor in named_weights(self._model).items()}
        self.weights = lru_cache(32)(self._weights)

    def _weights(self, version: Version) -> dict[str, torch.Tensor]:
        noise = torch.Generator().manual_seed(1000 * version.incarnation + version.update)
        return {name: tensor + 0.02 * torch.randn(tensor.shape, generator=noise) for name, tensor in self._base.items()}

    @torch.no_grad()
    def logprobs(self, request: GenerationRequest, answer: Generation, version: Version) -> torch.Tensor:
        """[tokens, vocabulary] nats at the request's temperature, if all of its prefix had been seen by `version`."""
        load_weights(self._model, self.weights(version))
        ids = torch.tensor([[*request.prompt_ids, *answer.token_ids]])
        logits = self._model(ids).logits[0, len(request.prompt_ids) - 1 : -1]
        return (logits / (request.sampling.temperature or 1.0)).log_softmax(-1)

    def gap(self, request: GenerationRequest, answer: Generation) -> float:
        """Max |Δ logprob| over the answer, each token under the version that it is labelled with."""
        largest, start = 0.0, 0
        kept = answer.kept_logmass or [0.0] * len(answer.token_ids)
        for span in answer.spans:
            part = slice(start, start := start + span.length)
            own = self.logprobs(request, answer, span.version)[part]
            own = own.gather(-1, torch.tensor(answer.token_ids[part])[:, None])[:, 0]
            said = torch.tensor(answer.logprobs[part]) + torch.tensor(kept[part])
            largest = max(largest, (own - said).abs().max().item())
        return largest


class Rig:
    """An engine with its policy; versions rise from update to update."""

    _groups = itertools.count()
    _incarnations = itertools.count(1)

    def __init__(self, engine: SGLangEngine, policy: Policy) -> None:
        self.engine, self.policy = engine, policy
        self.version = Version(next(self._incarnations), 0)

    def update(self) -> SwapReport:
        self.version = Version(self.version.incarnation, self.version.update + 1)
        report = self.engine.update_weights(self.version, self.policy.weights(self.version))
        assert report.version == self.engine.version == self.version
        return report

    def ask(
        self,
        groups: int = 1,
        each: int = 1,
        length: int = 16,
        prompt: Sequence[int] = (),
        stop: tuple[int, ...] = (),
        told: Told | None = None,
        **how: Any,
    ) -> list[Asked]:
        asked: list[Asked] = []
        for group in itertools.islice(self._groups, groups):
            ids = tuple(prompt) or tuple(random.Random(group).choices(range(2, 512), k=20))
            sampling = Sampling(
                **({"temperature": 1.0, "top_p": 1.0, "top_k": 0} | how), max_tokens=length, stop_token_ids=stop
            )
            requests = [
                GenerationRequest(id=f"{group}/{index}", group=group, prompt_ids=ids, sampling=sampling, seed=0)
                for index in range(each)
            ]
            asked += zip(requests, self.engine.submit_group(requests, told), strict=True)
        return asked

    def steps(self, count: int = 10) -> None:
        """Waits until the engine has decoded `count` more steps at least: a short request begins and ends."""
        self.check(self.ask(length=count))

    def check(self, asked: list[Asked], reason: str = "length", exact: bool = True) -> list[Generation]:
        """Waits for all answers. Each is whole, its versions are those given and rise; exact: and its logprobs are theirs."""
        answers = [future.result(WAIT_S) for _, future in asked]
        for (request, _), answer in zip(asked, answers, strict=True):
            assert (answer.id, answer.finish_reason) == (request.id, reason)
            assert reason != "length" or len(answer.token_ids) == request.sampling.max_tokens
            versions = [span.version for span in answer.spans]
            assert versions == sorted(set(versions))
            assert all(Version(self.version.incarnation, 1) <= version <= self.version for version in versions)
            assert sum(span.length for span in answer.spans) == len(answer.token_ids) == len(answer.logprobs)
        if exact:
            largest = max(self.policy.gap(request, answer) for (request, _), answer in zip(asked, answers, strict=True))
            print(f"max |Δ logprob| {largest:.2e}, {sum(len(answer.token_ids) for answer in answers)} tokens")
            assert largest <= TOLERANCE
        return answers


def until(condition: Callable[[], bool]) -> None:
    """Polls what nothing announces."""
    end, pause = time.monotonic() + WAIT_S, threading.Event()
    while not condition():
        assert time.monotonic() < end, "it never came true"
        pause.wait(0.05)


def scheduler(engine: SGLangEngine) -> int:
    """The process that computes."""
    (found,) = [pid for pid in engine.pids() if b"sglang::schedul" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return found


def ask_server(path: str, server: RunningServer, method: str = "GET", **headers: str) -> tuple[int, bytes]:
    """Status and body."""
    headers |= {"Authorization": f"Bearer {server.key}"} if server.key else {}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(server.url + path, method=method, headers=headers), timeout=WAIT_S
        ) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as refusal:
        return refusal.code, refusal.read()


def running(server: RunningServer) -> int:
    """Requests that a server decodes."""
    _, body = ask_server("/v1/loads?include=core", server)
    return int(sum(rank["num_running_reqs"] for rank in json.loads(body)["loads"]))


def gone(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.fixture(scope="module")
def policy(sglang_model: Path) -> Policy:
    return Policy(sglang_model)


Open = Callable[..., Any]


@pytest.fixture(scope="module")
def open_rig(serve_sglang: object, policy: Policy, sglang_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Open:
    """open_rig(mode, **SGLangSpec) is a context: a rig whose engine is started, and closed at the end.

    attached: servers that run already, each with its own key.
    """

    @contextmanager
    def open_it(mode: Any = "in_flight", attached: Sequence[RunningServer] = (), **sglang: Any) -> Iterator[Rig]:
        arguments = {"max-total-tokens": 65536, "mem-fraction-static": 0.3} | sglang.pop("args", {})
        spec = EngineSpec(
            kind="sglang",
            slots=64,
            max_length=1024,
            update_mode=mode,
            stream_interval=16,
            sglang=SGLangSpec(command=("sglang-cpu-server",), args=arguments, **sglang),
        )
        site = EngineSite(
            generators=GeneratorsSpec(engine=spec),
            model=ModelSpec(path=str(sglang_model), dtype="float32"),
            limits=LimitsSpec(health_timeout_s=2 * PROBE_S, update_timeout_s=UPDATE_S),
            name="test",
            logs=tmp_path_factory.mktemp("logs"),
        )
        if attached:
            transfer = partial(Distributed, site.host, "gloo")
            servers = [partial(SGLangServer, at, transfer) for at in attached]
            engine = SGLangEngine(servers, spec, site.limits, max_length=1024, vocabulary=512)
        else:
            engine = sglang_engine(site)
        rig = Rig(engine, policy)
        try:
            early = rig.ask(2, 2)  # nothing is decoded before the first weights
            engine.start()
            rig.update()
            rig.check(early)
            yield rig
        finally:
            engine.close()

    return open_it


@pytest.fixture(scope="module")
def rig(open_rig: Open) -> Iterator[Rig]:
    """in_flight, without a prefix cache: the server retracts its requests at an update."""
    with open_rig() as rig:
        yield rig
        pids = rig.engine.pids()
        rig.engine.close()
        until(lambda: gone(pids))


# ------------------------------------------------------------------------------------------ distributions


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_logprobs_are_those_of_the_learner(rig: Rig, temperature: float) -> None:
    rig.check(rig.ask(8, 8, length=64, temperature=temperature))  # 4,096 tokens, 64 at a time


def test_greedy_is_the_most_likely_token(rig: Rig) -> None:
    asked = rig.ask(4, 2, length=32, temperature=0.0)
    for (request, _), answer in zip(asked, rig.check(asked, exact=False), strict=True):
        assert answer.token_ids == rig.policy.logprobs(request, answer, rig.version).argmax(-1).tolist()
        assert answer.logprobs == [0.0] * 32


@pytest.mark.parametrize(("top_p", "top_k"), [(0.8, 0), (1.0, 20), (0.9, 50)])
def test_cut_distributions_say_what_was_sampled_and_what_was_kept(rig: Rig, top_p: float, top_k: int) -> None:
    asked = rig.ask(4, 4, length=32, temperature=0.9, top_p=top_p, top_k=top_k)
    whole = rig.ask(1, 2, length=32)  # one that is not cut, in the same batch
    wrong = 0
    for (request, _), answer in zip(asked, rig.check(asked), strict=True):
        values, ids = rig.policy.logprobs(request, answer, rig.version).sort(descending=True)
        before = values.exp().cumsum(-1) - values.exp()  # mass of what is more likely
        kept = (before <= top_p) & (torch.arange(values.shape[1]) < (top_k or values.shape[1]))
        logmass = values.exp().where(kept, 0.0).sum(-1).log()
        inside = ((ids == torch.tensor(answer.token_ids)[:, None]) & kept).any(-1)
        assert answer.kept_logmass is not None
        same = (torch.tensor(answer.kept_logmass) - logmass).abs() <= 1e-4
        wrong += int((~inside | ~same).sum())
    assert wrong <= 2  # of 512: where the last token kept is at the very edge, rounding decides
    assert all(answer.kept_logmass is None for answer in rig.check(whole))


def test_a_stop_token_ends_an_answer_and_is_part_of_it(rig: Rig) -> None:
    stop = tuple(range(1, 512, 8))  # with the model's own end, 1, which SGLang adds
    for answer in rig.check(rig.ask(2, 8, length=900, stop=stop), reason="stop"):
        assert [token in stop for token in answer.token_ids] == [False] * (len(answer.token_ids) - 1) + [True]


def test_requests_that_cannot_be_served_are_refused_at_once(rig: Rig) -> None:
    fits, too_long, too_many = rig.ask(), rig.ask(length=1005), rig.ask(top_k=5000)
    with pytest.raises(ConfigError, match=r"20 tokens \+ max_tokens=1005 > engine.max_length=1024"):
        too_long[0][1].result(0)
    with pytest.raises(ConfigError, match="top_k=5000 > 4096"):
        too_many[0][1].result(0)
    rig.check(fits)


# --------------------------------------------------------------------------------------------------- keys


def test_nobody_without_its_key_can_use_a_server_that_asyncrl_started(rig: Rig) -> None:
    own = rig.engine.servers()[0]
    status, body = ask_server("/openapi.json", own)
    assert status == 200
    tried = 0
    for path, methods in json.loads(body)["paths"].items():
        for method in methods:
            for other in (RunningServer(own.url), RunningServer(own.url, "another-key")):
                status, _ = ask_server(path.replace("{", "").replace("}", ""), other, method.upper())
                open_to_all = path.startswith(("/health", "/ready", "/metrics"))
                assert (status == 200) if open_to_all else (status == 401), (method, path, status)
                tried += 1
    print(f"{tried} requests without the key")
    for path in ("/generate", "/update_weights_from_tensor", "/load_lora_adapter_from_tensors", "/update_weights_from_disk"):
        assert ask_server(path, RunningServer(own.url), "POST")[0] == 401
        assert ask_server(path, RunningServer(own.url), "POST", Host="localhost/health?")[0] in (400, 401)
    for pid in rig.engine.pids():
        for what in ("cmdline", "environ"):
            assert own.key.encode() not in Path(f"/proc/{pid}/{what}").read_bytes()
    rig.steps()


# ------------------------------------------------------------------------------------------------ updates


def test_ten_updates_lose_and_mislabel_nothing(rig: Rig) -> None:
    asked = rig.ask(4, 8, length=200)
    rig.steps()
    reports = [(rig.update(), rig.steps(8))[0] for _ in range(10)]
    answers = rig.check(asked)
    assert max(len(answer.spans) for answer in answers) >= 6
    assert any(report.recomputed_tokens > 32 * 20 for report in reports)
    assert all(report.discarded_tokens == 0 for report in reports)
    pauses = sorted(report.pause_s for report in reports)
    print(f"pause: median {pauses[5]:.3f} s, longest {pauses[-1]:.3f} s")


def test_an_answer_goes_on_from_what_was_told_of_it(rig: Rig) -> None:
    """What was reported is enough: an interval at the most is lost, and every log-probability is that of its version."""
    told: dict[str, list[Tokens]] = {}
    asked = rig.ask(2, 4, length=200, told=lambda request, start, tokens: told.setdefault(request.id, []).append(tokens))
    rig.steps(60)
    rig.update()
    rig.steps(60)
    rig.engine.abort()
    lost, again = 0, []
    for request, future in asked:
        answer = future.result(WAIT_S)
        known = sum(len(piece.token_ids) for piece in told[request.id])
        assert [t for piece in told[request.id] for t in piece.token_ids] == answer.token_ids[:known]
        lost = max(lost, len(answer.token_ids) - known)
        spans = tuple(span for piece in told[request.id] for span in piece.spans)
        assert len({span.version for span in spans}) == 2
        begun = Tokens(token_ids=answer.token_ids[:known], logprobs=answer.logprobs[:known], kept_logmass=None, spans=spans)
        again.append(replace(request, begun=begun))
    assert lost <= 16
    answers = [future.result(WAIT_S) for future in rig.engine.submit_group(again)]
    assert {len(answer.token_ids) for answer in answers} == {200}
    assert max(rig.policy.gap(request, answer) for request, answer in zip(again, answers, strict=True)) <= TOLERANCE


def test_pause_keeps_what_runs_and_an_update_meanwhile_counts(rig: Rig) -> None:
    asked = rig.ask(2, 8, length=200)
    rig.steps()
    rig.engine.pause()
    before = rig.version
    waiting = rig.ask(1, 2)
    rig.update()
    assert not any(future.done() for _, future in asked + waiting)
    rig.engine.resume()
    for answer in rig.check(asked):
        assert [span.version for span in answer.spans] in ([before, rig.version], [rig.version])
    assert all([span.version for span in answer.spans] == [rig.version] for answer in rig.check(waiting))


def test_abort_ends_one_group_or_all(rig: Rig) -> None:
    doomed, kept = rig.ask(1, 8, length=1000), rig.ask(1, 8, length=100)
    rig.steps()
    rig.update()  # what an aborted answer has got is labelled as truly
    rig.steps()
    rig.engine.abort(doomed[0][0].group)
    assert all(8 <= len(answer.token_ids) < 1000 for answer in rig.check(doomed, reason="abort"))
    rig.check(kept)
    doomed = rig.ask(2, 8, length=1000)
    rig.engine.abort()  # before, while or after the server has read them
    assert all(len(answer.token_ids) < 1000 for answer in rig.check(doomed, reason="abort"))
    rig.steps()
    before = rig.engine.gauges()["tokens"]
    for _, future in rig.ask(2, 8, length=1000):
        future.cancel()  # by their holder
    until(lambda: rig.engine.gauges()["in_flight"] == 0 and not any(replica.rows for replica in rig.engine._replicas))
    assert rig.engine.gauges()["tokens"] - before < 16 * 1000
    rig.steps()


def test_with_a_prefix_cache_no_old_prefix_is_reused(open_rig: Open) -> None:
    with open_rig(prefix_cache=True) as rig:
        prompt = random.Random(7).choices(range(2, 512), k=200)
        asked = rig.ask(2, 8, length=250) + rig.ask(1, 8, length=250, prompt=prompt)
        for _ in range(4):
            rig.check(rig.ask(1, 2, length=12, prompt=prompt))  # the trap: its KV cache is of the version before
            report = rig.update()
            assert report.recomputed_tokens > 0
        answers = rig.check(asked)
        assert max(len(answer.spans) for answer in answers) == 5
        assert rig.engine.gauges()["interrupted"] >= 4 * 24

        unfinished, pids = rig.ask(2, 8, length=1000), rig.engine.pids()
        rig.steps()
        rig.engine.close()
        for _, future in unfinished:
            with pytest.raises(Closed):
                future.result(WAIT_S)
        until(lambda: gone(pids))
        with pytest.raises(Closed):
            rig.engine.submit_group([unfinished[0][0]])[0].result(WAIT_S)
        with pytest.raises(Closed):
            rig.engine.health(WAIT_S)


@pytest.mark.parametrize("mode", ["drain", "restart", "keep_kv"])
def test_other_update_modes_on_a_server_that_runs_already(open_rig: Open, sglang_server: str, mode: str) -> None:
    with open_rig(mode, urls=(sglang_server,)) as rig:  # by `distributed` transfer
        asked = rig.ask(2, 8, length=250)
        discarded = 0
        for _ in range(3):
            rig.steps() if mode != "keep_kv" else rig.check(rig.ask(length=10), exact=False)
            discarded += rig.update().discarded_tokens
        answers = rig.check(asked, exact=mode != "keep_kv")
        spans = {len(answer.spans) for answer in answers}
        assert max(spans) == (4 if mode == "keep_kv" else 1)
        assert (discarded > 0) == (mode == "restart")
        assert rig.engine.pids() == []
    with open_rig(urls=(sglang_server,)) as rig:  # it was not ended with the engine
        assert rig.engine.servers() == [RunningServer(sglang_server)]


def test_two_servers_share_the_load_and_a_server_that_others_update_is_replaced(
    open_rig: Open, rig: Rig, sglang_server: str
) -> None:
    before = rig.engine.gauges()
    servers = RunningServer(sglang_server), rig.engine.servers()[0]
    with open_rig(attached=servers) as both:
        until(lambda: both.engine.gauges()["servers_up"] == 2)
        assert both.engine.slots == 128
        asked = both.ask(8, 4, length=200)
        until(lambda: [running(server) for server in servers] == [16, 16])
        both.update()
        assert {len(answer.spans) for answer in both.check(asked)} <= {1, 2}
    # The rig's own server now has weights that the rig did not give it. Nothing from them is taken for its own.
    rig.check(rig.ask(2, 4, length=100))
    gauges = {name: value - before[name] for name, value in rig.engine.gauges().items()}
    assert (gauges["restarts"], gauges["resumed"], gauges["reissued"]) == (1, 0, 8)


# ------------------------------------------------------------------------------------------------- losses


def test_a_killed_scheduler_costs_time_and_no_rollout(rig: Rig) -> None:
    before = rig.engine.gauges()
    asked = rig.ask(4, 8, length=300)
    rig.steps(40)
    rig.update()
    late = rig.ask(1, 8, length=300)
    rig.steps(20)
    os.kill(scheduler(rig.engine), signal.SIGKILL)
    answers = rig.check(asked + late)
    assert all(answer.spans[-1].version == rig.version for answer in answers)
    assert max(len(answer.spans) for answer in answers) == 2  # what was known of the old weights was kept
    gauges = {name: value - before[name] for name, value in rig.engine.gauges().items()}
    assert gauges["restarts"] == 1
    assert gauges["resumed"] + gauges["reissued"] == 40
    assert gauges["resumed"] >= 32
    assert (rig.engine.gauges()["servers_up"], rig.engine.gauges()["in_flight"]) == (1, 0)
    print(f"recovery {rig.engine.gauges()['recovery_s']:.1f} s, lost tokens {gauges['lost_tokens']:.0f} of {40 * 300}")
    rig.engine.health(WAIT_S)


def test_a_wedged_scheduler_is_replaced_even_in_the_middle_of_an_update(rig: Rig) -> None:
    restarts = rig.engine.gauges()["restarts"]
    asked = rig.ask(2, 8, length=200)
    rig.steps()
    wedged = scheduler(rig.engine)
    os.kill(wedged, signal.SIGSTOP)
    rig.update()  # no error: the next server takes these weights
    rig.check(asked)
    assert all(answer.spans[-1].version == rig.version for answer in rig.check(rig.ask(1, 4)))
    assert rig.engine.gauges()["restarts"] == restarts + 1
    until(lambda: gone([wedged]))


def test_a_server_that_cannot_start_ends_the_engine_with_the_end_of_its_log(open_rig: Open) -> None:
    with pytest.raises(Unavailable, match="unrecognized arguments: --no-such-flag"), open_rig(args={"no-such-flag": True}):
        pass


def test_a_kv_cache_that_is_too_small_costs_no_rollout(open_rig: Open) -> None:
    """32 rollouts of 220 tokens in a cache for 13 of them: the server queues or retracts the others, over an update as well."""
    with open_rig(args={"max-total-tokens": 3000}) as rig:
        asked = rig.ask(4, 8, length=200)
        until(lambda: rig.engine.gauges()["waiting"] > 0)
        rig.update()
        answers = rig.check(asked)
        assert len(answers) == 32
        gauges = rig.engine.gauges()
        print(f"{gauges['retracted']:.0f} retracted, KV cache {gauges['kv_usage']:.2f} full")
        assert gauges["restarts"] == 0
