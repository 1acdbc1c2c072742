"""What every engine does with a request: whether it can be served at all, and how its future ends."""

from concurrent.futures import Future, InvalidStateError
from contextlib import suppress

from asyncrl.errors import AsyncRLError, ConfigError
from asyncrl.types import Generation, GenerationRequest


def check_request(request: GenerationRequest, *, max_length: int, vocabulary: int) -> ConfigError | None:
    """None, or the error that says which value of the request is out of bounds."""
    prompt, sampling = len(request.prompt_ids), request.sampling
    where = f"request {request.id}"
    if prompt == 0:
        return ConfigError(f"{where}: the prompt is empty, so there is nothing to go on from; leave the row out")
    if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < vocabulary:
        return ConfigError(
            f"{where}: prompt token ids {min(request.prompt_ids)} to {max(request.prompt_ids)} leave the model's vocabulary of "
            f"{vocabulary}: the embedding has no such row; use the model's own tokenizer"
        )
    if sampling.max_tokens < 1:
        return ConfigError(f"{where}: max_tokens={sampling.max_tokens} < 1: no token could be sampled; use at least 1")
    if prompt + sampling.max_tokens > max_length:
        return ConfigError(
            f"{where}: prompt of {prompt} tokens + max_tokens={sampling.max_tokens} > engine.max_length={max_length}: the "
            "rollout would not fit its slot; raise engine.max_length (up to the model's positions) or shorten either"
        )
    if sampling.temperature < 0 or not 0 < sampling.top_p <= 1 or sampling.top_k < 0:
        return ConfigError(
            f"{where}: temperature={sampling.temperature}, top_p={sampling.top_p}, top_k={sampling.top_k}: no distribution to "
            "sample from; use temperature >= 0, 0 < top_p <= 1, top_k >= 0"
        )
    return None


def settle(future: "Future[Generation]", outcome: Generation | AsyncRLError) -> None:
    """Ends a request's future. One that has ended already (by `close`, or cancelled by its holder) stays as it is."""
    with suppress(InvalidStateError):
        if isinstance(outcome, Generation):
            future.set_result(outcome)
        else:
            future.set_exception(outcome)
