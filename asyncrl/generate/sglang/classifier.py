"""A frozen SGLang server that scores sequences of tokens: a reward model, in place of the torch one."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from msgspec.structs import replace

from asyncrl.errors import Closed, ConfigError, Unavailable
from asyncrl.generate.engines import EngineSite
from asyncrl.generate.sglang.build import launch_command
from asyncrl.generate.sglang.process import require_command
from asyncrl.generate.sglang.server import CALL_S, SGLangServer
from asyncrl.generate.sglang.transfer import SharedMemory, StagedWeights
from asyncrl.loops import LoopThread
from asyncrl.models.architectures import read_config
from asyncrl.types import Version

# SGLang 0.5.20 gives these a bias, which no checkpoint has, and leaves it random.
_BIASED = {"Qwen2ForSequenceClassification", "Qwen3ForSequenceClassification"}


class SGLangClassifier:
    """Scores by a server of its own. Blocks until that is up. Raises ConfigError, and Unavailable if it does not come up."""

    def __init__(self, site: EngineSite) -> None:
        engine, place = site.generators.engine, site.generators.place
        if engine.sglang.urls:
            raise ConfigError("rewards.models.engine.sglang.urls: a classifier needs a server of the run's own; leave them out")
        require_command(engine.sglang.launcher)
        frozen = replace(engine, sglang=replace(engine.sglang, args={"is-embedding": True, **engine.sglang.args}))
        log = site.logs / f"{site.name}.sglang.log"
        command = launch_command(frozen, site.model, place, 0, engine.max_length, log=log)
        self._loop = LoopThread(site.name)
        self._loop.start()
        biased = not _BIASED.isdisjoint(read_config(site.model.path).get("architectures") or ())
        make = partial(SGLangServer, command, partial(SharedMemory, device="cuda" if place.gpus else "cpu"))
        self._server = self._loop.ask(self._open(make, site.limits.start_timeout_s, biased)).result()

    async def _open(self, make: Callable[[], SGLangServer], deadline_s: float, biased: bool) -> SGLangServer:
        server = make()
        try:
            await server.open(deadline_s)
            if biased:
                staged = StagedWeights()
                staged.put(Version(0, 0), {"score.bias": torch.zeros(1)})
                await server.update(staged, deadline_s)
                staged.close()
        except BaseException:
            await server.close()
            raise
        return server

    def __call__(self, sequences: Sequence[list[int]]) -> list[float]:
        """The score of each."""
        path, body = "/classify", {"input_ids": list(sequences)}
        said = self._loop.ask(self._server.client.post(path, body, CALL_S)).result()
        try:
            return [float(one["embedding"][0]) for one in said]
        except (TypeError, LookupError):
            raise Unavailable(f"{self._server.client.url}{path} does not score: {said!r:.200}") from None

    def health(self) -> None:
        """Raises Unavailable if the server has died."""
        self._server.check_alive()

    def close(self) -> None:
        self._loop.close(Closed("the classifier was closed"), self._server.close, CALL_S)
