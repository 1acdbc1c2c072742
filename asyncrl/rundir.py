"""The run directory: the one module that owns its paths, atomic writes, its lock, and redaction of secrets.

    runs/<name>/  recipe.json deployment.yaml metrics.jsonl  tensorboard/  trackers/  data/  functions/  replay/ (rows, events)
                  checkpoints/step_000100/ (…, manifest.json)  exports/ (Hugging Face)  logs/

No torch, no Ray, no Arrow: jobs, actors and tests may all import it.
"""

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import socket
import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import msgspec

from asyncrl.disk import naming_full_disk, require_space
from asyncrl.errors import ConfigError

RAY_JOB_ENV = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray's job supervisor sets this in the driver of every submitted job

_STEP = re.compile(r"step_(\d{6,})$")
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<kind>tmp|old)-\w+$")


class RunDir:
    """Paths of one run. Making the object touches nothing; `create` makes the folders."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.json"
        self.deployment = self.path / "deployment.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.facts = self.path / "facts.json"  # what the newest start knew before it trained
        self.tensorboard = self.path / "tensorboard"
        self.trackers = self.path / "trackers"  # what other trackers keep
        self.data = self.path / "data"
        self.functions = self.path / "functions"
        self.replay = self.path / "replay"
        self.checkpoints = self.path / "checkpoints"
        self.exports = self.path / "exports"
        self.logs = self.path / "logs"
        self.rewards = self.path / "rewards"  # what each reward model and judge is
        self.sentinels = self.path / "sentinels.jsonl"  # when each fired, and the rows that it fired for
        self.forked = self.path / "forked.json"  # what run it began in, and where, if it did
        self.requests = self.path / "requests"  # of other processes, to who leads the run
        self.ended = self.path / "ended.json"  # how the newest start ended; not there while it goes on, nor if it was killed
        self.driver_log = self.path / "driver.log"  # of detached runs; those of one name follow each other

    @property
    def run_id(self) -> str:
        """Names the run's shared memory: the same for every start in one run directory, different between directories."""
        return hashlib.blake2b(str(self.path).encode(), digest_size=6).hexdigest()

    def create(self, *folders: Path) -> "RunDir":
        """Makes the folders that are missing (none named: all of a run's); safe to call from several processes.

        Raises ConfigError if it can't write.
        """
        try:
            for folder in folders or (self.tensorboard, self.data, self.replay, self.checkpoints, self.exports, self.logs):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"run directory {self.path}: cannot be created ({error.strerror}: {error.filename}); nothing could be saved; "
                "choose a writable folder with --runs-dir"
            ) from error
        return self

    def checkpoint(self, update: int) -> Path:
        """Folder of the checkpoint after `update` trained batches; it may not exist."""
        return self.checkpoints / f"step_{update:06d}"

    @staticmethod
    def update_of(checkpoint: Path) -> int:
        """The updates after which a checkpoint folder of `steps` was written."""
        return int(checkpoint.name.removeprefix("step_"))

    def steps(self) -> list[Path]:
        """Checkpoint folders, oldest first. Renamed into place when whole, but `manifests.verify_manifest` before use."""
        found = [(int(match[1]), folder) for folder in self.checkpoints.glob("step_*") if (match := _STEP.match(folder.name))]
        return [folder for _, folder in sorted(found) if folder.is_dir()]

    def require_checkpoint(self, update: int | None = None) -> None:
        """Raises ConfigError if there is none to resume from, or not the one after `update`. Touches nothing."""
        steps = self.steps()
        if not steps:
            raise ConfigError(f"{self.path} holds no checkpoint: nothing to resume; start it without --resume")
        if update is not None and self.checkpoint(update) not in steps:
            raise ConfigError(
                f"{self.path} holds no checkpoint of update {update}; resume from one of {', '.join(s.name for s in steps)}"
            )

    @contextlib.contextmanager
    def lock(self, *folders: Path) -> Iterator[None]:
        """Holds the run directory for this process; ends with the process, however that dies. Never waits.

        folders: to `create`. Raises ConfigError naming the holder's pid and host. The new holder sweeps what a killed save
        left behind.
        """
        self.create(*folders)
        with (self.path / ".lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise ConfigError(f"run directory {self.path}: its file system has no locks ({error.strerror})") from error
                file.seek(0)
                holder = file.read().strip() or "pid unknown"
                raise ConfigError(
                    f"run directory {self.path} is in use ({holder}): two runs would overwrite each other; "
                    "stop that process, or choose another --name"
                ) from error
            with naming_full_disk(self.path):
                file.truncate(0)
                file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
                file.flush()
            for folder in filter(Path.is_dir, (self.path, self.data, self.checkpoints, self.exports)):
                sweep(folder)
            try:
                yield
            finally:
                file.truncate(0)


def resolve_run_dir(name: str, runs_dir: str | Path = "runs", environ: Mapping[str, str] = os.environ) -> RunDir:
    """`runs_dir/name`, absolute, relative to the working directory of whoever typed the command.

    Under `ray job submit` the working directory is a temporary copy that Ray deletes, so a relative folder is refused.
    """
    if not name or name in {".", ".."} or "/" in name or "\0" in name:
        raise ConfigError(f"--name {name!r}: a run's name is one folder name without '/'; put the folder in --runs-dir")
    folder = Path(runs_dir).expanduser()
    if not folder.is_absolute() and RAY_JOB_ENV in environ:
        raise ConfigError(
            f"--runs-dir {str(runs_dir)!r} is relative, and this is a Ray job: its working directory {Path.cwd()} is a "
            "temporary copy, so the run's outputs would be lost with it; give an absolute folder, e.g. --runs-dir /data/runs"
        )
    return RunDir((Path.cwd() / folder / name).resolve())


# ---------------------------------------------------------------------------------------- files and folders


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yields a fresh name beside `path`; what is written there is synced and renamed at success, removed on failure.

    A reader sees the old file or the new one, never a part. Raises DiskFull.
    """
    path = Path(path)
    with naming_full_disk(path):
        beside = _beside(path)
        try:
            yield beside
            sync(beside)
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        sync(path.parent)


def write_atomic(path: str | Path, content: bytes | str, mode: int = 0o666) -> None:
    """Writes `content` to `path`, whole or not at all. mode: of the file, less the umask."""
    with atomic_file(path) as beside:
        beside.touch(mode)
        beside.write_bytes(content.encode() if isinstance(content, str) else content)


def output_file(path: Path) -> Path:
    """Where a command is to write what `--out` names; links are followed. Raises ConfigError where no file can be."""
    place = Path(os.path.realpath(path.expanduser()))
    if place.is_dir():
        raise ConfigError(f"--out {path} is a folder; name a file in it")
    if place.exists() and not place.is_file():
        raise ConfigError(f"--out {path} is a device or a pipe, which would be replaced by a file; name a file")
    if not place.parent.is_dir() or not os.access(place.parent, os.W_OK):
        raise ConfigError(f"--out {path}: {place.parent} is not a folder that can be written to; make it, or name another one")
    return place


@contextlib.contextmanager
def atomic_folder(path: str | Path, needed_bytes: int = 0) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; synced and renamed at success, removed on failure. Replaces an old `path`.

    After a kill at any point `path` is absent, old or new, and whole; `RunDir.lock` of the next start tidies the rest.
    needed_bytes: what will be written, as far as it is known. Raises DiskFull, at once if there is less room than that.
    """
    path = Path(path)
    with naming_full_disk(path, needed_bytes):
        require_space(path, needed_bytes)
        beside = _beside(path)
        beside.mkdir()
        try:
            yield beside
            for file in beside.rglob("*"):
                # Whoever may read the folder; safetensors makes files for its user alone. What is linked is another's, too.
                if file.is_file() and file.stat().st_nlink == 1:
                    file.chmod(beside.stat().st_mode & 0o666)
                sync(file)
            sync(beside)
            old = path.parent / f".{path.name}.old-{os.getpid()}"
            if path.exists():
                path.rename(old)
            beside.rename(path)
            sync(path.parent)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """A second name for a file that nobody writes to any more; a copy where the file system has none, as between two."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)


def sweep(folder: Path) -> None:
    """Removes what killed writers left. A folder moved aside whose successor never arrived goes back to its place."""
    for entry in folder.iterdir():
        match = _LEFTOVER.match(entry.name)
        if match is None:
            continue
        if match["kind"] == "old" and not (folder / match["name"]).exists():
            entry.rename(folder / match["name"])
        elif entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    """A fresh name in the same folder, hidden, that `sweep` knows. (mkstemp's files would be private to their owner.)"""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.parent / f".{path.name}.tmp-{uuid.uuid4().hex}"


def sync(path: Path) -> None:
    """Returns when a file's bytes, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --------------------------------------------------------------------------------------- logs and their secrets


def set_up_logging(handler: logging.Handler) -> None:
    """Sends this process's log to `handler`, secrets masked: asyncrl from INFO, libraries from WARNING; LOG_LEVEL sets both.

    Raises ConfigError for a level that does not exist.
    """
    level = _level()
    handler.setFormatter(_Redacting(_FORM, "%H:%M:%S"))
    logging.basicConfig(handlers=[handler], level=level or logging.WARNING, force=True)
    logging.getLogger("asyncrl").setLevel(level or logging.INFO)


class StandardError(logging.StreamHandler[TextIO]):
    """Writes to whatever sys.stderr is at the moment, so that log lines go above a live view instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


@contextlib.contextmanager
def log_shown() -> Iterator[None]:
    """Meanwhile asyncrl's log goes to standard error, secrets masked, from the level of the logger `asyncrl` on, or LOG_LEVEL,
    or INFO. A program that has set up logging itself gets what it asked for there."""
    logger = logging.getLogger("asyncrl")
    if logger.hasHandlers():
        yield
        return
    handler, before = StandardError(), logger.level
    handler.setFormatter(_Redacting(_FORM, "%H:%M:%S"))
    logger.setLevel(before or _level() or logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


_FORM = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def _level() -> str:
    """What LOG_LEVEL says, or nothing. Raises ConfigError for a level that does not exist."""
    level = os.environ.get("LOG_LEVEL", "")
    known = logging.getLevelNamesMapping()
    if level and level.upper() not in known:
        raise ConfigError(f"LOG_LEVEL={level!r} is no level; use one of {', '.join(known)}")
    return level.upper()


class _Redacting(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text: str = redact(super().format(record))
        return text


MASK = "[redacted]"
# Special tokens of a tokenizer, and figures per token, are no credentials.
_TOKEN = "".join(f"(?<!{word}[_-])" for word in ("eos", "bos", "pad", "unk", "sep", "cls", "mask", "stop", "per")) + "token"
_SECRET_WORD = rf"(?:{_TOKEN}|secret|pass(?:word|wd|phrase)|(?:api|access|secret|private)[_-]?key|credentials?)"
_SECRET_KEY = re.compile(rf"(?:^|[_.-])(?:{_SECRET_WORD}|auth|authorization|cookie)$", re.IGNORECASE)
_SECRET_TEXTS = (
    re.compile(r"\bhf_[A-Za-z0-9]{16,}"),
    re.compile(r"\b(?:sk|pk|rk)-[A-Za-z0-9_-]{16,}"),
    re.compile(r"\bwandb_v\d_[A-Za-z0-9_]{16,}"),
    re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    re.compile(r"\b(?:gh[pousr]_|github_pat_|glpat-|xox[abprs]-|AIza)[A-Za-z0-9_-]{16,}"),
    re.compile(r"(?<=bearer )[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE),
    re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"),
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
)
# A W&B key is 40 hex digits, as a commit is: it is only taken for a key where W&B is named just before.
_WANDB = re.compile(r"(wandb\S{0,20}\W{1,4})[0-9a-f]{40}\b", re.IGNORECASE)
_ASSIGNED = re.compile(rf"""(\b[\w.-]*{_SECRET_WORD}["']?\s*(?:=|["']\s*:|:\s*["'])\s*["']?)[^\s"',;&]{{4,}}""", re.IGNORECASE)


def redact(value: Any, environ: Mapping[str, str] = os.environ) -> Any:
    """The same value with secrets masked; call it on whatever goes into a config, log, metric or error.

    Masked: values under keys that name a secret (`hf_token`, `password`), well-known key formats inside strings, and
    every value of an environment variable whose name is such a key. Structs come back as builtins.
    """
    known = [text for name, text in environ.items() if _SECRET_KEY.search(name) and len(text) >= 8]
    return _redact(msgspec.to_builtins(value) if isinstance(value, msgspec.Struct) else value, known)


def _redact(value: Any, known: list[str]) -> Any:
    if isinstance(value, str):
        for secret in known:
            value = value.replace(secret, MASK)
        for pattern in _SECRET_TEXTS:
            value = pattern.sub(MASK, value)
        return _ASSIGNED.sub(rf"\1{MASK}", _WANDB.sub(rf"\1{MASK}", value))
    if isinstance(value, Mapping):
        return {key: MASK if _is_secret(key, item) else _redact(item, known) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_redact(item, known) for item in value)
    return value


def _is_secret(key: object, value: Any) -> bool:
    # Counts may be named "token" too; a number is no credential unless the key says password.
    if not isinstance(key, str) or value is None or isinstance(value, bool) or value == "":
        return False
    return bool(_SECRET_KEY.search(key)) and (not isinstance(value, int | float) or "pass" in key.lower())
