"""Weights as deltas against whole ones: `python tests/bench/bench_delta.py [--lr 1e-6 1e-5] [--versions 200] [--link 1gbit]`.

A Qwen3 of 100M parameters, of which AdamW (torch's, weight decay 0.01) steps float32 masters; the bus gets them in bfloat16.
Gradients are not those of a loss, which would take a small machine days: each tensor has a direction that all steps share, and
noise as large as that in every step, both normal, elements scaled by lognormal factors (σ = 2), for gradients differ by orders
of magnitude. AdamW divides by an element's own size, so what counts is how much of a gradient is shared: here a step is about
0.8 × lr for most elements, the upper end of what is seen, and so are the shares that change. The first steps aren't counted.

Each version is published by this process and received by another, at the other end of a link: a pair of virtual Ethernet
interfaces between two network namespaces, with tc's token bucket at the publisher's end; needs root. Every version that arrives
is compared with what was published, by the checksum of all bytes of a model that took it. Medians; the best round in
brackets, which on a shared machine tells more; wall clock but where CPU is said. As many versions as are sent whole also decode
some tokens in the model that took them, as the model did before it took any.
"""

import argparse
import ctypes
import itertools
import multiprocessing
import os
import statistics
import subprocess
import time
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
import xxhash
from transformers import Qwen3Config, Qwen3ForCausalLM

from asyncrl.models.loading import load_weights
from asyncrl.types import Version
from asyncrl.weights.publisher import WeightPublisher
from asyncrl.weights.sockets import Address
from asyncrl.weights.subscriber import WeightSubscriber

DEADLINE_S = 120.0
CLONE_NEWNET = 0x40000000
WARM = 10
NAMESPACE, HOST = "asyncrl-bench", "10.213.7.1"
ROWS, STEPS = 8, 8


class Turn(NamedTuple):
    """One version. Seconds of the wall clock, but for publisher_s: CPU of all threads."""

    sent_bytes: float
    stage_s: float
    delta_s: float
    arrived_s: float  # from `publish` until it is whole at the receiver
    publisher_s: float
    receiver_s: float  # CPU
    swap_s: float  # load_weights
    decode_s: float  # CPU of STEPS decode steps of ROWS rows; 0 where it was not looked at


def policy(dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32_000,
        hidden_size=640,
        intermediate_size=2560,
        num_hidden_layers=12,
        num_attention_heads=10,
        num_key_value_heads=5,
        head_dim=64,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config).to(dtype)


class Training:
    """Steps of AdamW on gradients that are made up."""

    def __init__(self, lr: float) -> None:
        self._model = policy(torch.float32)
        self._parameters = list(self._model.parameters())
        self._optimizer = torch.optim.AdamW(self._parameters, lr=lr, weight_decay=0.01, fused=True)
        self._generator = torch.Generator().manual_seed(1)
        most = max(parameter.numel() for parameter in self._parameters)
        self._noise = torch.randn(2 * most, generator=self._generator)  # of which a step takes pieces at random places
        self._scale = (1e-4 * torch.exp(2 * torch.randn(most, generator=self._generator))).float()
        self._shared = [self._piece(parameter).clone() for parameter in self._parameters]
        for _ in range(WARM):
            self.step()

    def _piece(self, parameter: torch.Tensor) -> torch.Tensor:
        begin = int(torch.randint(len(self._noise) - parameter.numel(), (), generator=self._generator))
        return self._noise[begin : begin + parameter.numel()].view_as(parameter)

    def step(self) -> None:
        for parameter, shared in zip(self._parameters, self._shared, strict=True):
            scale = self._scale[: parameter.numel()].view_as(parameter)
            parameter.grad = torch.add(shared, self._piece(parameter), out=parameter.grad).mul_(scale)
        self._optimizer.step()

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().bfloat16() for name, tensor in self._model.named_parameters()}


def checksum(tensors: dict[str, torch.Tensor]) -> int:
    whole = xxhash.xxh3_64()
    for name in sorted(tensors):
        whole.update(tensors[name].contiguous().view(torch.uint8).numpy())
    return whole.intdigest()


@torch.inference_mode()
def decode(model: torch.nn.Module) -> float:
    """CPU seconds of STEPS steps."""
    ids, cache, began = torch.ones(ROWS, 1, dtype=torch.long), None, 0.0
    for step in range(STEPS + 1):
        if step == 1:  # the first one makes the cache
            began = time.thread_time()
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        ids, cache = out.logits.argmax(-1), out.past_key_values
    return time.thread_time() - began


def receive(pipe: Connection, address: Address, codec: str, namespace: str, decoded: int) -> None:
    """Tells of each version when it was whole, what it took, its checksum and, of so many, how fast they decode."""
    if namespace:
        entered = ctypes.CDLL(None, use_errno=True).setns(os.open(f"/run/netns/{namespace}", os.O_RDONLY), CLONE_NEWNET)
        assert not entered, os.strerror(ctypes.get_errno())
    torch.set_num_threads(1)
    model, held = policy(torch.bfloat16), None
    subscriber = WeightSubscriber(lambda: address, transport="tcp", codec=codec, name=codec)  # type: ignore[arg-type]
    subscriber.next(held, 0.5)
    pipe.send(statistics.median(decode(model) for _ in range(5)))
    for number in itertools.count():
        cpu = time.process_time()
        while (found := subscriber.next(held, DEADLINE_S)) is None:
            pass
        at, spent = time.monotonic(), time.process_time() - cpu
        held = found[0]
        load_weights(model, found[1])
        swapped, whole = time.monotonic(), checksum(dict(model.named_parameters()))  # type: ignore[arg-type]
        pipe.send((at, spent, swapped - at, decode(model) if number <= decoded else 0.0, whole))


