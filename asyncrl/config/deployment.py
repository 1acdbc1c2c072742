"""The deployment: where a recipe runs. Every default lives here, once; deploy/local.yaml spells them out."""

import ipaddress
import os.path
from collections.abc import Iterable
from typing import Literal
from urllib.parse import urlsplit

from msgspec.structs import replace

from asyncrl.config.base import Rule, Spec, require, require_fields, require_unset
from asyncrl.config.bus import BusSpec, ServedDtype
from asyncrl.config.callables import Function, name_functions
from asyncrl.config.counts import PlaceSpec, Several, is_some
from asyncrl.config.limits import LimitsSpec
from asyncrl.config.parallel import Group, ParallelSpec, layouts

# How new weights enter while requests run; docs/sglang.md says what each of them promises.
UpdateMode = Literal["in_flight", "keep_kv", "drain", "restart"]


# Arguments of SGLang's server that a deployment may not give, and why.
_PLACED = (
    "it decides over GPUs, and asyncrl places tensor-parallel servers on one node only; set engine.sglang.tp_size and servers"
)
_CHOSEN = "it is chosen by asyncrl; for a server that you start yourself, set engine.sglang.urls"
_OPEN = "it opens another way into the server, without its key; leave it out"
NOT_FOR_ARGS = {
    **dict.fromkeys(("tp-size", "tensor-parallel-size", "dp-size", "data-parallel-size", "enable-dp-attention"), _PLACED),
    **dict.fromkeys(("pp-size", "pipeline-parallel-size", "nnodes", "node-rank", "dist-init-addr", "nccl-init-addr"), _PLACED),
    **dict.fromkeys(("base-gpu-id", "gpu-id-step", "use-ray"), _PLACED),
    **dict.fromkeys(("port", "host", "model-path", "config", "api-key", "admin-api-key"), _CHOSEN),
    **dict.fromkeys(("grpc-port", "tokenizer-worker-num"), _OPEN),
}


_LAUNCH = ("python", "-m", "sglang.launch_server")


def argument_name(argument: str) -> str:
    """Of `--dp_size=2`, `dp-size` and the like: the name as SGLang's own parser knows it, or the beginning of it."""
    return argument.partition("=")[0].removeprefix("--").replace("_", "-")


def is_loopback(url: str) -> bool:
    """Whether only processes of the same machine reach the address."""
    try:
        host = urlsplit(url).hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name, or no address at all
        return False


class SGLangSpec(Spec, frozen=True, kw_only=True):
    """SGLang servers of one generator: launched and owned by it, or found where they run already."""

    # Servers that run already; each generator then launches none. They belong to this run alone.
    urls: tuple[str, ...] = ()
    # Of servers at `urls`: an absolute path of a file (mode 0600) that holds their --api-key, on the generator's node. Servers
    # that asyncrl starts have a key of their own each, which nobody needs to know.
    api_key_file: str = ""
    # Servers that each generator launches. Most deployments raise generators.count instead.
    servers: int = 1
    # The Python of an environment that SGLang has to itself, with the torch and transformers that it pins: an absolute path on
    # the generator's node. It runs `-m sglang.launch_server`, without asyncrl's PYTHONPATH. Empty: asyncrl's environment.
    python: str = ""
    # What starts a server; asyncrl adds the arguments.
    command: tuple[str, ...] = _LAUNCH
    # Added to a server's environment.
    env: dict[str, str] = {}
    # Any other argument of SGLang's server by its command line name, e.g. {"attention-backend": "fa3"}; true is a bare flag.
    # Not those that decide over GPUs, nodes and access: `tp_size` and `servers` do.
    args: dict[str, str | int | float | bool] = {}
    # GPUs of one server.
    tp_size: int = 1
    # Share of a GPU's memory for weights and KV cache, in (0, 1); null leaves it to SGLang.
    mem_fraction: float | None = None
    # Whether prompts with a common beginning share its KV cache (SGLang's radix cache). An `in_flight` update then interrupts
    # the requests and resumes them after the swap; without, SGLang retracts them itself, which is faster for short prompts.
    prefix_cache: bool = False
    # How weights reach a server. `shared`: shared memory of the node; `cuda_ipc`: the same, from this generator's GPU;
    # `distributed`: a torch.distributed group, to any node; `auto`: the fastest that fits.
    transfer: Literal["auto", "shared", "cuda_ipc", "distributed"] = "auto"

    def __post_init__(self) -> None:
        rules: list[Rule] = [
            ("servers", lambda x: x >= 1, "< 1: nobody would generate; use at least 1"),
            ("tp_size", lambda x: x >= 1, "< 1: a server needs a device; use at least 1"),
            (
                "mem_fraction",
                lambda x: 0 < x < 1,
                "is outside (0, 1): it is the share of a GPU's memory for weights and KV cache; null leaves it to SGLang",
            ),
        ]
        require_fields(self, "engine.sglang.", rules)
        _check_arguments("args", self.args)
        _check_arguments("command", (word for word in self.command if word.startswith("--")))
        self._check_python()
        self._check_urls()

    @property
    def launcher(self) -> tuple[str, ...]:
        """What starts a server."""
        return (os.path.expanduser(self.python), *_LAUNCH[1:]) if self.python else self.command

    def _check_python(self) -> None:
        require(
            not self.python or os.path.isabs(os.path.expanduser(self.python)),
            f"engine.sglang.python={self.python!r} is relative, and actors work in another folder; write the whole path",
        )
        require(
            not self.python or (self.command == _LAUNCH and not self.urls),
            f"engine.sglang.python={self.python!r} with a command or urls of your own would be ignored; leave one of them out",
        )

    def _check_urls(self) -> None:
        key = self.api_key_file
        require(
            bool(self.urls) or not key,
            f"engine.sglang.api_key_file={key!r} without urls: it would be ignored, for each server that asyncrl starts has a "
            "random key of its own; leave it out",
        )
        require(
            key.startswith(("/", "~")) or not key,
            f"engine.sglang.api_key_file={key!r} is relative, and actors work in another folder than you; write the whole path",
        )
        for url in self.urls:
            require(
                url.startswith(("http://", "https://")),
                f"engine.sglang.urls: {url!r} is no address of a server; write http://HOST:PORT",
            )
            require(
                bool(key) or is_loopback(url),
                f"engine.sglang.urls: {url!r} without api_key_file: whoever reaches a server that has no key can run code on "
                "its machine; start it with --api-key, and name the file that holds the key",
            )


