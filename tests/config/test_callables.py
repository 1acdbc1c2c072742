import math
import os
import sys
from functools import partial
from json import JSONDecoder

import msgspec
import pytest

from asyncrl.config import AlgorithmSpec, RewardSpec, RewardTerm, SamplingSpec
from asyncrl.config.callables import GIVEN, check_callable, load_callable, reference_to
from asyncrl.errors import ConfigError

SOURCE = """
from math import sqrt as root
import neighbour

if neighbour.FLAG:
    def grade(x):
        return x + neighbour.ONE
else:
    grade = None

class Judge:
    @staticmethod
    def verdict(x):
        return -x

LIMIT = 3
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "neighbour.py").write_text("FLAG = True\nONE = 1\n")
    path = tmp_path / "user_reward.py"
    path.write_text(SOURCE)
    yield path
    sys.path[:] = [folder for folder in sys.path if folder != str(tmp_path)]
    sys.modules.pop("neighbour", None)


def test_a_function_from_a_file_that_imports_its_neighbour(file):
    assert load_callable(f"{file}:grade", "reward.function")(2) == 3


def test_a_method_inside_a_class(file):
    assert load_callable(f"{file}:Judge.verdict", "reward.function")(2) == -2


def test_module_names_with_colon_and_with_dot():
    assert load_callable("os.path:basename")("a/b") == "b"
    assert load_callable("os.path.basename")("a/b") == "b"


def test_a_file_is_executed_once(file):
    assert load_callable(f"{file}:Judge") is load_callable(f"{file}:Judge")


@pytest.mark.parametrize("find", [load_callable, check_callable])
@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("{file}:gradee", "did you mean 'grade'"),
        ("{folder}/user_rewards.py:grade", "did you mean {folder}/user_reward.py"),
        ("{folder}/nowhere/x.py:grade", "no file {folder}/nowhere/x.py"),
        ("no_such_package_at_all.reward:grade", "no module 'no_such_package_at_all.reward'"),
        ("json.decoder:JSONDecode", "did you mean 'JSONDecoder'"),
        ("grade", "names no function"),
        ("rewards.py", "names a file and no function; write rewards.py:name"),
        ("{file}:", "names no function"),
    ],
)
def test_errors_name_the_field_the_value_and_the_nearest(file, find, reference, words):
    places = {"file": file, "folder": file.parent}
    reference = reference.format(**places)
    with pytest.raises(ConfigError) as caught:
        find(reference, "reward.function")
    assert f"reward.function={reference!r}" in str(caught.value)
    assert words.format(**places) in str(caught.value)


def test_what_is_not_callable_is_refused(file):
    with pytest.raises(ConfigError, match="'LIMIT' is a int, not a function"):
        load_callable(f"{file}:LIMIT")


def test_an_import_that_fails_tells_error_and_line(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("x = 1\nimport missing_dependency_xyz\n")
    with pytest.raises(
        ConfigError, match=r"could not be imported: ModuleNotFoundError: .*missing_dependency_xyz.*broken\.py:2"
    ):
        load_callable(f"{path}:f")
    sys.path.remove(str(tmp_path))


def test_checking_imports_nothing(tmp_path, monkeypatch):
    package = tmp_path / "costly_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "reward.py").write_text("raise SystemExit('imported')\nasync def grade(): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    check_callable("costly_package.reward:grade")
    check_callable(f"{package}/reward.py:grade")
    with pytest.raises(ConfigError, match="has no 'other'"):
        check_callable("costly_package.reward.other")
    assert "costly_package" not in sys.modules


def test_checking_reports_a_syntax_error_with_its_line(tmp_path):
    path = tmp_path / "typo.py"
    path.write_text("x = 1\ndef grade(:\n")
    with pytest.raises(ConfigError, match=r"typo\.py line 2 is not Python"):
        check_callable(f"{path}:grade", "reward.function")


def test_checking_passes_what_source_cannot_tell(tmp_path):
    path = tmp_path / "star.py"
    path.write_text("from os.path import *\n")
    check_callable(f"{path}:basename")
    check_callable("math:sqrt")  # compiled


# ------------------------------------------------------------------------------- functions given themselves


def in_a_module(x):
    return 2 * x


class Adder:
    def __init__(self, more):
        self.more = more

    def __call__(self, x):
        return x + self.more

    def twice(self, x):
        return x + 2 * self.more


def test_a_function_that_any_process_finds_is_named_by_its_place(file):
    grade = load_callable(f"{file}:grade")
    assert reference_to(grade) == f"{file}:grade"
    assert reference_to(load_callable(f"{file}:Judge.verdict")) == f"{file}:Judge.verdict"
    assert reference_to(os.path.basename) == f"{os.path.__file__}:basename"
    assert reference_to(math.sqrt) == "math:sqrt"
    assert reference_to(JSONDecoder) == "json.decoder:JSONDecoder"
    assert load_callable(reference_to(in_a_module)) is not None
    assert reference_to(in_a_module) not in GIVEN


@pytest.mark.parametrize(
    ("make", "label", "result"),
    [
        (lambda: lambda x: x + 3, "lambda", 8),
        (lambda: partial(max, 7), "partial", 7),
        (lambda: Adder(4), "Adder", 9),
        (lambda: Adder(4).twice, "twice", 13),
    ],
)
def test_any_other_is_known_to_this_process_alone(make, label, result):
    function = make()
    reference = reference_to(function)
    assert reference.endswith(f":{label}")
    assert reference_to(function) == reference
    assert reference_to(make()) != reference, "another one of that name"
    check_callable(reference)
    assert load_callable(reference)(5) == result


def test_a_spec_takes_functions_themselves_and_stays_data():
    def centered(rewards_s, groups_s): ...

    terms = RewardSpec(functions=(RewardTerm(function=lambda **sample: 1.0, name="one"), RewardTerm(function=in_a_module)))
    assert [term.name for term in terms.terms()] == ["one", "in_a_module"]
    assert SamplingSpec(keep=max).keep == "builtins:max"
    for spec in (terms, SamplingSpec(keep=lambda rewards: True), AlgorithmSpec(adv_estimator=centered, policy_loss=max)):
        assert msgspec.json.decode(msgspec.json.encode(spec), type=type(spec)) == spec
    with pytest.raises(ConfigError, match="the name 'lambda' is taken"):
        RewardSpec(functions=(RewardTerm(function=lambda: 1), RewardTerm(function=lambda: 2)))


def test_a_name_of_another_process_says_whose_it_is():
    with pytest.raises(
        ConfigError, match=r"reward\.function='given-77:f': only the process that was given this function knows"
    ):
        load_callable("given-77:f", "reward.function")