class Way:
    """A publisher and the process of its receiver."""

    def __init__(self, codec: str, host: str, namespace: str, decoded: int) -> None:
        self._publisher = WeightPublisher(1, host=host, transport="tcp", codec=codec)  # type: ignore[arg-type]
        self._pipe, theirs = multiprocessing.get_context("spawn").Pipe()
        arguments = (theirs, self._publisher.admit(codec), codec, namespace, decoded)
        multiprocessing.get_context("spawn").Process(target=receive, args=arguments, daemon=True).start()
        self.decode_s: float = self._told()  # of the model that took no version

    def turn(self, update: int, tensors: dict[str, torch.Tensor], expected: int) -> Turn:
        before, begin, cpu = self._publisher.gauges(), time.monotonic(), time.process_time()
        self._publisher.publish(Version(1, update), tensors)
        stage_s = time.monotonic() - begin
        at, receiver_s, swap_s, decode_s, found = self._told()
        assert found == expected, f"update {update}: another version arrived than was published"
        cpu_s, after = time.process_time() - cpu, self._publisher.gauges()
        sent = after["sent_bytes"] - before["sent_bytes"]
        return Turn(sent, stage_s, after["delta_s"], at - begin, cpu_s, receiver_s, swap_s, decode_s)

    def _told(self) -> Any:
        assert self._pipe.poll(DEADLINE_S)
        return self._pipe.recv()


def link(rate: str) -> str:
    """Makes a namespace at the other end of a link of this rate; returns its name, or an empty one without a rate."""
    if not rate:
        return ""
    for command in (
        f"ip netns add {NAMESPACE}",
        "ip link add asyncrl-a type veth peer name asyncrl-b",
        f"ip link set asyncrl-b netns {NAMESPACE}",
        f"ip addr add {HOST}/24 dev asyncrl-a",
        "ip link set asyncrl-a up",
        f"ip -n {NAMESPACE} addr add 10.213.7.2/24 dev asyncrl-b",
        f"ip -n {NAMESPACE} link set asyncrl-b up",
        f"tc qdisc add dev asyncrl-a root tbf rate {rate} burst 1mb latency 50ms",
    ):
        subprocess.run(command.split(), check=True)
    return NAMESPACE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-6, 1e-5])
    parser.add_argument("--versions", type=int, default=200)
    parser.add_argument("--full", type=int, default=10, help="of these also sent whole, to compare")
    parser.add_argument("--link", default="1gbit", help="as tc writes it; empty: none")
    args = parser.parse_args()
    torch.set_num_threads(1)
    namespace = link(args.link)
    try:
        for lr in args.lr:
            compare(lr, args.versions, args.full, HOST if namespace else "127.0.0.1", namespace)
    finally:
        if namespace:
            subprocess.run(["ip", "link", "del", "asyncrl-a"], check=False)
            subprocess.run(["ip", "netns", "del", namespace], check=False)


def compare(lr: float, versions: int, full: int, host: str, namespace: str) -> None:
    training, turns = Training(lr), {"delta": list[Turn](), "full": list[Turn]()}
    ways = {codec: Way(codec, host, namespace, full) for codec in turns}
    for update in range(versions):
        tensors = training.tensors()
        expected = checksum(tensors)
        for codec, found in turns.items():
            if codec == "delta" or update <= full:
                found.append(ways[codec].turn(update, tensors, expected))
        training.step()
    whole = turns["full"][0].sent_bytes
    print(f"lr {lr:g}: {whole / 2e6:.0f}M parameters, {versions} versions, each equal to the bit where it arrived")
    shares = [turn.sent_bytes / whole for turn in turns["delta"][1:]]
    deltas = [share for share in shares if share < 1]
    print(
        f"  bytes of a delta, of a whole version's: median {statistics.median(deltas):.2%}, {min(deltas):.2%} to "
        f"{max(deltas):.2%}; of all {len(shares)}, {len(shares) - len(deltas)} whole ones too, {statistics.mean(shares):.2%}"
    )
    for codec, found in turns.items():
        columns = dict(zip(Turn._fields, zip(*found[1:], strict=True), strict=True))
        cells = {name: f"{statistics.median(column):.2f} [{min(column):.2f}]" for name, column in columns.items()}
        print(
            f"  {codec:<6} arrived after {cells['arrived_s']} s: publish {cells['stage_s']}, delta {cells['delta_s']}; "
            f"swap {cells['swap_s']}; CPU of publisher {cells['publisher_s']}, of receiver {cells['receiver_s']}"
        )
        rates = [ROWS * STEPS / turn.decode_s for turn in found if turn.decode_s]
        print(
            f"         decodes {statistics.median(rates):.0f} [{max(rates):.0f}] tokens per CPU s, "
            f"{ROWS * STEPS / ways[codec].decode_s:.0f} before it took a version"
        )
    for what in (statistics.median, min):
        one, other = (what([turn.arrived_s for turn in turns[codec][1:]]) for codec in ("full", "delta"))
        print(f"  full ÷ delta, {what.__name__}: {one / other:.1f}", flush=True)


if __name__ == "__main__":
    main()
