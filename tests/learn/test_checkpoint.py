import logging
import random
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from asyncrl.config import LoraSpec, ModelSpec
from asyncrl.disk import as_size
from asyncrl.errors import CheckpointError, ConfigError, DiskFull, Fenced
from asyncrl.learn import snapshot
from asyncrl.learn.checkpoint import Checkpoints
from asyncrl.lineage import Lineage
from asyncrl.manifests import verify_manifest
from asyncrl.models.lora import add_adapters
from asyncrl.rundir import RunDir
from asyncrl.types import Version

LEARNER = {"mini_batch_groups": 2, "lr_schedule": "cosine", "warmup_steps": 2}


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run").create()


def save(checkpoints: Checkpoints, trainer, update: int, incarnation: int = 1) -> Path:
    folder = checkpoints.save(trainer, Version(incarnation, update))
    checkpoints.wait()
    return folder


def restore_at(checkpoints: Checkpoints, trainer, *of) -> int:
    checkpoints.load(trainer, update := checkpoints.choose(*of))
    return update


def state(trainer) -> list[torch.Tensor]:
    moments = [value for entry in trainer.trained["policy"].adamw.state.values() for value in entry.values()]
    return [*trainer.model.state_dict().values(), *moments]


def test_continuing_equals_never_having_stopped(run_dir: RunDir, make_trainer, make_model, make_rollouts) -> None:
    batches = [make_rollouts(seed=seed) for seed in range(4)]
    whole = make_trainer(learner=LEARNER, max_lag=9)
    for committed, batch in enumerate(batches):
        whole.update(batch, committed)
    first = make_trainer(learner=LEARNER, max_lag=9)
    for committed in (0, 1):
        first.update(batches[committed], committed)
    save(Checkpoints(run_dir, 2), first, 2)
    second = make_trainer(learner=LEARNER, max_lag=9, model=make_model(seed=5))
    assert Checkpoints(run_dir, 2).restore(second) == 2
    assert all(torch.equal(a, b) for a, b in zip(state(first), state(second), strict=True))
    for committed in (2, 3):
        second.update(batches[committed], committed)
    assert all(torch.equal(a, b) for a, b in zip(state(whole), state(second), strict=True))


def adapted(make_model, seed: int = 0, base: int = 0, **lora):
    model = make_model(seed=base)
    add_adapters(model, LoraSpec(**{"rank": 2, **lora}), ModelSpec(path="base"), seed)
    return model


def test_adapters_alone_are_saved_and_gone_on_with_to_the_bit(run_dir, make_trainer, make_model, make_rollouts) -> None:
    whole, first = (make_trainer(max_lag=9, model=adapted(make_model)) for _ in range(2))
    for committed in range(3):
        whole.update(make_rollouts(seed=committed), committed)
    for committed in range(2):
        first.update(make_rollouts(seed=committed), committed)
    folder = save(Checkpoints(run_dir, 2), first, 2)
    saved = safetensors.torch.load_file(folder / "policy" / "model.safetensors")
    assert saved.keys() == {name for name, parameter in first.model.named_parameters() if parameter.requires_grad}
    second = make_trainer(max_lag=9, model=adapted(make_model, seed=5))
    assert Checkpoints(run_dir, 2).restore(second) == 2
    second.update(make_rollouts(seed=2), 2)
    assert all(torch.equal(a, b) for a, b in zip(state(whole), state(second), strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 8.0}, r"is of a run with lora=LoraSpec\(rank=2, alpha=32\.0, .*, not LoraSpec\(rank=2, alpha=8\.0"),
        (
            {"base": 1},
            r"policy has adapters of 'base' \(float32\) as it was then; the weights of 'base' \(float32\) are others",
        ),
        (None, r"is of a run with lora=LoraSpec\(.*, not None: its weights would be another policy's"),
    ],
)
def test_adapters_are_gone_on_with_as_they_were_and_on_their_own_base(run_dir, make_trainer, make_model, changes, message):
    save(Checkpoints(run_dir, 2), make_trainer(model=adapted(make_model)), 0)
    other = make_model() if changes is None else adapted(make_model, **changes)
    with pytest.raises(CheckpointError, match=message):
        Checkpoints(run_dir, 2).restore(make_trainer(model=other))


