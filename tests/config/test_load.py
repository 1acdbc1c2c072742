"""Recipe and deployment files, and overrides: what they become, and what their mistakes say."""

from pathlib import Path

import msgspec
import pytest

from asyncrl.config import Deployment, ModelSpec, PlaceSpec, RanksSpec, Recipe, RewardTerm
from asyncrl.config.load import load_deployment, load_recipe, load_specs, override
from asyncrl.errors import ConfigError

REPOSITORY = Path(__file__).parents[2]

MINIMAL = """from asyncrl.config import *
recipe = Recipe(
    name="r",
    model=ModelSpec(path="m"),
    data=DataSpec(files=("f",)),
    reward=RewardSpec(function="m:f"),
    learner=LearnerSpec(
        batch_groups=8,
    ),
    total_steps=3,
)
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.py"
    path.write_text(MINIMAL)
    return path


@pytest.fixture
def recipe(recipe_file: Path) -> Recipe:
    return load_recipe(recipe_file)


# ------------------------------------------------------------------------------------------------- recipe


def test_a_recipe_is_a_value_or_a_function_and_may_import_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_recipe.py").write_text("STEPS = 7\n")
    path = tmp_path / "recipe.py"
    path.write_text(
        MINIMAL.replace("recipe = Recipe", "made = Recipe") + "def recipe():\n    import neighbour_of_recipe\n    return made\n"
    )
    assert load_recipe(path).total_steps == 3
    path.write_text("from neighbour_of_recipe import STEPS\n" + MINIMAL.replace("total_steps=3", "total_steps=STEPS"))
    assert load_recipe(path).total_steps == 7
    path.write_text(MINIMAL.replace('"m:f"', 'f"{__file__}:f"'))
    assert load_recipe(path).reward.function == f"{path}:f"
    path.write_text("def score(*sample): ...\n" + MINIMAL.replace('"m:f"', "score"))  # the function itself
    assert load_recipe(path).reward.function == f"{path}:score"


def test_a_run_is_gone_on_with_by_its_own_recipe(recipe_file: Path, tmp_path: Path) -> None:
    saved = tmp_path / "recipe.json"
    saved.write_bytes(msgspec.json.encode(load_recipe(recipe_file)))
    assert load_recipe(saved) == load_recipe(recipe_file)
    saved.write_text(saved.read_text().replace("total_steps", "totalsteps"))
    with pytest.raises(ConfigError, match=r"recipe\.json is no recipe of this version of asyncrl: .*totalsteps"):
        load_recipe(saved)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("total_steps=3,", "total_steps=3,,", r"recipe\.py, line 10: invalid syntax: total_steps=3,,"),
        ("batch_groups=8", "batch_group=8", r"line 8: LearnerSpec has no field 'batch_group'; did you mean 'batch_groups'\?"),
        ("batch_groups=8", "rate=8", r"line 8: LearnerSpec has no field 'rate'\. Valid: lr, betas, "),
        (
            "batch_groups=8",
            "learning_rate=8",
            r"line 8: LearnerSpec has no field 'learning_rate'; TRL .* is learner\.lr",
        ),
        ("batch_groups=8", "batch_groups='8'", r"line 8: batch_groups='8' must be int"),
        ("total_steps=3", "seed='8', total_steps=3", r"line 10: seed='8' must be int"),
        ("batch_groups=8", "lr_schedule='cosin'", r"line 8: learner\.lr_schedule='cosin' must be one of 'constant', 'cosine'"),
        ("batch_groups=8", "ppo_epochs=0", r"recipe\.py, line 7: learner\.ppo_epochs=0 < 1"),
        ("total_steps=3", "total_steps=1 // 0", r"line 10: ZeroDivisionError"),
        ("recipe = ", "recip = ", r"recipe\.py: sets no `recipe`"),
        ("recipe = Recipe(", "recipe = dict(", r"`recipe` is a dict, not an asyncrl\.Recipe"),
        ("from asyncrl.config", "import nowhere_to_be_found\nfrom asyncrl.config", r"line 1: ModuleNotFoundError"),
    ],
)
def test_mistakes_in_a_recipe_name_file_and_line(recipe_file: Path, old: str, new: str, message: str) -> None:
    recipe_file.write_text(MINIMAL.replace(old, new, 1))
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe(recipe_file)
    assert str(recipe_file) in str(caught.value)


# ---------------------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("learner.lr=1e-5", 1e-5),  # a string to YAML 1.1
        ("learner.lr=3", 3.0),
        ("learner.betas=[0.9, 1e-1]", (0.9, 0.1)),
        ("data.files=[a.parquet,b.jsonl]", ("a.parquet", "b.jsonl")),
        ("data.files=a.parquet", ("a.parquet",)),
        ("data.epochs=2", 2),
        ("data.epochs=null", None),
        ("data.epochs=None", None),
        ("data.shuffle=false", False),
        ("data.shuffle=off", False),
        ("name=123", "123"),
        ("name=", ""),
        ("name=a=b", "a=b"),
        ("model.tokenizer=null", "null"),  # text, as the field is
        ("staleness.on_stale=drop", "drop"),
        ("algorithm.masks=[icepop, m2po]", ("icepop", "m2po")),
        ("algorithm.policy_loss=own.py:loss", "own.py:loss"),
    ],
)
def test_an_override_is_typed_by_its_field(recipe: Recipe, text: str, value: object) -> None:
    changed: object = override(recipe, [text])
    for name in text.partition("=")[0].split("."):
        changed = getattr(changed, name)
    assert changed == value
    assert type(changed) is type(value)


def test_an_override_reaches_into_an_optional_group(recipe: Recipe) -> None:
    assert override(Deployment(), ["critic.place.cpus=2"]).critic == RanksSpec(place=PlaceSpec(cpus=2.0))
    changed = override(recipe, ["algorithm.adv_estimator=gae", "critic.model.path=small", "critic.model.dtype=bfloat16"])
    assert changed.critic.model == ModelSpec(path="small", dtype="bfloat16")
    assert override(changed, ["critic.model=null"]).critic.model is None
    with pytest.raises(ConfigError, match=r"critic\.model has no field 'pth'; did you mean 'path'"):
        override(recipe, ["critic.model.pth=small"])


def test_an_override_is_a_list_of_groups(recipe: Recipe) -> None:
    terms = "[{function: 'm:f', name: '7', weight: 2}, {function: 'm:g', weight: 0.5}]"
    changed = override(recipe, ["reward.function=", f"reward.functions={terms}", "reward.shaping.clip=[-0.25,1.5]"])
    first, second = RewardTerm(function="m:f", name="7", weight=2.0), RewardTerm(function="m:g", weight=0.5)
    assert changed.reward.functions == (first, second)
    assert changed.reward.shaping.clip == (-0.25, 1.5)


def test_overrides_are_checked_together(recipe: Recipe) -> None:
    changed = override(recipe, ["staleness.reserve_ahead=20", "staleness.max_lag=32"])  # the first alone is refused
    assert (changed.staleness.reserve_ahead, changed.total_steps) == (20, 3)
    with pytest.raises(ConfigError, match=r"staleness\.reserve_ahead=20 > 17"):
        override(recipe, ["staleness.reserve_ahead=20"])
    assert override(changed, ["staleness.reserve_ahead=auto"]).staleness.reserve_ahead == "auto"
    assert override(recipe, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learner.lr", r"expected FIELD=VALUE"),
        ("learner.lr=fast", r"learner\.lr must be float, not 'fast'"),
        ("sampling.n=2.5", r"sampling\.n must be int, not '2\.5'"),
        ("data.shuffle=maybe", r"data\.shuffle must be bool"),
        ("data.epochs=often", r"data\.epochs must be int or null"),
        ("staleness.reserve_ahead=some", r"staleness\.reserve_ahead must be int or one of 'auto', not 'some'"),
        ("data.files={a: 1}", r"data\.files must be a list of str"),
        ("data.files=[a", r"not YAML"),
        ("staleness.on_stale=masc", r"one of 'hold', 'mask', 'wait', 'drop', not 'masc'"),
        ("algorithm.correction=tisk", r"one of 'decoupled', 'decoupled_loglinear', 'tis', 'tis_sequence', 'none', not 'tisk'"),
        ("algorithm.policy_loss=gsop", r"algorithm\.policy_loss='gsop' is unknown; did you mean 'gspo'\?"),
        ("learner.lrr=1", r"learner has no field 'lrr'; did you mean 'lr'\?"),
        ("lr=1", r"Recipe has no field 'lr'; did you mean 'learner\.lr'\?"),
        ("lerner.lr=1", r"Recipe has no field 'lerner'; did you mean 'learner'\?"),
        ("learner=1", r"learner is a group; set one of its fields: lr"),
        ("learner.lr.x=1", r"learner\.lr is float and has no field 'x'"),
        ("generators.count=2", r"it is the deployment's: write deploy\.generators\.count="),
        (
            "deploy.generators.cuont=2",
            r"'deploy\.generators\.cuont=2': generators has no field 'cuont'; did you mean 'count'\?",
        ),
        ("deploy.generators.count=0", r"generators\.count=0 < 1"),
        ("actor_rollout_ref.rollout.n=8", r"no field 'actor_rollout_ref'; verl calls it that: here it is sampling\.n$"),
        ("+data.train_batch_size=8", r"verl calls it that: here it is learner\.batch_groups \(prompts, not rollouts\)$"),
        ("data.train_batch_size=8", r"data has no field 'train_batch_size'; verl calls it that: here it is learner\.batch_g"),
        ("num_generations=8", r"Recipe has no field 'num_generations'; TRL calls it that: here it is sampling\.n$"),
        ("output_dir=x", r"TRL calls it that: here it is --runs-dir$"),
        ("trainer.save_frequency=3", r"Recipe has no field 'trainer'\. Valid: name, model"),
    ],
)
def test_a_wrong_override_names_the_nearest_right_one(recipe_file: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_specs(recipe_file, None, [text])


def test_both_specs(recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "d.yaml").write_text("generators: {count: 2}\n")
    recipe, deployment = load_specs(recipe_file, tmp_path / "d.yaml", ["seed=5", "deploy.generators.engine.slots=16"])
    assert (recipe.seed, deployment.generators.count, deployment.generators.engine.slots) == (5, 2, 16)
    assert load_specs(recipe_file, None, [])[1] == Deployment()


# --------------------------------------------------------------------------------------------- deployment


def test_the_local_deployment_spells_out_the_defaults() -> None:
    assert load_deployment(REPOSITORY / "deploy/local.yaml") == Deployment()
    text = (REPOSITORY / "deploy/local.yaml").read_text()
    for section in ("generators", "rewards", "learner", "store", "bus", "limits"):  # a new field belongs in it too
        for field in getattr(Deployment(), section).__struct_fields__:
            assert f"  {field}:" in text, field


def test_the_sglang_deployment_fits_the_shipped_recipe() -> None:
    recipe, deployment = load_specs(REPOSITORY / "recipes/arithmetic.py", REPOSITORY / "deploy/local-sglang.yaml", [])
    engine = deployment.generators.engine
    assert (engine.kind, engine.sglang.command) == ("sglang", ("sglang-cpu-server",))
    assert recipe.data.max_prompt_length + recipe.sampling.max_response_length <= engine.max_length
    # Every slot can hold the longest rollout at once, so the server never retracts one for want of KV cache.
    assert int(engine.sglang.args["max-total-tokens"]) >= engine.slots * engine.max_length


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "generators:\n  count: 2\n  coutn: 3\n",
            r"line 3: generators\.coutn=3: generators has no field 'coutn'; did you mean 'count'\?",
        ),
        ("critic:\n  rankz: 2\n", r"line 2: critic\.rankz=2: critic has no field 'rankz'; did you mean 'ranks'\?"),
        ("bus:\n  credit: 4\nlimit: {}\n", r"line 3: limit=\{\}: Deployment has no field 'limit'; did you mean 'limits'\?"),
        ("generators:\n  engine:\n    slots: many\n", r"line 3: generators\.engine\.slots='many' must be int"),
        (
            "generators:\n  engine: {update_mode: fast}\n",
            r"line 2: generators\.engine\.update_mode='fast' must be one of 'in_flight'",
        ),
        ("generators: 3\n", r"line 1: generators=3 must be a group of fields: count, place, engine"),
        ("slots: 3\n", r"line 1: slots=3: Deployment has no field 'slots'; did you mean 'generators\.engine\.slots'\?"),
        ("learner:\n  place:\n    resources: {a: b}\n", r"line 3: learner\.place\.resources"),
        ("- a\n", r"line 1: Deployment=\['a'\] must be a group of fields: ray_address, "),
        ("bus:\n  credit: [1\nlimits:\n", r"line 3: not YAML"),
        ("rewards: {count: 0}\n", r"d\.yaml: rewards\.count=0 < 1"),
        ("rewards: {count: many}\n", r"line 1: rewards\.count='many' must be int or a group of fields \(min, max\)"),
        ("rewards: {count: {min: 3, max: 2}}\n", r"count={min: 3, max: 2}: max=2 < min=3: no number is both"),
        ("generators: {count: {min: 0, max: 2}}\n", r"min=0 < 1: nothing would be done"),
        ("generators: {count: {min: 1}}\n", r"generators\.count: Object missing required field `max`"),
        ("generators: {place: {fallback: [{a: b}]}}\n", r"place\.fallback=\[{'a': 'b'}\] without place\.labels"),
    ],
)
def test_mistakes_in_a_deployment_name_line_and_path(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "d.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_deployment(tmp_path / "d.yaml")
    assert str(tmp_path / "d.yaml") in str(caught.value)


def test_an_empty_and_a_missing_deployment(tmp_path: Path) -> None:
    (tmp_path / "d.yaml").write_text("# nothing\n")
    assert load_deployment(tmp_path / "d.yaml") == Deployment()
    with pytest.raises(ConfigError, match=r"e\.yaml: cannot be read \(No such file.*\); that folder has .*d\.yaml"):
        load_deployment(tmp_path / "e.yaml")
