"""The run directory: paths, atomicity under failure, manifests, the lock between processes, redaction."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from asyncrl.config import DataSpec, ModelSpec, Recipe, RewardSpec
from asyncrl.errors import ConfigError
from asyncrl.rundir import MASK, RunDir, atomic_folder, link_or_copy, output_file, redact, resolve_run_dir, write_atomic


def test_paths_and_steps(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "a").create()
    assert run.checkpoint(100) == tmp_path / "a/checkpoints/step_000100"
    for name in ("step_000100", "step_000002", "step_1000000", ".step_000200.tmp-abc", "notes"):
        (run.checkpoints / name).mkdir()
    assert [folder.name for folder in run.steps()] == ["step_000002", "step_000100", "step_1000000"]  # by number
    assert RunDir(tmp_path / "none").steps() == []


def test_nothing_to_resume_is_said_without_touching_the_disk(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no checkpoint: nothing to resume"):
        RunDir(tmp_path / "none").require_checkpoint()
    assert not (tmp_path / "none").exists()
    run = RunDir(tmp_path / "some").create()
    for update in (50, 100):
        run.checkpoint(update).mkdir()
    run.require_checkpoint()
    run.require_checkpoint(50)
    with pytest.raises(ConfigError, match=r"no checkpoint of update 75; resume from one of step_000050, step_000100"):
        run.require_checkpoint(75)


def test_write_atomic_keeps_the_old_file_when_the_new_one_fails(tmp_path: Path) -> None:
    write_atomic(tmp_path / "sub/f", "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(tmp_path / "sub/f", "\ud800")
    assert (tmp_path / "sub/f").read_text() == "old"
    write_atomic(tmp_path / "sub/f", b"new")
    assert (tmp_path / "sub/f").read_bytes() == b"new"
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["f"]


def test_whoever_may_read_an_atomic_folder_may_read_its_files(tmp_path: Path) -> None:
    for umask, mode in ((0o022, 0o644), (0o077, 0o600)):
        former = os.umask(umask)
        try:
            with atomic_folder(tmp_path / "folder") as folder:
                (folder / "deeper").mkdir()
                (folder / "deeper" / "model.safetensors").touch(mode=0o600)
        finally:
            os.umask(former)
        assert (tmp_path / "folder/deeper/model.safetensors").stat().st_mode & 0o777 == mode


def test_what_is_linked_into_an_atomic_folder_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own"
    write_atomic(own, "mine", mode=0o600)
    with atomic_folder(tmp_path / "linked") as folder:
        link_or_copy(own, folder / "file")
    assert (tmp_path / "linked" / "file").samefile(own)
    assert own.stat().st_mode & 0o777 == 0o600

    def other_file_system(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_file_system)
    with atomic_folder(tmp_path / "copied") as folder:
        link_or_copy(own, folder / "file")
    assert (tmp_path / "copied" / "file").read_text() == "mine"
    assert own.stat().st_nlink == 2


def test_atomic_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "step_000001"

    def save_that_fails() -> None:
        with atomic_folder(target) as folder:
            (folder / "policy").write_text("half")
            raise RuntimeError("cut")

    with pytest.raises(RuntimeError, match="cut"):
        save_that_fails()
    assert list(tmp_path.iterdir()) == []
    for text in ("first", "second"):
        with atomic_folder(target) as folder:
            assert not target.exists() or (target / "policy").read_text() == "first"
            (folder / "policy").write_text(text)
    assert (target / "policy").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


@pytest.mark.parametrize("successor_arrived", [True, False])
def test_the_lock_sweeps_what_a_killed_save_left(tmp_path: Path, successor_arrived: bool) -> None:
    run = RunDir(tmp_path).create()
    (run.checkpoints / ".step_000003.tmp-0a1b").mkdir()
    aside = run.checkpoints / ".step_000002.old-77"
    aside.mkdir()
    (aside / "which").write_text("old")
    if successor_arrived:
        run.checkpoint(2).mkdir()
        (run.checkpoint(2) / "which").write_text("new")
    with run.lock():
        assert [path.name for path in run.checkpoints.iterdir()] == ["step_000002"]
    assert (run.checkpoint(2) / "which").read_text() == ("new" if successor_arrived else "old")


def test_two_processes_cannot_share_a_run_directory(tmp_path: Path) -> None:
    code = f"""
from asyncrl.rundir import RunDir
with RunDir({str(tmp_path)!r}).lock():
    print("held", flush=True)
    input()
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=rf"in use \(pid {holder.pid} on ") as caught, RunDir(tmp_path).lock():
            pass
        assert "--name" in str(caught.value)
    finally:
        holder.kill()  # a killed holder frees the lock
        holder.wait(10)
    with RunDir(tmp_path).lock():
        assert (tmp_path / ".lock").read_text().startswith(f"pid {os.getpid()} on ")
    with RunDir(tmp_path).lock():
        pass


def test_relative_folders_resolve_against_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_run_dir("a", "runs", environ={}).path == tmp_path / "runs/a"
    assert resolve_run_dir("a", "/data/runs", environ={}).path == Path("/data/runs/a")


