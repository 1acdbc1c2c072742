"""Whether a model that is named exists, found out before anything is loaded, in seconds. No torch, no transformers."""

import contextlib
import difflib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from asyncrl.errors import ConfigError
from asyncrl.rundir import sha256

ANSWER_S = 5.0  # for the hub to connect, and again to answer; loaders try for about a minute
_OTHER_FRAMEWORKS = ["*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.ot", "original/*"]


def require_model(name: str, field: str, *files: str, revision: str = "", endpoint: str | None = None) -> str:
    """Proves that `name` is a folder that holds one of `files` (none named: config.json), or a Hugging Face id that is in the
    local cache or on the hub. Returns what to say of it. field: what named it, for the error. revision: of an id. endpoint: the
    hub's address.

    Blocks for some ANSWER_S at most, if the hub has to be asked. Raises ConfigError with the nearest folder that there is.
    """
    files = files or ("config.json",)
    folder = Path(name).expanduser()
    if any((folder / file).is_file() for file in files):
        return name
    if folder.is_absolute() or folder.exists():
        problem = f"has no {files[0]}" if folder.is_dir() else f"does not exist{_nearest(folder)}"
    elif problem := _missing_on_hub(name, files, revision, endpoint):
        problem = f"is no folder here{_nearest(folder)}, and {problem}"
    else:
        return f"{name} (Hugging Face{f', revision {revision}' if revision else ''})"
    raise ConfigError(f"{field}={name!r} {problem}: nothing could be loaded; name a Hugging Face folder or id")


def cached_file(name: str, file: str, revision: str = "") -> Path | None:
    """Where a file of a Hugging Face id lies in the cache here; None if it does not, or `name` is no id. Asks no hub."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, file, revision=revision or None)
    except ValueError:
        return None
    return Path(found) if isinstance(found, str) else None


def frozen_folder(name: str, revision: str = "") -> tuple[Path, str]:
    """Where the files of a folder or id are, downloaded if they are not yet, and a digest of the weights among them.

    Of an id the folder is called after the commit: whatever is loaded from it is what the digest is of. Raises ConfigError.
    """
    from huggingface_hub import snapshot_download

    folder = Path(name).expanduser()
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(name, revision=revision or None, ignore_patterns=_OTHER_FRAMEWORKS))
        except Exception as error:  # of the HTTP library, or of the hub
            raise ConfigError(f"{name!r} could not be had from Hugging Face: {type(error).__name__}: {error}") from error
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return folder, hashlib.sha256("".join(f"{file.name} {sha256(file)}\n" for file in weights).encode()).hexdigest()


def _missing_on_hub(name: str, files: Sequence[str], revision: str, endpoint: str | None) -> str:
    """Why a Hugging Face id can't be loaded; empty if it can, or if the hub is in trouble, which loading will tell of."""
    from huggingface_hub import HfApi, errors

    try:
        if not any(cached_file(name, file, revision) for file in files):
            HfApi(endpoint=endpoint).model_info(name, revision=revision or None, timeout=ANSWER_S)
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        return "Hugging Face has no model of that name that you may read"
    except errors.RevisionNotFoundError:
        return f"Hugging Face has no revision {revision!r} of it"
    except errors.HfHubHTTPError:
        return ""
    except Exception as error:  # of the HTTP library, or that this machine is to stay offline
        return f"Hugging Face, whose cache here does not hold it, can't be asked ({type(error).__name__}: {error})"
    return ""


def _nearest(path: Path) -> str:
    """` (did you mean …?)`: the folder that `path` is a misspelling of, if there is one; else what lies where it would."""
    found, here = Path("/"), Path.cwd()
    for part in path.absolute().parts[1:]:
        if not (found / part).is_dir():
            beside: list[str] = []
            with contextlib.suppress(OSError):
                beside = sorted(entry.name for entry in os.scandir(found) if entry.is_dir())
            near = difflib.get_close_matches(part, beside, n=1)
            if not near:
                return f" ({found.name}/ holds {', '.join(beside[:8])})" if beside and found != here else ""
            part = near[0]
        found /= part
    return f" (did you mean {f'./{found.relative_to(here)}' if found.is_relative_to(here) else found}?)"
