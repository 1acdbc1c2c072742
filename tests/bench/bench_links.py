"""Weights between two hosts, with a delay and a loss between them: `python tests/bench/bench_links.py [MB]`. Needs root.

The hosts are network namespaces, the link a process that carries their packets (links.py) and bounds the rate where nothing
else does. bus: from the call of `publish` until the receiver holds all bytes, verified, over TCP with CURVE. zmq: the same
bytes in the same pieces, as many asked for ahead, over bare ZeroMQ with CURVE. They take turns; medians, in brackets the best
round.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from bench_bus import BUS, DEADLINE_S, model_of, receive_bare
from links import Link, enter, linked

from asyncrl.types import Version
from asyncrl.weights.publisher import WeightPublisher
from asyncrl.weights.sockets import PublisherSocket
from asyncrl.weights.subscriber import WeightSubscriber

NEAR, FAR = "10.9.0.1", "10.9.0.2"


def receive_bus(pipe: Connection, address: Any) -> None:
    held, subscriber = None, WeightSubscriber(lambda: address, transport="tcp", name="far")
    subscriber.next(held, 0.5)
    pipe.send("ready")
    while True:
        while (found := subscriber.next(held, DEADLINE_S)) is None:
            pass
        held = found[0]
        pipe.send(time.monotonic())


def at_host(pid: int, function: Callable[..., None], *arguments: Any) -> None:
    torch.set_num_threads(1)
    enter(pid)  # before there are threads
    function(*arguments)


def started(pid: int, function: Callable[..., None], *arguments: Any) -> tuple[Connection, Any]:
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["bench_bus", "asyncrl.weights.subscriber"])
    ours, theirs = server.Pipe()
    process = server.Process(target=at_host, args=(pid, function, theirs, *arguments), daemon=True)
    process.start()
    return ours, process


def told(pipe: Connection) -> Any:
    assert pipe.poll(DEADLINE_S), "the other end says nothing"
    return pipe.recv()


def publish_bus(pipe: Connection, megabytes: int) -> None:
    publisher, model = WeightPublisher(1, host=NEAR, transport="tcp"), model_of(megabytes)
    pipe.send(publisher.admit("far"))
    tensors = {f"{i}": tensor.detach() for i, tensor in enumerate(model.parameters())}
    while update := pipe.recv():
        began = time.monotonic()
        publisher.publish(Version(1, update), tensors)
        pipe.send(began)


def publish_bare(pipe: Connection, megabytes: int) -> None:
    server, data = PublisherSocket(NEAR, 1), memoryview(bytearray(megabytes << 20))
    pipe.send(server.admit("far"))
    peer, _ = server.socket.recv_multipart()
    while pipe.recv():
        pipe.send(time.monotonic())
        server.socket.send_multipart([peer, b"go"])
        for _ in range(len(data) // BUS.bucket_bytes):
            start = int(server.socket.recv_multipart()[1]) * BUS.bucket_bytes
            server.socket.send_multipart([peer, data[start : start + BUS.bucket_bytes]])


def seconds_of(link: Link, megabytes: int, rounds: int) -> dict[str, list[float]]:
    """Of each way, from the call to the last byte, without the first round."""
    taken: dict[str, list[float]] = {"bus": [], "zmq": []}
    with linked([NEAR, FAR], link) as (near, far):
        ends, processes = {}, []
        for name, publish, receive, more in (
            ("bus", publish_bus, receive_bus, ()),
            ("zmq", publish_bare, receive_bare, (megabytes,)),
        ):
            sender, one = started(near, publish, megabytes)
            receiver, other = started(far, receive, told(sender), *more)
            told(receiver)
            ends[name] = sender, receiver
            processes += [one, other]
        for update in range(1, rounds + 2):
            for name, (sender, receiver) in ends.items():
                sender.send(update)
                began, ended = told(sender), told(receiver)
                taken[name].append((ended if name == "bus" else ended[0]) - began)
        for process in processes:
            process.kill()
            process.join()
    return {name: seconds[1:] for name, seconds in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("megabytes", nargs="?", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(f"{args.megabytes} MB, {args.rounds} rounds")
    print(f"{'delay ms':>9}{'loss':>7}{'bus MB/s':>18}{'zmq MB/s':>18}{'bus ÷ zmq, time':>22}")
    for delay_ms in (0, 20, 100):
        for loss in (0.0, 0.01):
            taken = seconds_of(Link(delay_ms / 1e3, loss), args.megabytes, args.rounds)
            middle, best = ({name: of(seconds) for name, seconds in taken.items()} for of in (statistics.median, min))
            rate = {name: f"{args.megabytes / middle[name]:.1f} [{args.megabytes / best[name]:.1f}]" for name in taken}
            ratio = f"{middle['bus'] / middle['zmq']:.2f} [{best['bus'] / best['zmq']:.2f}]"
            print(f"{delay_ms:>9}{loss:>7.0%}{rate['bus']:>18}{rate['zmq']:>18}{ratio:>22}", flush=True)


if __name__ == "__main__":
    main()