def test_random_states_return(run_dir: RunDir, make_trainer) -> None:
    trainer, checkpoints = make_trainer(), Checkpoints(run_dir, 2)
    np.random.normal()  # leaves a cached second value behind
    random.gauss(0, 1)
    save(checkpoints, trainer, 1)
    expected = (torch.rand(3).tolist(), np.random.normal(size=3).tolist(), random.gauss(0, 1), random.random())
    checkpoints.restore(trainer)
    assert (torch.rand(3).tolist(), np.random.normal(size=3).tolist(), random.gauss(0, 1), random.random()) == expected


def test_the_policy_folder_is_a_hugging_face_model(run_dir: RunDir, make_trainer) -> None:
    trainer = make_trainer()
    folder = save(Checkpoints(run_dir, 2), trainer, 0)
    loaded, ids = AutoModelForCausalLM.from_pretrained(folder / "policy"), torch.arange(6)[None]
    torch.testing.assert_close(loaded(input_ids=ids).logits, trainer.model(input_ids=ids).logits)


def test_keep_last_n_and_the_oldest_retained(run_dir: RunDir, make_trainer) -> None:
    trainer, checkpoints = make_trainer(), Checkpoints(run_dir, 2)
    for update, oldest in ((0, 0), (5, 0), (10, 5)):
        save(checkpoints, trainer, update)
        assert checkpoints.oldest_kept(update) == oldest
        checkpoints.prune(oldest)
    assert [folder.name for folder in run_dir.steps()] == ["step_000005", "step_000010"]


def test_multiples_of_keep_every_and_those_saved_by_hand_stay(run_dir: RunDir, make_trainer) -> None:
    trainer, checkpoints = make_trainer(), Checkpoints(run_dir, 1, keep_every=10)
    checkpoints.on_whole = lambda version: checkpoints.prune(checkpoints.oldest_kept(version.update))
    for update in (0, 5, 7, 10, 15, 20, 25):
        checkpoints.save(trainer, Version(1, update), by_hand=update == 7)
    checkpoints.wait()
    assert [RunDir.update_of(folder) for folder in run_dir.steps()] == [7, 10, 20, 25]
    # What can be gone on from is another matter: the log goes back to the oldest of the newest keep_last_n.
    assert checkpoints.oldest_kept(25) == 25
    history = Lineage(oldest=25, newest={1: 25})
    with pytest.raises(CheckpointError, match=r"step_000010 can't be resumed from: .* `asyncrl export` and `asyncrl eval`"):
        checkpoints.choose(10, history.refusal)
    assert checkpoints.choose(refusal=history.refusal) == 25
    checkpoints.discard_after(5)  # going back gives up what came later, but not what was saved by hand
    assert [RunDir.update_of(folder) for folder in run_dir.steps()] == [7]


def test_training_goes_on_while_a_checkpoint_is_written_and_what_fails_is_told(
    run_dir, make_trainer, make_rollouts, monkeypatch
):
    trainer, checkpoints, counted = make_trainer(), Checkpoints(run_dir, 5), []
    begun, released = threading.Event(), threading.Event()

    def slowly(tensors: dict, path: Path, metadata: dict) -> None:
        begun.set()
        assert released.wait(20)
        safetensors.torch.save_file(tensors, path, metadata)

    monkeypatch.setattr(snapshot, "save_file", slowly)
    checkpoints.on_whole = counted.append
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    folder = checkpoints.save(trainer, Version(1, 1))
    assert begun.wait(20)
    trainer.update(make_rollouts(), 0)
    checkpoints.check()
    assert (folder.exists(), counted) == (False, [])
    released.set()
    checkpoints.wait()
    assert counted == [Version(1, 1)]
    saved = safetensors.torch.load_file(folder / "policy/model.safetensors")
    assert all(torch.equal(saved[name], before[name]) for name in saved)
    assert not torch.equal(before["model.norm.weight"], trainer.model.state_dict()["model.norm.weight"])

    monkeypatch.setattr(snapshot, "save_file", lambda *of: 1 / 0)
    checkpoints.save(trainer, Version(1, 2))
    with pytest.raises(ZeroDivisionError):
        checkpoints.save(trainer, Version(1, 3))  # which waits for the one before
    assert counted == [Version(1, 1)]


