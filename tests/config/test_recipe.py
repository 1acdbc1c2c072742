"""What a spec refuses when it is made: value, bound, consequence, fix; and that its defaults are a valid spec."""

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, get_args, get_origin

import msgspec
import pytest

from asyncrl.config import (
    AlgorithmSpec,
    BusSpec,
    CheckpointSpec,
    CriticSpec,
    DataSpec,
    Deployment,
    EngineSpec,
    EpisodeSpec,
    EvalSettingSpec,
    EvaluationSpec,
    GeneratorsSpec,
    LearnerSpec,
    ModelSpec,
    Recipe,
    RewardSpec,
    RewardsSpec,
    RewardTerm,
    SamplingSpec,
    SFTSpec,
    SGLangSpec,
    ShapingSpec,
    StalenessSpec,
)
from asyncrl.errors import ConfigError


def recipe(**fields: Any) -> Recipe:
    return Recipe(
        **{
            "name": "r",
            "model": ModelSpec(path="m"),
            "data": DataSpec(files=("f",)),
            "reward": RewardSpec(function="m:f"),
            "total_steps": 1,
            **fields,
        }
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataSpec(files=()), r"data\.files=\(\)"),
        (lambda: DataSpec(files=("f",), epochs=0), r"data\.epochs=0 < 1"),
        (lambda: RewardSpec(function="m:f", deadline_s=0), r"reward\.deadline_s=0 <= 0: every sample would time out"),
        (lambda: RewardSpec(), r"reward\.function='' and 0 reward\.functions: it is not clear what scores"),
        (lambda: RewardSpec(function="m:f", functions=(RewardTerm(function="m:g"),)), r"reward\.function='m:f' and 1 reward"),
        (
            lambda: RewardSpec(functions=(RewardTerm(function="m:f"),), style="trl"),
            r"reward\.style='trl' with reward\.functions",
        ),
        (lambda: RewardSpec(functions=(RewardTerm(function="m:f"), RewardTerm(function="n.f"))), r"the name 'f' is taken"),
        (lambda: RewardSpec(functions=(RewardTerm(function="m:mean"),)), r"the name 'mean' is taken"),
        (lambda: SamplingSpec(max_empty_batches=0), r"max_empty_batches=0 < 1: the run would end before its first group"),
        (
            lambda: recipe(sampling=SamplingSpec(n=1, min_valid=1), algorithm=AlgorithmSpec(policy_loss="kto")),
            r"sampling\.n=1 with algorithm\.policy_loss='kto': .* use sampling\.n >= 2",
        ),
        (lambda: ShapingSpec(overlong_buffer=-1), r"overlong_buffer=-1 < 0 tokens"),
        (lambda: ShapingSpec(length_penalty=-0.1), r"length_penalty=-0\.1 < 0: it is subtracted"),
        (lambda: ShapingSpec(repetition_ngram=0), r"repetition_ngram=0 < 1"),
        (lambda: ShapingSpec(clip=(1.0, 0.0)), r"clip=\(1\.0, 0\.0\): low is not below high"),
        (
            lambda: recipe(
                reward=RewardSpec(function="m:f", shaping=ShapingSpec(overlong_buffer=9)),
                sampling=SamplingSpec(max_response_length=8),
            ),
            r"overlong_buffer=9 > sampling\.max_response_length=8",
        ),
        (lambda: SamplingSpec(n=0), r"sampling\.n=0 < 1"),
        (lambda: SamplingSpec(temperature=0), r"sampling\.temperature=0 <= 0: training needs a stochastic policy"),
        (lambda: SamplingSpec(top_p=1.5), r"sampling\.top_p=1\.5 is outside \(0, 1\]"),
        (lambda: SamplingSpec(n=2, min_valid=3), r"sampling\.min_valid=3 is outside \[1, n=2\]"),
        (lambda: LearnerSpec(batch_groups=10, mini_batch_groups=4), r"mini_batch_groups=4 does not divide .*batch_groups=10"),
        (lambda: CriticSpec(lr=-1.0), r"critic\.lr=-1\.0 < 0"),
        (lambda: CriticSpec(value_clip=0.0), r"critic\.value_clip=0\.0 <= 0: no value could move; use > 0, or null"),
        (lambda: CriticSpec(value_coef=0.0, backbone="shared"), r"critic\.value_coef=0\.0 <= 0"),
        (lambda: CriticSpec(ppo_epochs=0), r"critic\.ppo_epochs=0 < 1"),
        (lambda: CriticSpec(max_grad_norm=-1.0), r"critic\.max_grad_norm=-1\.0 < 0; use 0"),
        (lambda: LearnerSpec(warmup_steps=-1), r"learner\.warmup_steps=-1 < 0; use 0"),
        (lambda: CriticSpec(model=ModelSpec(path="m", tokenizer="t")), r"critic\.model\.tokenizer='t': it would be ignored"),
        (lambda: SamplingSpec(n=1, min_valid=1, keep="varied"), r"keep='varied' with sampling\.n=1: a single reward never"),
        (lambda: CriticSpec(critic_warmup=-1), r"critic\.critic_warmup=-1 < 0"),
        (lambda: CriticSpec(backbone="shared", model=ModelSpec(path="m")), r"critic\.model='m' with backbone='shared'"),
        (
            lambda: CriticSpec(backbone="shared", ppo_epochs=2),
            r"ppo_epochs=2 with backbone='shared': .* set learner\.ppo_epochs",
        ),
        (lambda: CriticSpec(value_coef=0.5), r"critic\.value_coef=0\.5 with backbone='own': it would be ignored"),
        (
            lambda: recipe(critic=CriticSpec(lr=1e-4)),
            r"critic settings with algorithm\.adv_estimator='grpo': .* ignored; use adv_estimator='gae', or leave them out",
        ),
        (
            lambda: recipe(total_steps=5, algorithm=AlgorithmSpec(adv_estimator="gae"), critic=CriticSpec(critic_warmup=5)),
            r"critic_warmup=5 >= total_steps=5: the policy would never move",
        ),
        (lambda: EvaluationSpec(freq=0), r"evaluation\.freq=0 < 1"),
        (lambda: EvaluationSpec(limit=0), r"evaluation\.limit=0 < 1; .* for all prompts use null"),
        (lambda: LearnerSpec(batch_groups=0), r"learner\.batch_groups=0 < 1: an update would train nothing; use at least one"),
        (lambda: LearnerSpec(lr=math.inf), r"learner\.lr=inf"),
        (lambda: LearnerSpec(betas=(0.9, 1.0)), r"learner\.betas=\(0\.9, 1\.0\) is outside \[0, 1\)"),
        (lambda: SamplingSpec(temperature=math.inf), r"sampling\.temperature=inf"),
        (lambda: EngineSpec(slots=0), r"engine\.slots=0 < 1: no request could be decoded"),
        (lambda: recipe(seed=1 << 63), r"seed=9223372036854775808 is outside \[0, 2\*\*63\)"),
        (lambda: CheckpointSpec(keep_last_n=0), r"checkpoint\.keep_last_n=0 < 1: there would be nothing to resume from"),
        (lambda: GeneratorsSpec(count=0), r"generators\.count=0 < 1: nobody would generate"),
        (lambda: BusSpec(credit=0), r"bus\.credit=0 < 1: no bucket would ever be asked for"),
        (lambda: BusSpec(bucket_bytes=0), r"bus\.bucket_bytes=0 is outside 1 to 67108864"),
        (lambda: BusSpec(bucket_bytes=(64 << 20) + 1), r"bus\.bucket_bytes=67108865 is outside 1 to 67108864"),
        (lambda: RewardTerm(function="m:f", weight=math.nan), r"reward\.functions: weight=nan would make no sum"),
        (lambda: RewardsSpec(processes=0), r"rewards\.processes=0 < 1"),
        (lambda: recipe(total_steps=0), r"total_steps=0 < 1"),
        (
            lambda: recipe(staleness=StalenessSpec(max_lag=3, reserve_ahead=5)),
            r"reserve_ahead=5 > 4: staleness\.max_lag=3 admits 4 batches at most",
        ),
        (lambda: recipe(staleness=StalenessSpec(max_lag=-1)), r"staleness\.max_lag=-1 < 0"),
        (
            lambda: recipe(staleness=StalenessSpec(max_lag=0, selector="freshest")),
            r"selector='freshest' with max_lag=0 always holds",
        ),
        (lambda: recipe(staleness=StalenessSpec(on_stale="wait", selector="uniform")), r"'uniform' with on_stale='wait'"),
    ],
)
def test_an_impossible_spec_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


