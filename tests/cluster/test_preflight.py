"""Every check that a run passes before an actor starts, one by one, and all together."""

import json
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from safetensors.numpy import save_file

from asyncrl.cluster.preflight import check_resumed, check_run
from asyncrl.config import (
    AlgorithmSpec,
    CriticSpec,
    DataSpec,
    Deployment,
    EngineSpec,
    EpisodeSpec,
    EvaluationSpec,
    GeneratorsSpec,
    JudgeSpec,
    LearnerSpec,
    LoraSpec,
    ModelSpec,
    Recipe,
    RewardSpec,
    RewardTerm,
    SamplingSpec,
    SGLangSpec,
    StalenessSpec,
)
from asyncrl.config.paths import resolve_paths
from asyncrl.errors import CheckpointError, ConfigError, DataError
from asyncrl.manifests import file_sum, write_manifest
from asyncrl.rundir import RunDir


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "runs/r")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Ten rows, a reward and a model folder; eight groups a batch."""
    row = {"data_source": "s", "prompt": "1+1=", "reward_model": {"ground_truth": "2"}}
    (tmp_path / "train.jsonl").write_text((json.dumps(row) + "\n") * 10)
    (tmp_path / "rewards.py").write_text("def score(*args): return 1.0\n\nkeep = max\n\ndef prepare(recipe, run_dir): ...\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    return Recipe(
        name="r",
        model=ModelSpec(path=f"{tmp_path}/model"),
        data=DataSpec(files=(f"{tmp_path}/train.jsonl",)),
        reward=RewardSpec(function=f"{tmp_path}/rewards.py:score"),
        sampling=SamplingSpec(n=4),
        learner=LearnerSpec(batch_groups=8),
        total_steps=5,
    )


def test_lora_is_told_and_needs_peft(recipe: Recipe, run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(**lora) -> list[str]:
        learner = replace(recipe.learner, lora=LoraSpec(rank=8, **lora))
        return [line for line in check_run(replace(recipe, learner=learner), Deployment(num_cpus=2), run) if "adapters" in line]

    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    (tmp_path / "model/config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False, **sizes}))
    # rank · layers · (4 · (32 + 32) + 3 · (32 + 48)), as peft has it
    [line] = plan()
    assert line == "lora        adapters of rank 8, alpha 32, of all-linear: about 7,936 parameters, beside 19,584 that stay"
    [line] = plan(target_modules=("q_proj", "v_proj"))
    assert line.endswith("of q_proj, v_proj")
    monkeypatch.setattr("asyncrl.cluster.preflight.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"learner\.lora needs peft, which is not installed: pip install 'asyncrl\[lora\]'"):
        plan()


def test_a_family_of_chats_needs_renderers(
    recipe: Recipe, run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    episode = EpisodeSpec(tools=(f"{tmp_path}/rewards.py:score",), chat="llama-3")
    monkeypatch.setattr("asyncrl.cluster.preflight.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"episode\.chat='llama-3' needs renderers.*: pip install 'asyncrl\[agents\]'"):
        check_run(replace(recipe, episode=episode), Deployment(num_cpus=2), run)


def test_modules_of_an_interpreter_of_its_own_are_not_looked_for_here(recipe: Recipe, run: RunDir) -> None:
    episode = EpisodeSpec(agent="only_there:solve", python="/elsewhere/bin/python")
    check_run(replace(recipe, episode=episode), Deployment(num_cpus=2), run)
    for wrong in (replace(episode, python=""), replace(episode, agent="nowhere.py:solve")):
        with pytest.raises(ConfigError, match=r"episode\.agent='.*': no (module|file)"):
            check_run(replace(recipe, episode=wrong), Deployment(num_cpus=2), run)


def test_the_plan(recipe: Recipe, run: RunDir, tmp_path: Path) -> None:
    recipe = replace(recipe, staleness=StalenessSpec(max_lag=9))
    plan = check_run(recipe, Deployment(num_cpus=2), run)
    assert plan.pop().startswith("disk        ")  # tests/cluster/test_space.py
    assert plan == [
        f"run         {tmp_path}/runs/r",
        f"model       {tmp_path}/model",
        f"data        {tmp_path}/train.jsonl: prompt, reward_model.ground_truth, data_source found",
        f"reward      {tmp_path}/rewards.py:score, at most 10 s a sample",
        "algorithm   adv_estimator=grpo; policy_loss=ppo (clip_ratio=0.2, clip_ratio_high=0.2); "
        "correction=decoupled (behaviour_cap=5.0, normalize_weights=False); loss_agg=token-mean",
        "sampling    n=4, temperature=1, top_p=1, top_k=0",
        "episode     none: a rollout is one answer",
        "lengths     1024 prompt + 1024 response tokens of 2048",
        "batches     5 updates × 8 groups × 4 rollouts",
        # 256 slots hold eight batches of 32 rollouts, of which four count; two more are ready and in training.
        "staleness   hold: no trained token is ever more than max_lag=9 updates old; usually 5 or less, as reserve_ahead=6 "
        "batches (48 groups) are outstanding at most, for 256 slots",
        "history     every rollout, until they take deploy.store.keep_bytes=107374182400 (100.0 GiB), after some 136,533 "
        "updates of the longest responses; then the oldest are deleted, but for what a resume needs",
        "dtypes      the learner keeps weights in float32 and computes in float32; they travel in float32, and the engine "
        "computes in float32",
        "engine      torch: embedded, in_flight updates",
        "placement   4 actors on this machine ask for 0 of 2 CPUs",
        "learner     1 rank; how large the model is, is not known",
        "trackers    tensorboard",
    ]
    assert not run.path.exists()


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        (
            {"policy_loss": "gspo", "clip_ratio": 0.2, "correction": "none", "masks": ("icepop", "m2po")},
            "adv_estimator=grpo; policy_loss=gspo (clip_ratio=0.2, clip_ratio_high=0.2); correction=none; "
            "masks=icepop (icepop_bounds=(0.5, 5.0)); masks=m2po (m2po_bound=0.04); loss_agg=seq-mean-token-mean",
        ),
        (
            {"policy_loss": "kto", "kl_coef": 0.1},
            "policy_loss=kto (preference_beta=0.1, kto_desirable_weight=1.0, kto_undesirable_weight=1.0); loss_agg=token-mean; "
            "kl_coef=0.1; kl_in=loss; kl_estimator=k3; kl_control=fixed",
        ),
    ],
)
def test_the_plan_shows_what_was_left_to_the_loss(fields: dict, line: str, recipe: Recipe, run: RunDir) -> None:
    plan = check_run(replace(recipe, algorithm=AlgorithmSpec(**fields)), Deployment(num_cpus=2), run)
    assert f"algorithm   {line}" in plan


def test_sampling_that_the_models_folder_recommends_is_named_and_not_used(recipe: Recipe, run: RunDir, tmp_path: Path) -> None:
    said = {"temperature": 0.6, "top_p": 0.95, "top_k": 0, "eos_token_id": [1, 2]}
    (tmp_path / "model/generation_config.json").write_text(json.dumps(said))
    plan = check_run(recipe, Deployment(num_cpus=2), run)
    assert (
        "sampling    n=4, temperature=1, top_p=1, top_k=0; generation_config.json of the model says temperature=0.6, "
        "top_p=0.95, which is not used: a recipe says what is trained on" in plan
    )


def test_a_builder_is_looked_for_and_no_server_can_call_it(recipe: Recipe, run: RunDir, tmp_path: Path) -> None:
    built = replace(recipe, model=replace(recipe.model, builder=f"{tmp_path}/rewards.py:keep"))
    assert f"model       {tmp_path}/model, made by {tmp_path}/rewards.py:keep" in check_run(built, Deployment(num_cpus=2), run)
    with pytest.raises(ConfigError, match=r"model\.builder='.*nobody': .* has no 'nobody'"):
        check_run(replace(built, model=replace(built.model, builder=f"{tmp_path}/rewards.py:nobody")), Deployment(), run)
    deployment = Deployment(num_cpus=2, generators=GeneratorsSpec(engine=EngineSpec(kind="sglang")))
    with pytest.raises(ConfigError, match=r"its servers load a folder, and can't call model\.builder=.*save_pretrained"):
        check_run(built, deployment, run)


def test_what_prepare_makes_need_not_exist_yet(recipe: Recipe, run: RunDir, tmp_path: Path) -> None:
    made = replace(
        recipe,
        model=ModelSpec(path="{run}/data/model"),
        data=DataSpec(files=("{run}/data/train.parquet",), epochs=1),
        evaluation=EvaluationSpec(files=("{run}/data/heldout.parquet",)),
        prepare="rewards.py:prepare",
    )
    plan = check_run(resolve_paths(made, run, tmp_path), Deployment(), run)
    assert sum(line.endswith("(made by prepare)") for line in plan) == 3
    with pytest.raises(ConfigError, match=r"3 problems:\n  1\. model\.path=.*does not exist"):
        check_run(resolve_paths(replace(made, prepare=""), run, tmp_path), Deployment(), run)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"model": ModelSpec(path="/nowhere/model")}, ConfigError, r"model\.path='/nowhere/model' does not exist"),
        (
            {
                "algorithm": AlgorithmSpec(adv_estimator="gae"),
                "critic": CriticSpec(model=ModelSpec(path="/nowhere/critic")),
            },
            ConfigError,
            r"critic\.model\.path='/nowhere/critic' does not exist",
        ),
        ({"model": ModelSpec(path="/")}, ConfigError, r"model\.path='/' has no config\.json"),
        ({"data": DataSpec(files=("/nowhere/a.jsonl",))}, DataError, r"no data file /nowhere/a\.jsonl"),
        ({"evaluation": EvaluationSpec(files=("/nowhere/a.jsonl",))}, DataError, r"no data file /nowhere/a\.jsonl"),
        ({"reward": RewardSpec(function="/nowhere.py:f")}, ConfigError, r"reward\.function='/nowhere\.py:f'"),
        ({"prepare": "/nowhere.py:f"}, ConfigError, r"prepare='/nowhere\.py:f'"),
        ({"sampling": SamplingSpec(keep="/nowhere.py:f")}, ConfigError, r"sampling\.keep='/nowhere\.py:f'"),
        ({"algorithm": AlgorithmSpec(adv_estimator="/nowhere.py:f")}, ConfigError, r"adv_estimator='/nowhere\.py:f'"),
        ({"algorithm": AlgorithmSpec(policy_loss="/nowhere.py:f")}, ConfigError, r"policy_loss='/nowhere\.py:f'"),
        ({"sampling": SamplingSpec(n=1, min_valid=1)}, ConfigError, r"sampling\.n=1 with .*'grpo'.* all would be 0"),
        (
            {"sampling": SamplingSpec(n=1, min_valid=1), "algorithm": AlgorithmSpec(adv_estimator="rloo")},
            ConfigError,
            r"sampling\.n=1 with .*'rloo'.* all would be 0",
        ),
        ({"sampling": SamplingSpec(n=257)}, ConfigError, r"engine\.slots=256 < sampling\.n=257"),
        (
            {"sampling": SamplingSpec(n=256), "algorithm": AlgorithmSpec(adv_estimator="remax")},
            ConfigError,
            r"engine\.slots=256 < sampling\.n=256 \+ 1 for its baseline: .*slots=257 or more",
        ),
        (
            {"sampling": SamplingSpec(max_response_length=1025)},
            ConfigError,
            r"= 2049 tokens > generators\.engine\.max_length=2048",
        ),
    ],
)
def test_problems(recipe: Recipe, run: RunDir, fields: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_run(replace(recipe, **fields), Deployment(), run)


SERVED_ELSEWHERE = r"can't be served by generators\.engine\.kind='torch': {}.*use deploy\.generators\.engine\.kind=sglang"
LONGROPE = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "rope_scaling": {"type": "longrope"}}


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"model_type": "llama"}, ""),
        ({"model_type": "mistral", "sliding_window": 4096}, ""),
        ({"model_type": "of_its_own_code"}, ""),
        (
            {"model_type": "mamba", "architectures": ["MambaForCausalLM"]},
            "MambaForCausalLM.*" + SERVED_ELSEWHERE.format("it keeps a re"),
        ),
        (
            {"model_type": "qwen3_5", "text_config": {"model_type": "qwen3_5_text"}},
            SERVED_ELSEWHERE.format("it keeps a recurrent"),
        ),
        (LONGROPE, r"Phi3ForCausalLM.*" + SERVED_ELSEWHERE.format("its rotary positions")),
    ],
)
def test_what_the_embedded_engine_cannot_serve_is_told_from_the_configuration(
    recipe: Recipe, run: RunDir, tmp_path: Path, config: dict, problem: str
) -> None:
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    attached = EngineSpec(kind="sglang", sglang=SGLangSpec(urls=("http://127.0.0.1:30000",)))
    assert check_run(recipe, Deployment(generators=GeneratorsSpec(engine=attached)), run)
    if not problem:
        assert check_run(recipe, Deployment(), run)
        return
    with pytest.raises(ConfigError, match=problem):
        check_run(recipe, Deployment(), run)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"model_type": "t5", "is_encoder_decoder": true}', "is no causal language model: it is an encoder with a decoder"),
        ('{"model_type": "bert", "architectures": ["BertForMaskedLM"]}', "is no causal language model: it is an encoder: its"),
        ("not found", r"model/config\.json is no JSON: .*fetch the model again"),
    ],
)
def test_what_the_learner_cannot_train_is_told_whatever_the_engine(
    recipe: Recipe, run: RunDir, tmp_path: Path, text: str, problem: str
) -> None:
    (tmp_path / "model/config.json").write_text(text)
    for engine in (EngineSpec(), EngineSpec(kind="sglang", sglang=SGLangSpec(urls=("http://127.0.0.1:30000",)))):
        with pytest.raises(ConfigError, match=problem):
            check_run(recipe, Deployment(generators=GeneratorsSpec(engine=engine)), run)


def test_columns_are_those_that_the_recipe_names(recipe: Recipe, run: RunDir) -> None:
    wrong = replace(recipe.data, answer_key="answer")
    with pytest.raises(
        DataError, match=r"train\.jsonl, line 1: no column 'answer' .*columns found: data_source, prompt, reward_model"
    ):
        check_run(replace(recipe, data=wrong), Deployment(), run)


@pytest.mark.parametrize(("epochs", "batch", "fits"), [(1, 10, True), (1, 11, False), (2, 20, False), (None, 11, False)])
def test_an_epoch_that_cannot_fill_a_batch(recipe: Recipe, run: RunDir, epochs: int | None, batch: int, fits: bool) -> None:
    recipe = replace(recipe, data=replace(recipe.data, epochs=epochs), learner=LearnerSpec(batch_groups=batch))
    if fits:
        check_run(recipe, Deployment(), run)
        return
    with pytest.raises(ConfigError, match=rf"10 rows < learner\.batch_groups={batch}: an epoch cannot fill .*batch_groups=10"):
        check_run(recipe, Deployment(), run)


def test_a_file_without_rows_is_one_problem(recipe: Recipe, run: RunDir, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"^[^\n]*train\.jsonl holds no rows[^\n]*$"):  # and no batch of 0 is advised
        check_run(recipe, Deployment(), run)


def test_another_engine_and_estimator_lift_their_bounds(recipe: Recipe, run: RunDir) -> None:
    long = replace(recipe, sampling=SamplingSpec(n=4, max_response_length=3072))
    deployment = Deployment(generators=GeneratorsSpec(engine=EngineSpec(max_length=4096)))
    assert "lengths     1024 prompt + 3072 response tokens of 4096" in check_run(long, deployment, run)
    assert check_run(replace(recipe, algorithm=AlgorithmSpec(adv_estimator="grpo_no_std")), Deployment(), run)
    alone = AlgorithmSpec(adv_estimator="reinforce_plus_plus")
    assert check_run(replace(recipe, algorithm=alone, sampling=SamplingSpec(n=1, min_valid=1)), Deployment(), run)


def test_an_engine_that_cannot_be_started_is_told_with_the_rest(recipe: Recipe, run: RunDir) -> None:
    engine = EngineSpec(kind="sglang", sglang=SGLangSpec(command=("no-such-server",)))
    deployment = Deployment(generators=GeneratorsSpec(engine=engine))
    with pytest.raises(ConfigError, match=r"'no-such-server' is not on PATH"):
        check_run(recipe, deployment, run)
    sampled = replace(recipe, sampling=SamplingSpec(n=257, top_p=0.9))
    with pytest.raises(ConfigError, match=r"2 problems:\n  1\. .*sampling\.n=257\b.*\n  2\. .*'no-such-server' is not on PATH"):
        check_run(sampled, deployment, run)


def test_a_run_directory_that_cannot_be_made(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"run directory .*file/r: .*file is not a writable folder \(.*; choose .*--runs-dir"):
        check_run(recipe, Deployment(), RunDir(tmp_path / "file/r"))
    with pytest.raises(ConfigError, match=r"run directory /proc/runs/r: /proc is not a writable folder"):  # even for root
        check_run(recipe, Deployment(), RunDir("/proc/runs/r"))


def test_a_run_directory_whose_folders_are_not_ours(recipe: Recipe, run: RunDir) -> None:
    run.path.mkdir(parents=True)
    (run.path / "replay").symlink_to("/proc")
    with pytest.raises(ConfigError, match=r"runs/r/replay is not a writable folder"):
        check_run(recipe, Deployment(), run)
    assert [path.name for path in run.path.iterdir()] == ["replay"], "the check left something"


SMALL = {"model_type": "qwen3", "hidden_size": 4, "num_hidden_layers": 1, "eos_token_id": 1}


@pytest.fixture
def checkpoint(recipe: Recipe, run: RunDir) -> Path:
    """One of the recipe's model, by two ranks."""
    Path(recipe.model.path, "config.json").write_text(json.dumps(SMALL))
    folder = run.create().checkpoint(3)
    for name in ("policy/config.json", "training_state.json", "optimizer/policy/none"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(SMALL | {"eos_token_id": 2}))
    for rank in (0, 1):
        pieces = json.dumps({"w": ((4, 2), (2 * rank, 0))})
        save_file({"w": np.zeros((2, 2), np.float32)}, folder / f"policy/rank_{rank}.safetensors", {"pieces": pieces})
    files = [path for path in folder.rglob("*") if path.is_file()]
    write_manifest(folder, {"update": 3, "incarnation": 1}, {str(f.relative_to(folder)): file_sum(f) for f in files})
    return folder


