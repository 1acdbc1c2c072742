"""The loop against a scripted store and bus: what it calls, in which order, and how it ends."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from asyncrl.config import LoraSpec, ModelSpec
from asyncrl.errors import CheckpointError, Closed, DiskFull, Fenced, NonFinite, Unavailable
from asyncrl.learn import snapshot
from asyncrl.learn.checkpoint import Checkpoints
from asyncrl.learn.learner import Learner
from asyncrl.learn.parallel.rank import Rank
from asyncrl.lineage import Fence, Lineage
from asyncrl.manifests import verify_manifest
from asyncrl.models.loading import load_weights, named_weights
from asyncrl.models.lora import add_adapters
from asyncrl.models.packed import PackedModel, TokenSequence, make_pack
from asyncrl.models.shards import same_bits
from asyncrl.rundir import RunDir
from asyncrl.types import BatchLease, Version


def lease(number: int, committed: int, **fields) -> BatchLease:
    return BatchLease(lease=number, groups=(2 * number, 2 * number + 1), committed=committed, **fields)


EMPTY = BatchLease(lease=0, groups=(), committed=0, waiting_for="ready groups")
ENDED = BatchLease(lease=0, groups=(), committed=0, ended=True)


class Tokenizer:
    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "tokenizer.json").write_text("{}")


@pytest.fixture
def make_learner(make_trainer, make_store, make_bus, tmp_path: Path):
    def make(leases, *, save_freq: int = 2, eval_freq: int | None = 2, fence: Fence | None = None, keep_last_n: int = 2, **of):
        calls: list = []
        store, bus, trainer = make_store(leases, calls, fence), make_bus(calls), make_trainer(max_lag=9, **of)
        checkpoints = Checkpoints(RunDir(tmp_path / "run"), keep_last_n)
        learner = Learner(
            Rank(trainer, checkpoints, Tokenizer()),
            store,
            lambda incarnation: bus,
            checkpoints,
            save_freq=save_freq,
            eval_freq=eval_freq,
            poll_s=0.1,
        )
        return learner, store, bus, trainer

    return make


def of_the_loop(store) -> list:
    """The calls of its own thread: checkpoints count in another, when they are whole."""
    return [call for call in store.calls if call[0] != "checkpointed"]


def counted(store) -> list[int]:
    return [call[1] for call in store.calls if call[0] == "checkpointed"]


def test_calls_of_a_run_in_order(make_learner, tmp_path: Path) -> None:
    learner, store, _, _ = make_learner([lease(11, 0), EMPTY, lease(12, 1), lease(13, 2)])
    assert learner.run(3) == 3
    assert store.calls[:3] == [("fence", 0), ("checkpointed", 0), ("publish", "3.0")]  # the first one counts before it is used
    assert counted(store) == [0, 0, 2]
    assert of_the_loop(store) == [
        ("fence", 0),
        ("publish", "3.0"),
        ("eval", "3.0"),
        ("commit", 11, "3.1"),
        ("publish", "3.1"),
        ("commit", 12, "3.2"),
        ("publish", "3.2"),
        ("eval", "3.2"),
        ("commit", 13, "3.3"),
        ("publish", "3.3"),
        ("eval", "3.3"),  # the last version is saved and evaluated, whatever the frequencies
    ]
    assert store.asked == [0, 1, 1, 2]  # the first poll for update 1 came back empty-handed; none goes beyond `until`
    assert [folder.name for folder in RunDir(tmp_path / "run").steps()] == ["step_000002", "step_000003"]


def test_a_last_version_whose_turn_it_is_is_saved_and_evaluated_once(make_learner) -> None:
    learner, store, _, _ = make_learner([lease(1, 0), lease(2, 1)])
    learner.run(2)
    assert of_the_loop(store)[-2:] == [("publish", "3.2"), ("eval", "3.2")]
    assert counted(store) == [0, 0]


def test_the_next_batch_is_fetched_while_the_learner_trains(make_learner) -> None:
    learner, store, _, trainer = make_learner([lease(1, 0), lease(2, 0), lease(3, 2)], eval_freq=None)
    fetched = {update: threading.Event() for update in (0, 1, 2)}
    rows, update = store.rows, trainer.update

    def note_rows(groups):
        fetched[groups[0] // 2 - 1].set()
        return rows(groups)

    def train(rollouts, committed):
        if committed < 2:
            assert fetched[committed + 1].wait(10), f"batch {committed + 1} was not fetched while update {committed + 1} ran"
        return update(rollouts, committed)

    store.rows, trainer.update = note_rows, train
    assert learner.run(3) == 3
    assert [call[:2] for call in store.calls if call[0] == "commit"] == [("commit", 1), ("commit", 2), ("commit", 3)]
    assert [figures["staleness/lag_max"] for figures in store.metrics] == [0.0, 1.0, 2.0]  # at the update that trains


def test_what_is_published_is_what_was_trained(make_learner) -> None:
    learner, _, bus, trainer = make_learner([lease(1, 0), lease(2, 1)])
    learner.run(2)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(bus.published["3.2"][name], trainer.model.get_parameter(name))
    assert not torch.equal(bus.published["3.1"][name], bus.published["3.2"][name])


@pytest.mark.parametrize("lr", [0.0, 1e-2])
def test_with_adapters_every_version_published_is_the_policy_as_it_is_then(
    make_learner, make_model, lr: float, tmp_path
) -> None:
    model, plain, base = make_model(), make_model(), named_weights(make_model())
    add_adapters(model, LoraSpec(rank=2), ModelSpec(path="base"), seed=0)
    learner, _, bus, trainer = make_learner([lease(i, i) for i in range(20)], model=model, learner={"lr": lr}, save_freq=99)
    pack = make_pack([TokenSequence(np.arange(16) * 3 % 16, np.arange(1, 16))], [0])
    publish, gaps = bus.publish, []

    def note(version, stage):
        publish(version, stage)
        weights = bus.published[str(version)]
        assert list(weights) == list(base)
        load_weights(plain, weights)
        engine, own = (PackedModel(of).score([pack], torch.empty(15)) for of in (plain, trainer.model))
        gaps.append((engine - own).abs().max().item())

    bus.publish = note
    learner.run(20)
    assert max(gaps) <= 5e-5
    assert len(gaps) == 21
    unmoved = [all(same_bits(weights[name], base[name]) for name in base) for weights in bus.published.values()]
    assert unmoved == [True] + [lr == 0] * 20
    learner.export(str(tmp_path / "out"))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(same_bits(exported[name], tensor) for name, tensor in bus.published["3.20"].items())


def test_metrics_are_committed_with_the_batch(make_learner) -> None:
    learner, store, _, _ = make_learner([lease(1, 0, replayed=True), lease(2, 1)])
    learner.run(2)
    first, second = store.metrics
    assert (first["training/groups"], first["training/rollouts"], first["training/replayed"]) == (2.0, 6.0, 1.0)
    assert second["training/replayed"] == 0.0
    assert first["staleness/lag_max"] == 0.0
    assert second["staleness/lag_max"] == 1.0
    assert {"actor/pg_loss", "reward/mean", "timing_s/step", "timing_s/wait_batch", "timing_s/publish"} <= first.keys()


PARTS = [
    "pack",
    "old_log_prob",
    "ref",
    "values",
    "adv",
    "forward_backward",
    "optimizer",
    "update_critic",
    "wait_ranks",
    "metrics",
]
BETWEEN = ["wait_batch", "commit", "publish", "checkpoint", "request_eval", "restore"]


def test_timings_add_up_to_the_time_of_a_step_with_what_is_unaccounted(make_learner) -> None:
    """Also over a pause between two runs, in which a checkpoint is asked for: that one counts, the pause does not."""
    learner, store, _, _ = make_learner(
        [lease(1, 0), lease(2, 1), lease(3, 2), lease(4, 3)], critic={}, algorithm={"adv_estimator": "gae"}
    )
    began = time.monotonic()
    learner.run(2)
    learner.save_checkpoint()
    between = time.monotonic()
    time.sleep(0.2)
    resumed = time.monotonic()
    learner.run(4)
    ended = time.monotonic()
    assert len(store.metrics) == 4
    for line in store.metrics:
        named = [line.get(f"timing_s/{part}", 0.0) for part in (*PARTS, *BETWEEN, "unaccounted")]
        assert sum(named) == pytest.approx(line["perf/time_per_step"], abs=1e-9)
        assert line["timing_s/unaccounted"] > -1e-6
        assert line["perf/throughput"] == pytest.approx(line["perf/total_num_tokens"] / line["perf/time_per_step"])
        assert line["timing_s/update"] <= line["timing_s/step"]
    assert "timing_s/restore" in store.metrics[0]
    awake = (ended - resumed) + (between - began)
    assert sum(line["perf/time_per_step"] for line in store.metrics) <= awake


def test_end_of_data_is_a_clean_end(make_learner, tmp_path: Path) -> None:
    learner, store, _, _ = make_learner([lease(1, 0), ENDED])
    assert learner.run(10) == 1
    assert of_the_loop(store)[-1:] == [("eval", "3.1")]
    assert counted(store) == [0, 0]
    assert RunDir(tmp_path / "run").checkpoint(1).is_dir()


def test_a_restart_restores_fences_there_and_retrains_under_its_incarnation(make_learner) -> None:
    first, _, _, trainer = make_learner([lease(1, 0), lease(2, 1), lease(3, 2)])
    first.run(3)
    fence = Fence(incarnation=4, committed=3, reopened=1)
    second, store, bus, restored = make_learner([lease(9, 3, replayed=True)], fence=fence)
    assert second.run(4) == 4
    assert store.calls[:3] == [("fence", 3), ("checkpointed", 2), ("publish", "4.3")]
    assert ("commit", 9, "4.4") in store.calls
    for name, weight in bus.published["4.3"].items():
        assert torch.equal(weight, trainer.model.state_dict()[name])
    assert restored.trained["policy"].adamw.param_groups[0]["lr"] == 1e-2


def test_a_learner_that_was_fenced_deletes_no_checkpoint(make_learner, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    learner, store, _, _ = make_learner([lease(11, 0), lease(12, 1), lease(13, 2)], save_freq=1, keep_last_n=1)

    def refuse(oldest: int) -> None:
        if oldest == 2:
            raise Fenced("incarnation 4 took over")

    store.checkpointed = refuse
    with pytest.raises(Fenced):
        learner.run(3)
    assert [folder.name for folder in run.steps()] == ["step_000001", "step_000002"]  # the newer one does not count
    late, store, _, _ = make_learner([])
    store.history = Lineage(oldest=0, newest={3: 1})

    def refuse_fence(committed: int) -> Fence:
        assert committed == 1
        raise Fenced("incarnation 5 took over")

    store.fence = refuse_fence
    with pytest.raises(Fenced):
        late.start()
    assert len(run.steps()) == 2
    successor, store, _, _ = make_learner([], fence=Fence(incarnation=4, committed=1, reopened=0))
    store.history = Lineage(oldest=0, newest={3: 1})
    assert successor.start() == Version(4, 1)
    assert [folder.name for folder in run.steps()] == ["step_000001"]


def test_a_finished_run_started_again_trains_nothing(make_learner) -> None:
    make_learner([lease(1, 0)])[0].run(1)
    learner, store, _, _ = make_learner([], fence=Fence(incarnation=4, committed=1, reopened=0), eval_freq=None)
    assert learner.run(1) == 1
    assert store.calls == [("fence", 1), ("checkpointed", 0), ("publish", "4.1")]


def test_fit_goes_on_where_it_was(make_learner) -> None:
    learner, store, _, _ = make_learner([lease(1, 0), lease(2, 1)], eval_freq=None)
    assert learner.run(1) == 1
    assert store.asked == [0]  # nothing is leased that this call will not train
    assert learner.run(2) == 2
    assert store.asked == [0, 1]
    assert store.calls.count(("fence", 0)) == 1


def test_stop_ends_at_the_next_poll_without_the_last_rites(make_learner) -> None:
    learner, store, _, _ = make_learner([lease(1, 0), EMPTY, EMPTY])
    store.on_lease = lambda: learner.stop() if store.asked.count(1) == 2 else None
    assert learner.run(10) == 1
    assert store.asked == [0, 1, 1]
    assert store.calls[-1] == ("publish", "3.1")


def test_halt_saves_after_the_update_under_way_and_a_later_run_goes_on(make_learner, tmp_path: Path) -> None:
    learner, store, _, trainer = make_learner([], save_freq=50, eval_freq=50)
    leases = [lease(1, 0), lease(2, 1), lease(3, 2)]
    store.lease_batch = lambda update, wait_s: leases[update]  # the same to whoever asks again, as of the store
    update = trainer.update

    def halted(*arguments):
        if arguments[1] == 0:
            learner.halt()
        return update(*arguments)

    trainer.update = halted
    assert learner.run(3) == 1
    assert store.calls[-3:] == [("commit", 1, "3.1"), ("publish", "3.1"), ("checkpointed", 0)]
    assert [folder.name for folder in RunDir(tmp_path / "run").steps()] == ["step_000000", "step_000001"]
    assert learner.run(3) == 3
    assert [call[:2] for call in store.calls if call[0] == "commit"] == [("commit", 1), ("commit", 2), ("commit", 3)]
    assert of_the_loop(store)[-1] == ("eval", "3.3")


def test_a_save_that_is_asked_for_meanwhile_comes_after_the_update_and_stays(make_learner, tmp_path: Path) -> None:
    learner, _, _, trainer = make_learner([lease(i, i - 1) for i in range(1, 6)], save_freq=2, eval_freq=None, keep_last_n=1)
    update = trainer.update

    def asking(*arguments):
        if arguments[1] in (0, 3):  # also while it is its turn anyway
            learner.save_soon()
        return update(*arguments)

    trainer.update = asking
    assert learner.run(5) == 5
    kept = [folder.name for folder in RunDir(tmp_path / "run").steps()]
    assert kept == ["step_000001", "step_000004", "step_000005"]  # those asked for, and the last one


def test_halt_ends_a_wait_for_data_and_what_is_saved_is_not_saved_again(make_learner) -> None:
    learner, store, _, _ = make_learner([lease(1, 0), EMPTY, EMPTY], save_freq=1, eval_freq=None)
    store.on_lease = lambda: learner.halt() if store.asked.count(1) == 2 else None
    assert learner.run(10) == 1
    assert store.calls.count(("checkpointed", 0)) == 2  # step_000000 and step_000001


def test_without_evaluation_none_is_requested(make_learner) -> None:
    learner, store, _, _ = make_learner([lease(1, 0)], eval_freq=None)
    learner.run(1)
    assert not [call for call in store.calls if call[0] == "eval"]


@pytest.mark.parametrize(("error", "ends"), [(Closed("the run is stopping"), True), (Fenced("incarnation 4 took over"), False)])
def test_a_closed_store_ends_it_and_a_fence_is_an_error(error: Exception, ends: bool, make_learner) -> None:
    learner, store, _, _ = make_learner([lease(1, 0)])

    def fail() -> None:
        raise error

    store.on_lease = fail
    if ends:
        assert learner.run(1) == 0
    else:
        with pytest.raises(Fenced, match="took over"):
            learner.run(1)


def test_an_error_in_the_helper_is_raised_after_the_update_under_way(make_learner) -> None:
    learner, store, _, _ = make_learner([lease(1, 0)])

    def fail() -> None:
        if store.asked[-1] == 1:
            raise Unavailable("store: no answer")

    store.on_lease = fail
    with pytest.raises(Unavailable, match="no answer"):
        learner.run(10)
    assert learner.committed == 1


def test_an_error_in_training_ends_the_helper(make_learner) -> None:
    learner, store, _, trainer = make_learner([lease(1, 0)] + [EMPTY] * 1000)
    polled = threading.Event()

    def note() -> None:
        if store.asked[-1] == 1:
            polled.set()

    def diverge(rollouts, committed):
        assert polled.wait(10)
        raise NonFinite("the loss is nan")

    store.on_lease, trainer.update = note, diverge
    with pytest.raises(NonFinite):
        learner.run(10)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_weights_whose_commit_failed_are_given_up(make_learner) -> None:
    learner, store, _, trainer = make_learner([lease(1, 0), lease(1, 0)])
    commit, refused = store.commit, iter([Closed("stopping")])

    def fail_once(*arguments) -> None:
        for error in refused:
            raise error
        commit(*arguments)

    store.commit = fail_once
    assert learner.run(1) == 0
    assert learner.run(1) == 1  # from step_000000 again, behind a new fence
    assert store.calls.count(("fence", 0)) == 2
    assert trainer.trained["policy"].adamw.state[next(iter(trainer.model.parameters()))]["step"] == 1


def test_a_store_of_another_run_is_refused(make_learner) -> None:
    learner, _, _, _ = make_learner([], fence=Fence(incarnation=1, committed=7, reopened=0))
    with pytest.raises(CheckpointError, match="stands at update 7 after a fence at checkpoint 0"):
        learner.run(1)


def test_report_names_states_and_the_update(make_learner) -> None:
    learner, _, _, trainer = make_learner([lease(1, 0)])
    learner.run(1)
    report = learner.report()
    assert report.role == "learner"
    assert {"busy", "sync", "wait:store", "wait:start"} <= report.seconds.keys()
    assert report.gauges == {"update": 1.0, "bus/receivers": 2.0, **trainer.holds()}


def test_save_and_export_between_runs(make_learner, tmp_path: Path) -> None:
    learner, _, _, _ = make_learner([lease(1, 0)], save_freq=50)
    learner.run(1)
    assert learner.save_checkpoint().endswith("checkpoints/step_000001")
    learner.export(str(tmp_path / "out"))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_what_the_trainer_carries_from_update_to_update_is_saved_and_restored(make_learner) -> None:
    learner, _, _, trainer = make_learner([lease(11, 0), lease(12, 1)])
    trainer.state = {"kl_coef": 0.5}
    learner.run(2)
    second, _, _, restored = make_learner([], fence=Fence(incarnation=4, committed=2, reopened=0))
    restored.state = {"kl_coef": 0.1}
    second.start()
    assert restored.state == {"kl_coef": 0.5}


def test_every_pack_of_an_update_is_progress(make_learner) -> None:
    parts = {"max_tokens_per_pack": 9, "mini_batch_groups": 1, "ppo_epochs": 2}
    learner, _, _, trainer = make_learner([lease(1, 0)], learner=parts)
    seen = []
    trainer.model.base_model.register_forward_hook(lambda *_: seen.append(learner.report().progress))
    learner.run(1)
    assert len(seen) >= 8
    assert seen == sorted(set(seen)), "a pack went by unnoticed"
    assert learner.report().progress > seen[-1], "so are the commit, the publication and the checkpoint"


def test_a_checkpoint_that_can_not_be_written_ends_the_run_and_shows_in_a_report(make_learner, monkeypatch) -> None:
    learner, store, _, _ = make_learner([lease(1, 0), lease(2, 1), ENDED], save_freq=1, eval_freq=None)
    learner.start()
    monkeypatch.setattr(snapshot, "save_file", lambda *of: Path("/dev/full").write_bytes(b"no room"))
    with pytest.raises(DiskFull, match=r"no room for .*step_000001"):
        learner.run(9)
    assert counted(store) == [0]
    learner._ranks.save(Version(3, 2))
    learner._checkpoints._helper.shutdown(wait=True)
    with pytest.raises(DiskFull, match=r"no room for .*step_000002"):  # also while the loop waits for a batch
        learner.report()


def test_a_checkpoint_saved_by_hand_is_whole_when_it_is_named_and_stays(make_learner, tmp_path: Path) -> None:
    learner, store, _, _ = make_learner([lease(n, n - 1) for n in range(1, 5)], save_freq=1, eval_freq=None, keep_last_n=1)
    learner.run(1)
    folder = Path(learner.save_checkpoint())
    assert verify_manifest(folder)["by_hand"]
    learner.run(4)
    assert [step.name for step in RunDir(tmp_path / "run").steps()] == ["step_000001", "step_000004"]
    assert counted(store) == [0, 1, 1, 2, 3, 4]