FREE = {"RewardTerm.weight", "AlgorithmSpec.entropy_coef"}  # may be anything
NEEDED = {"name": "r", "model": ModelSpec(path="m"), "data": DataSpec(files=("f",)), "reward": RewardSpec(function="m:f")}
NEEDED |= {"total_steps": 9, "files": ("f",), "path": "m", "function": "m:f", "out": "o", "prompt": "p", "when": "true"} | {
    "min": 1,
    "max": 2,
}


def numbers() -> Iterator[Any]:
    """Every field of a recipe, a deployment and a warm start that holds a number or several, in whichever struct."""
    left: list[Any] = [Recipe, Deployment, SFTSpec]
    for struct in left:
        for field in msgspec.structs.fields(struct):
            kinds = {field.type, *get_args(field.type)}
            left += [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and kind not in left]
            if (number := kinds & {int, float}) and f"{struct.__name__}.{field.name}" not in FREE:
                many = {tuple: lambda x: (x, x), dict: lambda x: {"a": x}}.get(get_origin(field.type), lambda x: x)
                values = [many(-1)] + [many(math.nan)] * (float in number)
                yield from (
                    pytest.param(struct, field.name, value, id=f"{struct.__name__}.{field.name}={value}") for value in values
                )


@pytest.mark.parametrize(("struct", "name", "value"), list(numbers()))
def test_no_number_is_nonsense(struct: type[msgspec.Struct], name: str, value: object) -> None:
    """-1 and nan are refused, with the field's name, wherever they mean nothing."""
    fields = {key: item for key, item in NEEDED.items() if key in struct.__struct_fields__}
    checked: Any = (lambda **made: recipe(staleness=StalenessSpec(**made))) if struct is StalenessSpec else struct
    with pytest.raises(ConfigError, match=rf"{name}="):
        checked(**fields | {name: value})