def test_a_checkpoint_that_can_be_gone_on_from(recipe: Recipe, run: RunDir, checkpoint: Path, monkeypatch) -> None:
    monkeypatch.setattr("asyncrl.manifests.sha256", lambda path: pytest.fail("the driver reads no weights"))
    check_resumed(recipe, run)
    check_resumed(recipe, run, 3)
    with pytest.raises(ConfigError, match="no checkpoint of update 2; resume from one of step_000003"):
        check_resumed(recipe, run, 2)


def other_model(recipe: Recipe, folder: Path) -> None:
    Path(recipe.model.path, "config.json").write_text(json.dumps(SMALL | {"hidden_size": 8, "num_hidden_layers": 2}))


def missing_rank(recipe: Recipe, folder: Path) -> None:
    (folder / "policy/rank_1.safetensors").unlink()


def unlisted_rank(recipe: Recipe, folder: Path) -> None:
    missing_rank(recipe, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["policy/rank_1.safetensors"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


def earlier_version(recipe: Recipe, folder: Path) -> None:
    (folder / "training_state.json").unlink()
    write_manifest(folder, {"update": 3, "incarnation": 1}, {})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            other_model,
            ConfigError,
            r"has hidden_size=8, not 4, num_hidden_layers=2, not 1 as in .*step_000003: its w",
        ),
        (missing_rank, CheckpointError, r"policy/rank_1\.safetensors is missing, but the manifest lists it"),
        (unlisted_rank, CheckpointError, r"w in .*policy: 4 of 8 elements are missing: only rank_0\.safetensors have"),
        (earlier_version, CheckpointError, "step_000003 was written by an earlier version of asyncrl"),
    ],
)
def test_what_can_not_be_gone_on_from_is_named(recipe: Recipe, run: RunDir, checkpoint: Path, change, error, message) -> None:
    change(recipe, checkpoint)
    with pytest.raises(error, match=message):
        check_resumed(recipe, run)