def _check_arguments(field: str, arguments: Iterable[str]) -> None:
    """Raises ConfigError for an argument of SGLang's server that is not the user's to give. It may be abbreviated: SGLang's
    parser takes `--tp` for `--tp-size`."""
    for argument in arguments:
        name = argument_name(argument)
        for forbidden, why in NOT_FOR_ARGS.items():
            require(not name or not forbidden.startswith(name), f"engine.sglang.{field}: {argument!r} is --{forbidden}: {why}")


# Kinds of engines, and where the EngineKind (asyncrl.generate.engines) of each is.
EngineName = Literal["torch", "sglang"]
ENGINES: dict[str, str] = {
    "torch": "asyncrl.generate.embedded.torch_kind:TorchKind",
    "sglang": "asyncrl.generate.sglang.sglang_kind:SGLangKind",
}


class EngineSpec(Spec, frozen=True, kw_only=True):
    """What generates tokens in each generator."""

    # `torch`: the embedded engine; `sglang`: SGLang servers, as `sglang` below says.
    kind: EngineName = "torch"
    # Requests decoded together, at most; with SGLang per server, which queues what its KV cache has no room for.
    slots: int = 256
    # Prompt + response tokens of one request, at most.
    max_length: int = 2048
    # What happens to in-flight requests on a weight update. `in_flight`: they go on, their KV cache recomputed; `keep_kv`: they
    # go on with the old one; `drain`: the update waits for them; `restart`: they are regenerated from the prompt.
    update_mode: UpdateMode = "in_flight"
    # Of weights and KV cache. auto: what the learner computes in, or else log-probabilities would differ by the rounding:
    # bfloat16 if its `precision.compute` is that, or auto and it has GPUs, or `model.dtype` is bfloat16; else float32.
    dtype: ServedDtype = "auto"
    # Memory of the KV cache (torch only); null: 0.8 of what the GPU has free as the engine starts, or half of what the machine
    # has. A request waits until there is room for the longest that it and all running ones may get; one that never fits is
    # refused.
    kv_bytes: int | None = None
    # Tokens of a rollout between two reports. What was reported survives its server, and its generator: the store has it, and
    # others go on from there, unless `deterministic`, `update_mode: restart` or several turns forbid that.
    stream_interval: int = 256
    # One group at a time, rows constant, so that a run repeats to the bit (torch only).
    deterministic: bool = False
    # Settings of kind `sglang`.
    sglang: SGLangSpec = SGLangSpec()

    def __post_init__(self) -> None:
        rules: list[Rule] = [
            ("slots", lambda x: x >= 1, "< 1: no request could be decoded; use at least sampling.n"),
            ("max_length", lambda x: x >= 2, "< 2 tokens: a prompt and a response need one each; raise it"),
            ("stream_interval", lambda x: x >= 1, "< 1: no token would ever be reported; use at least 1"),
            ("kv_bytes", lambda x: x >= 1, "< 1: no request would fit; use null for what the device has"),
        ]
        require_fields(self, "engine.", rules)
        if self.kind != "sglang":
            require(
                self.sglang == SGLangSpec(),
                f"engine.sglang is set, but engine.kind={self.kind!r}: it would be ignored; set engine.kind: sglang, or leave "
                "it out",
            )
            return
        require_unset(self, "engine.", "kv_bytes", "engine.kind='sglang': set engine.sglang.mem_fraction")
        require(
            not self.deterministic,
            "engine.deterministic=true with engine.kind='sglang': SGLang's batches depend on timing, so nothing would repeat "
            "to the bit; use kind: torch, or deterministic: false",
        )
        require(
            not (self.sglang.prefix_cache and self.update_mode == "keep_kv"),
            "engine.sglang.prefix_cache=true with engine.update_mode='keep_kv': a cached prompt of old weights could be "
            "labelled as new; turn the prefix cache off, or use update_mode: in_flight",
        )

    @property
    def hands_over(self) -> bool:
        """Whether unfinished rollouts may go on in another engine."""
        return not self.deterministic and self.update_mode != "restart"