def test_a_damaged_checkpoint_is_skipped_and_said(run_dir: RunDir, make_trainer, make_rollouts, caplog) -> None:
    trainer, checkpoints = make_trainer(), Checkpoints(run_dir, 5)
    trainer.update(make_rollouts(), 0)
    for update in (0, 5, 10):
        save(checkpoints, trainer, update)
    (run_dir.checkpoint(10) / "manifest.json").unlink()
    torn = run_dir.checkpoint(5) / "optimizer/policy/adamw.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        assert checkpoints.restore(trainer) == 0
    assert "step_000010 has no manifest.json" in caplog.text
    assert "adamw.safetensors has" in caplog.text
    assert len(run_dir.steps()) == 3  # nothing is deleted before the fence
    with pytest.raises(
        CheckpointError, match=r"adamw\.safetensors has \d+ bytes(.|\n)*has step_000000, step_000005, step_000010"
    ):
        checkpoints.choose(5)


def test_a_save_that_fails_half_way_leaves_no_trace(run_dir: RunDir, make_trainer, make_model, monkeypatch) -> None:
    trainer, checkpoints = make_trainer(), Checkpoints(run_dir, 5)
    save(checkpoints, trainer, 5)
    monkeypatch.setattr(snapshot, "save_file", lambda *arguments: (_ for _ in ()).throw(OSError("broken")))
    with pytest.raises(OSError, match="broken"):
        save(checkpoints, trainer, 10)
    assert [entry.name for entry in run_dir.checkpoints.iterdir()] == ["step_000005"]