def test_a_run_with_a_critic_needs_a_checkpoint_with_one(recipe: Recipe, run: RunDir, checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="step_000003 holds no critic, but the recipe has one"):
        check_resumed(replace(recipe, algorithm=AlgorithmSpec(adv_estimator="gae")), run)


def test_reward_models_and_judges_are_told_before_anything_is_loaded(recipe: Recipe, run: RunDir, tmp_path: Path, monkeypatch):
    (tmp_path / "rm").mkdir()
    config = tmp_path / "rm" / "config.json"
    (tmp_path / "ask.txt").write_text("Is {response} good?")
    judge = JudgeSpec(prompt=f"{tmp_path}/ask.txt", url="http://judge/v1", key_env="MY_JUDGE")
    terms = RewardTerm(model=ModelSpec(path=f"{tmp_path}/rm"), name="rm"), RewardTerm(judge=judge)
    asked = replace(recipe, reward=RewardSpec(functions=terms))
    config.write_text(json.dumps({"architectures": ["Qwen3ForSequenceClassification"], "id2label": {"0": "good"}}))
    monkeypatch.setenv("MY_JUDGE", "sesame")
    plan = "\n".join(check_run(asked, Deployment(), run))
    assert f"rm: {tmp_path}/rm, served by 1 × torch" in plan
    assert f"judge/ask: http://judge/v1 with the key in MY_JUDGE, asked what {tmp_path}/ask.txt says" in plan
    assert "5 actors" in plan
    assert "sesame" not in plan

    monkeypatch.delenv("MY_JUDGE")
    config.write_text(json.dumps({"architectures": ["Qwen3ForCausalLM"]}))
    with pytest.raises(ConfigError, match=r"(?s)is a Qwen3ForCausalLM: .*key_env='MY_JUDGE' is not set here"):
        check_run(asked, Deployment(), run)
    pairs = RewardTerm(judge=JudgeSpec(prompt=f"{tmp_path}/ask.txt", url="http://judge/v1", pairwise=True))
    compared = replace(recipe, reward=RewardSpec(functions=(pairs,)))
    with pytest.raises(ConfigError, match=r"has no \{response_a\}"):
        check_run(compared, Deployment(), run)
    (tmp_path / "ask.txt").write_text("{response_a} or {response_b}?")
    held_out = EvaluationSpec(files=recipe.data.files)
    with pytest.raises(ConfigError, match="nothing but judge/ask, which compares responses of one policy"):
        check_run(replace(compared, evaluation=held_out), Deployment(), run)