class GeneratorsSpec(Several, frozen=True, kw_only=True):
    """The actors that generate rollouts, each with an engine of its own."""

    # What each of them reserves; its GPUs are those of its engine.
    place: PlaceSpec = PlaceSpec()
    engine: EngineSpec = EngineSpec()
    # Before its first update a run has the learner score an answer of the engine. If their log-probabilities differ by more
    # than this on average (nats), it ends. auto: 1e-4 where both compute in float32 (SGLang: 1e-3), else 0.1; null: any may.
    max_gap: float | Literal["auto"] | None = "auto"

    def __post_init__(self) -> None:
        rules: list[Rule] = [
            ("count", is_some, "< 1: nobody would generate; use at least 1"),
            ("max_gap", lambda x: x == "auto" or x > 0, "<= 0 nats: no engine rounds as the learner does; use null for any"),
        ]
        require_fields(self, "generators.", rules)
        sglang = self.engine.sglang
        require(
            self.most == 1 or not sglang.urls,
            f"generators.count={self.count} with engine.sglang.urls: every generator would update the same servers; use "
            "count: 1, which serves all of the URLs",
        )
        needed = sglang.servers * sglang.tp_size
        require(
            self.engine.kind != "sglang"
            or bool(sglang.urls)
            or self.place.gpus in (0, needed)
            or self.place.gpus < needed == 1,
            f"generators.place.gpus={self.place.gpus:g}, but engine.sglang.servers={sglang.servers} × tp_size={sglang.tp_size} "
            f"need {needed}: servers would share a GPU or leave one idle; set generators.place.gpus={needed}",
        )

    @property
    def servers(self) -> int:
        """Engines of one generator, each with `engine.slots`."""
        sglang = self.engine.sglang
        return (len(sglang.urls) or sglang.servers) if self.engine.kind == "sglang" else 1

    @property
    def slots(self) -> int:
        """Requests that all engines decode together, of as many generators as a run begins with."""
        return self.least * self.servers * self.engine.slots


class ModelsSpec(Spec, frozen=True, kw_only=True):
    """The actors that serve the models of rewards, if a recipe has any. Each model has its own."""

    count: int = 1  # actors of each model
    place: PlaceSpec = PlaceSpec()  # of each actor
    # `torch` serves classifiers and judges in the actor, `sglang` by servers of the actor's. Longer questions are `invalid`.
    engine: EngineSpec = EngineSpec()
    max_tokens_per_pack: int = 16384  # tokens that a classifier scores in one forward pass (on CPU at most 2,048)

    def __post_init__(self) -> None:
        rule: Rule = ("count max_tokens_per_pack", lambda x: x >= 1, "< 1: nothing would be scored; use >= 1")
        require_fields(self, "rewards.models.", [rule])


