import sys

import pytest

from asyncrl.config.callables import check_callable, load_callable
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
