"""Whoever has a server's key can run code on its machine, and nobody else can: how a key is made, handed over, and found.

SGLang unpickles what /update_weights_from_tensor and /load_lora_adapter_from_tensors get. Its --api-key guards every path but
/health…, /ready… and /metrics…; its --admin-api-key alone leaves /generate, the second of those two, and /server_info, which
tells that very key, to anybody.
"""

import json
import logging
import re
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from asyncrl.config import SGLangSpec
from asyncrl.errors import ConfigError
from asyncrl.scratch import ScratchFolder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunningServer:
    """Where a server listens, and its key; empty if it has none."""

    url: str
    key: str = field(default="", repr=False)


class PrivateFolder(ScratchFolder):
    """A folder that only this user can enter: with a new key in a configuration file, as SGLang's --config reads it, and with
    the server's own temporary files, among them sockets whose messages it unpickles.

    No argument and no environment variable holds the key: these others could read, or the server might print.
    """

    def __init__(self) -> None:
        super().__init__()
        self.config = self.path / "server.yaml"
        self.key = secrets.token_hex(32)
        self.config.touch(mode=0o600)
        self.config.write_text(json.dumps({"api-key": self.key}))


def read_key(file: str) -> str:
    """The key in a file that `engine.sglang.api_key_file` names. Raises ConfigError if it is none, or others may read it."""
    path, where = Path(file).expanduser(), f"engine.sglang.api_key_file={file!r}"
    try:
        key, mode = path.read_bytes().decode(errors="replace").strip(), path.stat().st_mode & 0o777
    except OSError as error:
        raise ConfigError(f"{where} can't be read on this machine ({error.strerror}): no server could be reached") from error
    if mode & 0o077:
        raise ConfigError(
            f"{where} has mode {mode:o}: other users of this machine could take the key, and run code with it; chmod 600 {path}"
        )
    if not re.fullmatch(r"[!-~]+", key):
        raise ConfigError(
            f"{where} does not hold one word of printable ASCII, so it is no key; write into it what the server was started "
            "with (--api-key), and nothing else"
        )
    return key


def running_servers(sglang: SGLangSpec) -> list[RunningServer]:
    """Those at `engine.sglang.urls`. Raises ConfigError if their key can't be read; warns where they have none."""
    key = read_key(sglang.api_key_file) if sglang.api_key_file else ""
    if sglang.urls and not key:
        who = "any user of this machine can run code with it, as who started it"
        log.warning("%s has no key: %s; set engine.sglang.api_key_file", ", ".join(sglang.urls), who)
    return [RunningServer(url, key) for url in sglang.urls]
