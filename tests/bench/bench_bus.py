"""The weight bus against memcpy and bare ZeroMQ: `python tests/bench/bench_bus.py [MB] [--receivers N]`.

shm, shm × N, tcp: from the call of `publish` until the last receiver has read a byte of every page of its model, after
`load_weights`, each in a process of its own with a model of its own. zmq: the same bytes in the same pieces over bare ZeroMQ
with CURVE, to nobody's memory. All take turns, and the first round is left out. Medians; in brackets the best round, which on
a shared machine tells more.

stage: how long `publish` holds up the learner. fetch: in the receiver, from the manifest (zmq: the first request) to the last
byte verified. learner, receiver: CPU seconds of the process per GB, all its threads; ×: of both, over that of a plain copy.
"""

import argparse
import mmap
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch

from asyncrl.config import BusSpec
from asyncrl.models.loading import load_weights
from asyncrl.types import Version
from asyncrl.weights.publisher import WeightPublisher
from asyncrl.weights.sockets import Address, PublisherSocket, SubscriberSocket
from asyncrl.weights.subscriber import WeightSubscriber

DEADLINE_S = 120.0
BUS = BusSpec()


class Turn(NamedTuple):
    """One version, in seconds: of the wall clock, and of CPUs."""

    stage_s: float
    fetch_s: float
    swapped_s: float
    learner_s: float
    receiver_s: float  # of the one that took most


def model_of(megabytes: int) -> torch.nn.Module:
    return torch.nn.ParameterList([torch.full((megabytes << 15,), 1.0) for _ in range(8)])  # float32


def plain_copy(model: torch.nn.Module) -> tuple[float, float]:
    """Seconds of one memcpy of all the bytes into memory that is already mapped, and of CPU."""
    targets = plain_copy.__dict__.setdefault("targets", [tensor.detach().clone() for tensor in model.parameters()])
    begin, cpu = time.monotonic(), time.process_time()
    for target, tensor in zip(targets, model.parameters(), strict=True):
        target.copy_(tensor.detach())
    return time.monotonic() - begin, time.process_time() - cpu


