"""The weight bus against memcpy: `python tests/bench/bench_bus.py [MB …]`. Ratios (×) are to one plain copy of the same bytes.

stage: how long `publish` holds up the learner. crc: checksums, in the publisher's I/O thread. fetch: in the receiver, a
process of its own, checksums included. delivered: from the call of `publish` to the return of `next`. Medians; the first
round, in which the receiver takes fresh memory, is left out.
"""

import argparse
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection
from typing import Literal

import torch

from asyncrl.types import Version
from asyncrl.weights.publisher import WeightPublisher
from asyncrl.weights.sockets import Address
from asyncrl.weights.subscriber import WeightSubscriber

Transport = Literal["auto", "tcp"]
DEADLINE_S = 60.0


def copy_s(tensors: dict[str, torch.Tensor], rounds: int) -> float:
    """Seconds of one memcpy of all the bytes into memory that is already mapped."""
    targets = {name: tensor.clone() for name, tensor in tensors.items()}
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        for name, tensor in tensors.items():
            targets[name].copy_(tensor)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def receive(pipe: Connection, address: Address, transport: Transport, versions: int) -> None:
    """The receiver process: tells when each version had arrived, on the clock that both processes share."""
    torch.set_num_threads(1)
    subscriber = WeightSubscriber(lambda: address, transport=transport, name="bench")
    held = None
    subscriber.next(held, 0.5)
    pipe.send("ready")
    for _ in range(versions):
        found = subscriber.next(held, DEADLINE_S)
        assert found is not None
        held = found[0]
        pipe.send((time.monotonic(), subscriber.gauges()["fetch_s"]))
    subscriber.close()


def measure(tensors: dict[str, torch.Tensor], transport: Transport, rounds: int) -> tuple[float, float, float, float]:
    """Median seconds: stage, checksums, fetch, delivered."""
    publisher = WeightPublisher(1, transport=transport)
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    child = spawn.Process(target=receive, args=(theirs, publisher.address, transport, rounds + 1), daemon=True)
    child.start()
    figures = []
    try:
        assert ours.poll(DEADLINE_S)
        ours.recv()
        for update in range(rounds + 1):
            begin = time.monotonic()
            publisher.publish(Version(1, update), tensors)
            staged = time.monotonic()
            assert ours.poll(DEADLINE_S)
            arrived, fetch_s = ours.recv()
            figures.append((staged - begin, publisher.gauges()["seal_s"], fetch_s, arrived - begin))
    finally:
        publisher.close()
        child.join(10)
    stage, seal, fetch, delivered = (statistics.median(column) for column in zip(*figures[1:], strict=True))
    return stage, seal, fetch, delivered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("megabytes", nargs="*", type=int, default=[4, 256])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    columns = ("memcpy ms", "stage ms", "×", "crc ms", "fetch ms", "delivered ms", "×")
    print("   MB path  " + " ".join(f"{column:>12}" for column in columns))
    for megabytes in args.megabytes:
        tensors = {f"layer.{i}": torch.randn(megabytes << 15) for i in range(8)}  # 8 float32 tensors
        memcpy = copy_s(tensors, args.rounds)
        for name, transport in (("shm", "auto"), ("tcp", "tcp")):
            stage, seal, fetch, delivered = measure(tensors, transport, args.rounds)  # type: ignore[arg-type]
            figures = (memcpy * 1e3, stage * 1e3, stage / memcpy, seal * 1e3, fetch * 1e3, delivered * 1e3, delivered / memcpy)
            print(f"{megabytes:>5} {name:<5} " + " ".join(f"{figure:>12.2f}" for figure in figures))


if __name__ == "__main__":
    main()
