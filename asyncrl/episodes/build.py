"""What runs a recipe's episodes beside an engine, put together."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from asyncrl.config import EpisodeSpec
from asyncrl.episodes.children import EpisodePool
from asyncrl.episodes.families import chat_of
from asyncrl.episodes.host import EpisodeHost
from asyncrl.episodes.session import Budget
from asyncrl.interfaces import Engine


def episode_host(
    engine: Engine,
    spec: EpisodeSpec,
    tokenizer: Any,
    stop_token_ids: Sequence[int],
    *,
    turn_tokens: int,
    record: Callable[[int, str], str],
    seed: int,
    log: Path | None = None,
    start_timeout_s: float,
) -> EpisodeHost:
    """turn_tokens: of one answer, unless the recipe says. record, seed: as of EpisodeHost. log, start_timeout_s: as of
    EpisodePool. Raises ConfigError for code that can't be loaded, or a chat template that does not show what is said."""
    budget = Budget(spec.max_tokens or sys.maxsize, spec.max_turn_tokens or turn_tokens, context=engine.max_length)
    pool, chat = EpisodePool(spec, log, start_timeout_s), chat_of(tokenizer, stop_token_ids, spec.chat)
    return EpisodeHost(engine, pool, chat, spec, budget, record, seed)