def receive(pipe: Connection, address: Address, transport: str, name: str, megabytes: int) -> None:
    """A receiver: tells when each version was swapped in, on the clock that all processes share, and what it took."""
    torch.set_num_threads(1)
    model, held = model_of(megabytes), None
    subscriber = WeightSubscriber(lambda: address, transport=transport, name=name)  # type: ignore[arg-type]
    subscriber.next(held, 0.5)
    pipe.send("ready")
    while True:
        cpu = time.process_time()
        while (found := subscriber.next(held, DEADLINE_S)) is None:
            pass
        held = found[0]
        load_weights(model, found[1])
        for tensor in model.parameters():
            tensor.view(-1)[:: mmap.PAGESIZE // 4].sum()  # maps what the first step with them would
        at = time.monotonic()
        del found
        pipe.send((at, subscriber.gauges()["fetch_s"], time.process_time() - cpu))


def receive_bare(pipe: Connection, address: Address, megabytes: int) -> None:
    client, pieces = SubscriberSocket(address).socket, (megabytes << 20) // BUS.bucket_bytes
    client.send(b"hello")
    pipe.send("ready")
    while True:
        client.recv()
        begin, cpu = time.monotonic(), time.process_time()
        for index in range(pieces + BUS.credit):
            if index >= BUS.credit:
                client.recv(copy=False)
            if index < pieces:
                client.send(b"%d" % index)
        pipe.send((time.monotonic(), time.monotonic() - begin, time.process_time() - cpu))


class Children:
    """Processes that receive; `figures` waits for what each of them tells of a version."""

    def __init__(self, function: Callable[..., None], arguments: list[tuple[object, ...]]) -> None:
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(["asyncrl.models.loading", "asyncrl.weights.subscriber"])
        pairs = [server.Pipe() for _ in arguments]
        self._pipes = [ours for ours, _ in pairs]
        for (_, theirs), each in zip(pairs, arguments, strict=True):
            server.Process(target=function, args=(theirs, *each), daemon=True).start()
        self.figures()

    def figures(self) -> list[tuple[float, float, float]]:
        assert all(pipe.poll(DEADLINE_S) for pipe in self._pipes)
        return [pipe.recv() for pipe in self._pipes]


def over_bus(model: torch.nn.Module, transport: str, receivers: int, megabytes: int) -> Callable[[int], Turn]:
    """A publisher and its receivers; the function returned publishes an update and waits for all of them."""
    publisher = WeightPublisher(1, transport=transport)  # type: ignore[arg-type]
    names = [f"receiver-{index}" for index in range(receivers)]
    arguments = [(publisher.admit(name), transport, name, megabytes) for name in names]
    children, tensors = Children(receive, arguments), {f"{i}": tensor.detach() for i, tensor in enumerate(model.parameters())}

    def turn(update: int) -> Turn:
        begin, cpu = time.monotonic(), time.process_time()
        publisher.publish(Version(1, update), tensors)
        stage_s = time.monotonic() - begin
        at, fetch_s, cpu_s = (max(column) for column in zip(*children.figures(), strict=True))
        return Turn(stage_s, fetch_s, at - begin, time.process_time() - cpu, cpu_s)

    return turn


def over_zmq(model: torch.nn.Module, megabytes: int) -> Callable[[int], Turn]:
    server = PublisherSocket("127.0.0.1", 1)
    children = Children(receive_bare, [(server.admit("generator-0"), megabytes)])
    data = memoryview(torch.cat([tensor.detach() for tensor in model.parameters()]).view(torch.uint8).numpy())
    peer, _ = server.socket.recv_multipart()

    def turn(update: int) -> Turn:
        begin, cpu = time.monotonic(), time.process_time()
        server.socket.send_multipart([peer, b"go"])
        for _ in range(len(data) // BUS.bucket_bytes):
            start = int(server.socket.recv_multipart()[1]) * BUS.bucket_bytes
            server.socket.send_multipart([peer, data[start : start + BUS.bucket_bytes]])
        ((at, fetch_s, cpu_s),) = children.figures()
        return Turn(0.0, fetch_s, at - begin, time.process_time() - cpu, cpu_s)

    return turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("megabytes", nargs="?", type=int, default=256)
    parser.add_argument("--receivers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, gigabytes = model_of(args.megabytes), (args.megabytes << 20) / 1e9
    many = f"shm × {args.receivers}"
    ways = {
        "shm": over_bus(model, "auto", 1, args.megabytes),
        many: over_bus(model, "auto", args.receivers, args.megabytes),
        "tcp": over_bus(model, "tcp", 1, args.megabytes),
        "zmq": over_zmq(model, args.megabytes),
    }
    turns: dict[str, list[Turn]] = {name: [] for name in ways}
    copies = []
    for update in range(args.rounds + 1):
        copies.append(plain_copy(model))
        for name, turn in ways.items():
            turns[name].append(turn(update))
    wall, cpu = (statistics.median(column[1:]) for column in zip(*copies, strict=True))
    print(f"{args.megabytes} MB, {args.rounds} rounds; memcpy {wall * 1e3:.0f} ms, {cpu / gigabytes:.2f} s of CPU per GB")
    columns = ("stage ms", "fetch ms", "swapped ms", "MB/s", "memcpys", "learner s/GB", "receiver s/GB", "×")
    print("         " + "".join(f"{column:>16}" for column in columns))
    middle = {name: Turn(*map(statistics.median, zip(*found[1:], strict=True))) for name, found in turns.items()}
    best = {name: Turn(*map(min, zip(*found[1:], strict=True))) for name, found in turns.items()}
    for name, of in middle.items():
        values = (of.stage_s * 1e3, of.fetch_s * 1e3, of.swapped_s * 1e3, gigabytes * 1e3 / of.swapped_s, of.swapped_s / wall)
        least = best[name].swapped_s
        bests = ["", "", f" [{least * 1e3:.0f}]", f" [{gigabytes * 1e3 / least:.0f}]", ""]
        cells = [f"{value:.1f}{text}" for value, text in zip(values, bests, strict=True)]
        cells += [f"{seconds / gigabytes:.2f}" for seconds in (of.learner_s, of.receiver_s)]
        print(f"{name:<9}" + "".join(f"{cell:>16}" for cell in [*cells, f"{(of.learner_s + of.receiver_s) / cpu:.1f}"]))
    for what, one, other in (
        (f"{many} over shm, swapped", many, "shm"),
        ("zmq over tcp, fetch", "zmq", "tcp"),
    ):
        field = "swapped_s" if one == many else "fetch_s"
        ratios = [getattr(of[one], field) / getattr(of[other], field) for of in (middle, best)]
        spent = [(of.learner_s + of.receiver_s * (args.receivers if name == many else 1)) for name, of in middle.items()]
        total = dict(zip(middle, spent, strict=True))
        print(f"{what}: {ratios[0]:.2f} [{ratios[1]:.2f}]; CPU of all processes: {total[one] / total[other]:.2f}")


if __name__ == "__main__":
    main()