def test_a_full_disk_is_named_the_half_written_goes_and_older_ones_stay(run_dir: RunDir, make_trainer, monkeypatch) -> None:
    trainer, checkpoints = make_trainer(), Checkpoints(run_dir, 5)
    save(checkpoints, trainer, 5)
    size = sum(parameter.nbytes for parameter in trainer.model.parameters())  # no moments yet
    room = rf"no room for .*step_000010.*: {re.escape(as_size(size))} are needed, .* are free"

    def on_a_full_disk(tensors: object, path: Path, metadata: object) -> None:
        Path("/dev/full").write_bytes(safetensors.torch.save(tensors, metadata))

    for seam, fails in (
        ("asyncrl.disk.free_bytes", lambda path: size - 1),
        ("asyncrl.learn.snapshot.save_file", on_a_full_disk),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(seam, fails)
            with pytest.raises(DiskFull, match=room):
                save(checkpoints, trainer, 10)
        assert [entry.name for entry in run_dir.checkpoints.iterdir()] == ["step_000005"]
    assert save(checkpoints, trainer, 10).name == "step_000010"


def test_restore_at_an_update_gives_up_what_came_after(run_dir: RunDir, make_trainer) -> None:
    trainer, checkpoints = make_trainer(), Checkpoints(run_dir, 5)
    for update in (0, 5, 10):
        save(checkpoints, trainer, update)
    with pytest.raises(ConfigError, match="no checkpoint of update 7; resume from one of step_000000, step_000005, s"):
        checkpoints.choose(7)
    assert restore_at(checkpoints, trainer, 5) == 5
    assert len(run_dir.steps()) == 3
    checkpoints.discard_after(5)
    assert [folder.name for folder in run_dir.steps()] == ["step_000000", "step_000005"]


def test_nothing_to_restore_and_nothing_whole(run_dir: RunDir, make_trainer) -> None:
    trainer, checkpoints = make_trainer(), Checkpoints(run_dir, 5)
    assert checkpoints.restore(trainer) is None
    (save(checkpoints, trainer, 0) / "rng/rng.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint of .* can be used"):
        checkpoints.restore(trainer)


def test_a_checkpoint_that_the_log_does_not_reach_is_not_restored(run_dir: RunDir, make_trainer, caplog) -> None:
    trainer, checkpoints = make_trainer(), Checkpoints(run_dir, 5)
    for update, incarnation in ((0, 1), (5, 1), (10, 2), (15, 3)):
        save(checkpoints, trainer, update, incarnation)
    # The second learner was fenced at update 8, and nobody knows the third.
    history = Lineage(oldest=5, newest={1: 8, 2: 8})
    with caplog.at_level(logging.WARNING):
        assert checkpoints.choose(refusal=history.refusal) == 5
    assert "step_000015 can't be resumed from: the replay log knows no incarnation 3" in caplog.text
    assert "step_000010 can't be resumed from: it is ahead of the replay log, which holds 8 updates" in caplog.text
    with pytest.raises(CheckpointError, match=r"goes back to update 5: rows .* deleted(.|\n)*the run has step_000000, s"):
        checkpoints.choose(0, history.refusal)


def test_a_learner_that_was_fenced_does_not_replace_its_successors_checkpoint(run_dir: RunDir, make_trainer) -> None:
    trainer, checkpoints = make_trainer(), Checkpoints(run_dir, 1)
    save(checkpoints, trainer, 5, incarnation=2)
    with pytest.raises(Fenced, match=r"step_000005 is of learner incarnation 2 > 1"):
        save(checkpoints, trainer, 5, incarnation=1)
    assert verify_manifest(run_dir.checkpoint(5))["incarnation"] == 2
    save(checkpoints, trainer, 40, incarnation=1)  # ahead, where nobody is yet
    assert checkpoints.oldest_kept(5) == 5  # it does not push out the one that counts
    save(checkpoints, trainer, 5, incarnation=3)  # a later one may


def test_an_adaptive_kl_coefficient_survives(run_dir: RunDir, make_trainer, make_model, make_rollouts) -> None:
    algorithm = {"kl_coef": 0.2, "kl_control": "adaptive", "kl_target": 0.05, "kl_horizon": 70}

    def trainer():
        return make_trainer(learner=LEARNER, algorithm=algorithm, max_lag=9, reference=make_model(seed=3))

    whole, checkpoints = trainer(), Checkpoints(run_dir, 2)
    for committed in range(4):
        if committed == 2:
            save(checkpoints, whole, 2)
            saved = whole.state["kl_coef"]
        whole.update(make_rollouts(seed=committed), committed)
    second = trainer()
    assert checkpoints.restore(second) == 2
    assert second.state == {"kl_coef": saved} != {"kl_coef": 0.2}
    for committed in (2, 3):
        second.update(make_rollouts(seed=committed), committed)
    assert second.state == whole.state
    assert all(torch.equal(a, b) for a, b in zip(state(whole), state(second), strict=True))


def test_a_state_of_another_recipe_is_left_alone(run_dir: RunDir, make_trainer) -> None:
    trainer, checkpoints = make_trainer(), Checkpoints(run_dir, 2)
    trainer.state["kl_coef"] = 0.7
    save(checkpoints, trainer, 0)
    fixed, adaptive, other = {}, {"kl_coef": 0.1}, {"else": 1.0}
    for figures in (fixed, adaptive, other):
        trainer.state = figures
        checkpoints.restore(trainer)
    assert (fixed, adaptive, other) == ({}, {"kl_coef": 0.7}, {"else": 1.0})