def test_a_ray_job_needs_an_absolute_folder() -> None:
    job = {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}
    with pytest.raises(ConfigError, match=r"--runs-dir 'runs' is relative.*temporary copy.*absolute"):
        resolve_run_dir("a", "runs", environ=job)
    assert resolve_run_dir("a", "/data/runs", environ=job).path == Path("/data/runs/a")


@pytest.mark.parametrize("name", ["", "..", "a/b"])
def test_a_run_name_is_one_folder(name: str) -> None:
    with pytest.raises(ConfigError, match="--name"):
        resolve_run_dir(name, "/runs", environ={})


HEX = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"hf_token": "x1", "lr": 1e-5}, {"hf_token": MASK, "lr": 1e-5}),
        ({"tracker": {"api_key": "k", "key": "k"}}, {"tracker": {"api_key": MASK, "key": "k"}}),
        ({"password": 1234, "token": 3, "credentials": {"user": "u"}}, {"password": MASK, "token": 3, "credentials": MASK}),
        # Words that only look like it.
        ({"max_tokens": "9", "tokenizer": "t", "answer_key": "a"}, {"max_tokens": "9", "tokenizer": "t", "answer_key": "a"}),
        ({"eos_token": "<|im_end|>", "s_per_token": "0.12345"}, {"eos_token": "<|im_end|>", "s_per_token": "0.12345"}),
        (["hf_AbCdEfGhIjKlMnOpQr", ("ghp_0123456789abcdefghij",)], [MASK, (MASK,)]),
        ("AKIAIOSFODNN7EXAMPLE and sk-proj-0123456789abcdef", f"{MASK} and {MASK}"),
        ("Authorization: Bearer abc.def-123456", f"Authorization: Bearer {MASK}"),
        ("s3://user:pa55@host/x", f"s3://{MASK}@host/x"),
        (f"WANDB_API_KEY={HEX}", f"WANDB_API_KEY={MASK}"),
        (f"wandb: {HEX}; commit {HEX}", f"wandb: {MASK}; commit {HEX}"),
        ("{'password': 'hunter22'}", f"{{'password': '{MASK}'}}"),
        ("the environment said planted-secret-value.", f"the environment said {MASK}."),
        ("invalid token: expected a number", "invalid token: expected a number"),
        ("eos_token='<|im_end|>'", "eos_token='<|im_end|>'"),
    ],
)
def test_redaction(value, expected) -> None:
    assert redact(value, environ={"MY_SECRET": "planted-secret-value", "HOME": "/home/someone"}) == expected


def test_a_struct_is_redacted_as_builtins() -> None:
    recipe = Recipe(
        name="r",
        model=ModelSpec(path="https://me:s3cr3t@hub/x"),
        data=DataSpec(files=("a",)),
        reward=RewardSpec(function="m:f"),
        total_steps=1,
    )
    assert redact(recipe)["model"]["path"] == f"https://{MASK}@hub/x"
    assert redact(recipe)["learner"]["lr"] == recipe.learner.lr


PROGRAM = """
import logging, os
from asyncrl.rundir import log_shown
{setup}
log = logging.getLogger("asyncrl.part")
with log_shown():
    log.debug("debug")
    log.info("info hf_0123456789abcdefXYZ")
    log.warning("warning")
log.info("after")
"""


@pytest.mark.parametrize(
    ("setup", "level", "said"),
    [
        ("", "", ["INFO asyncrl.part: info [redacted]", "WARNING asyncrl.part: warning"]),
        ("", "warning", ["WARNING asyncrl.part: warning"]),
        ("", "DEBUG", ["DEBUG asyncrl.part: debug", "INFO asyncrl.part: info [redacted]", "WARNING asyncrl.part: warning"]),
        ("logging.getLogger('asyncrl').setLevel('ERROR')", "DEBUG", []),
        ("logging.basicConfig(format='own %(levelname)s')", "DEBUG", ["own WARNING"]),  # the program's own way
    ],
)
def test_a_program_shows_the_log_at_the_level_that_it_asks_for(setup: str, level: str, said: list[str]) -> None:
    environ = {**os.environ, "LOG_LEVEL": level}
    command = [sys.executable, "-c", PROGRAM.format(setup=setup)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=True)
    assert [re.sub(r"^[\d:]+ ", "", line) for line in done.stderr.splitlines()] == said


def test_a_place_for_a_file_that_a_command_writes(tmp_path: Path) -> None:
    real = tmp_path / "real.html"
    real.touch()
    (tmp_path / "link.html").symlink_to(real)
    assert output_file(tmp_path / "link.html") == real.resolve()
    assert output_file(tmp_path / "new.html") == (tmp_path / "new.html").resolve()
    for place, said in (
        (tmp_path, "is a folder; name a file in it"),
        (Path("/dev/null"), "is a device or a pipe"),
        (tmp_path / "nowhere" / "x.html", "is not a folder that can be written to"),
        (real / "x.html", "is not a folder that can be written to"),
    ):
        with pytest.raises(ConfigError, match=said):
            output_file(place)