class RewardsSpec(Several, frozen=True, kw_only=True):
    """The actors that score."""

    processes: int = 1  # killable scoring processes of each
    lease_size: int = 64  # the most rollouts that an actor asks for at a time
    place: PlaceSpec = PlaceSpec()  # of each actor
    models: ModelsSpec = ModelsSpec()  # actors beside them, only for a recipe with reward models or judges of its own

    def __post_init__(self) -> None:
        rules: list[Rule] = [
            (name, holds, "< 1: nothing would be scored; use >= 1")
            for name, holds in (("count", is_some), ("processes lease_size", lambda x: x >= 1))
        ]
        require_fields(self, "rewards.", rules)


class RanksSpec(Spec, frozen=True, kw_only=True):
    """Where a model of the learner's is."""

    ranks: int = 1  # processes that hold it together
    place: PlaceSpec = PlaceSpec()  # of each
    parallel: ParallelSpec = ParallelSpec()  # how they divide the model and its work

    def __post_init__(self) -> None:
        require_fields(self, "", [("ranks", lambda x: x >= 1, "< 1: nobody would train; use at least 1")])
        require(
            self.ranks == 1 or self.place.gpus in (0, 1),
            f"place.gpus={self.place.gpus:g} with ranks={self.ranks}: a rank computes on one GPU, of its own; "
            "set place.gpus=1, and ranks to the number of GPUs",
        )
        layouts(self.parallel, self.ranks)


class StoreSpec(Spec, frozen=True, kw_only=True):
    """The replay store and its log on disk."""

    segment_bytes: int = 64 << 20  # a segment of the log is closed when it is larger; of events, than 16 MiB
    # `segment` syncs to the disk what a checkpoint counts on, and each closed segment; `call` every acknowledged call.
    fsync: Literal["segment", "call"] = "segment"
    # Every rollout is kept while the closed segments of rows take no more than this; past it the oldest are deleted, at each
    # checkpoint. What a resume needs always stays, also with 0.
    keep_bytes: int = 100 << 30
    place: PlaceSpec = PlaceSpec()  # of its actor

    def __post_init__(self) -> None:
        rules: list[Rule] = [
            ("segment_bytes", lambda x: x >= 1, "< 1: each call would close a segment; some MiB are fast enough"),
            ("keep_bytes", lambda x: x >= 0, "< 0: no number of bytes; 0 keeps what a resume needs"),
        ]
        require_fields(self, "store.", rules)


class Deployment(Spec, frozen=True, kw_only=True):
    """Where a recipe runs."""

    ray_address: str = ""  # empty: RAY_ADDRESS if it is set, else a local Ray
    num_cpus: int | None = None  # of a local Ray; null: those that this process may use
    generators: GeneratorsSpec = GeneratorsSpec()  # who generates, with which engine
    rewards: RewardsSpec = RewardsSpec()  # who scores
    learner: RanksSpec = RanksSpec()  # where the policy is trained, and whatever has no ranks of its own
    critic: RanksSpec | None = None  # where an own critic is; null: with the policy
    reference: RanksSpec | None = None  # where the reference model is; null: with the policy
    store: StoreSpec = StoreSpec()  # the replay store
    bus: BusSpec = BusSpec()  # the weight bus
    limits: LimitsSpec = LimitsSpec()  # timeouts and restarts
    # Who gets the metrics beside metrics.jsonl: `tensorboard`, `wandb`, `mlflow`, classes of your own (`my.module:Tracker`).
    trackers: tuple[Function, ...] = ("tensorboard",)

    def __post_init__(self) -> None:
        name_functions(self, "trackers")
        require_fields(self, "", [("num_cpus", lambda x: x >= 0, "< 0; use null for those that this process may use")])
        for group, spec in self.groups.items():
            require(
                bool(spec.place.gpus) == bool(self.learner.place.gpus),
                f"{group}.place.gpus={spec.place.gpus:g} with learner.place.gpus={self.learner.place.gpus:g}: what they tell "
                "each other would be on different kinds of devices; give all of them GPUs, or none",
            )

    def with_ranks(self, ranks: int) -> "Deployment":
        """The same with so many for the policy."""
        return replace(self, learner=replace(self.learner, ranks=ranks))

    @property
    def groups(self) -> dict[Group, RanksSpec]:
        """The groups of ranks that make up the learner."""
        groups: dict[Group, RanksSpec | None] = {"learner": self.learner, "critic": self.critic, "reference": self.reference}
        return {group: spec for group, spec in groups.items() if spec is not None}

    @property
    def ranks(self) -> dict[str, Group]:
        """What all of the learner's ranks are called, and the group of each; the first one leads."""
        sizes = {group: spec.ranks for group, spec in self.groups.items()}
        return {f"{group}-{i}" if i else group: group for group, size in sizes.items() for i in range(size)}