def test_specs_are_data_and_frozen() -> None:
    made = recipe(staleness=StalenessSpec(reserve_ahead=17))  # as far as the bound allows
    assert msgspec.json.decode(msgspec.json.encode(made), type=Recipe) == made
    assert msgspec.convert(msgspec.to_builtins(Deployment()), Deployment) == Deployment()
    with pytest.raises(AttributeError):
        made.seed = 1  # type: ignore[misc]
    with pytest.raises(msgspec.ValidationError, match="unknown field `sed`"):
        msgspec.convert({**msgspec.to_builtins(made), "sed": 1}, Recipe)


@pytest.mark.parametrize(
    ("spec", "slots", "ahead"),
    [
        ({}, 64, 4),  # two batches of 8 · 4 rollouts in flight, one ready, one in training
        ({}, 65, 5),
        ({}, 1, 3),
        ({"max_lag": 2}, 64, 3),  # no more than the bound admits
        ({"max_lag": 0}, 64, 1),
        ({"reserve_ahead": 7}, 64, 7),
        ({"on_stale": "wait"}, 64, 17),
        ({"on_stale": "mask"}, 64, 4),
        ({}, None, 17),
    ],
)
def test_the_reserve_ahead_follows_from_the_slots(spec: dict, slots: int | None, ahead: int) -> None:
    made = recipe(learner=LearnerSpec(batch_groups=8), sampling=SamplingSpec(n=4), staleness=StalenessSpec(**spec))
    rule = made.staleness_rule(slots)
    assert (rule.max_lag, rule.most_outstanding) == (spec.get("max_lag", 16), 8 * ahead)


def test_the_reserve_ahead_counts_episodes_that_wait() -> None:
    episode = EpisodeSpec(agent="agent.py:solve", in_flight=48)
    made = recipe(learner=LearnerSpec(batch_groups=8), sampling=SamplingSpec(n=4), episode=episode)
    assert made.staleness_rule(64, generators=2).most_outstanding == 8 * 5  # 96 rollouts are three batches
    assert made.staleness_rule(100, generators=2).most_outstanding == 8 * 6


def test_slots_are_those_of_all_servers() -> None:
    servers = EngineSpec(kind="sglang", slots=10, sglang=SGLangSpec(servers=2))
    assert GeneratorsSpec(count=3, engine=servers).slots == 60
    assert GeneratorsSpec(count=3, engine=EngineSpec(slots=10)).slots == 30
    found = EngineSpec(kind="sglang", slots=10, sglang=SGLangSpec(urls=("http://a:1", "http://b:1"), api_key_file="/key"))
    assert GeneratorsSpec(engine=found).slots == 20


def test_importing_asyncrl_and_its_specs_loads_neither_torch_nor_ray() -> None:
    code = "import sys, asyncrl.config, asyncrl.cli; print(sorted({'torch', 'transformers', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


def test_reward_terms_have_names() -> None:
    one = RewardSpec(function="rewards.py:f", style="trl")
    assert one.terms() == (RewardTerm(function="rewards.py:f", style="trl"),)
    several = RewardSpec(functions=(RewardTerm(function="a/b.py:right", weight=2.0), RewardTerm(function="m.f", name="form")))
    assert [(term.name, term.weight) for term in several.terms()] == [("right", 2.0), ("form", 1.0)]
    assert msgspec.json.decode(msgspec.json.encode(several), type=RewardSpec) == several


def test_settings_of_an_evaluation_have_names_and_metrics_are_named() -> None:
    def mine(responses):
        return {}

    spec = EvaluationSpec(also=(EvalSettingSpec(name="sampled", n=4, temperature=1.0),), metrics=(mine, "a.b:c"))
    assert [name.rpartition(":")[2] for name in spec.metrics] == ["mine", "c"]
    with pytest.raises(ConfigError, match="two settings of one name"):
        EvaluationSpec(also=(EvalSettingSpec(name="a"), EvalSettingSpec(name="a")))
