"""Weights to 8 receivers on 4 other hosts, as a star and as trees: `python tests/bench/bench_relay.py [MB]`. Needs root.

The hosts are network namespaces; each sends `--rate` MB/s at the most (links.py). What a node is, is said to the receivers by
name: two of each node share memory. A version is cut into 64 buckets: of a larger one a bucket is a smaller part still.
Seconds from the call of `publish` until the last receiver holds all bytes, verified, over TCP with CURVE; the publisher's
bytes, in versions; medians. In the last round of each tree the first relay is killed when half of a version is there: seconds
until all others hold it.
"""

import argparse
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any

import torch
from bench_bus import DEADLINE_S, model_of
from bench_links import started, told
from links import Link, linked
from msgspec.structs import replace

from asyncrl.types import Version
from asyncrl.weights import subscriber as subscribing
from asyncrl.weights.publisher import WeightPublisher
from asyncrl.weights.relay import WeightRelay
from asyncrl.weights.subscriber import WeightSubscriber

HOSTS = ["10.9.0.1", *(f"10.9.0.{number}" for number in range(2, 6))]
EACH = 2


def publish(pipe: Connection, megabytes: int, fanout: int) -> None:
    bucket_bytes = (megabytes << 20) // 64
    publisher = WeightPublisher(1, host=HOSTS[0], transport="tcp", bucket_bytes=bucket_bytes, fanout=fanout)
    model = model_of(megabytes)
    pipe.send(None)
    tensors = {f"{i}": tensor.detach() for i, tensor in enumerate(model.parameters())}
    while (asked := pipe.recv()) is not None:
        if isinstance(asked, str):
            pipe.send(publisher.admit(asked))
        elif asked < 0:
            pipe.send(publisher.gauges()["sent_bytes"])
        else:
            began = time.monotonic()
            publisher.publish(Version(1, asked), tensors)
            pipe.send(began)


def receive(pipe: Connection, address: Any, name: str, node: int, host: str) -> None:
    subscribing.here = lambda: f"node {node}"  # type: ignore[assignment]
    WeightRelay._own = own_on(f"node {node}", WeightRelay._own)  # type: ignore[method-assign]
    relay = WeightRelay(host)
    held, subscriber = None, WeightSubscriber(lambda: address, name=name, deadline_s=DEADLINE_S, relay=relay)
    more = relay.arrived

    def arrived() -> None:
        more()
        assembly = subscriber._assembly
        if assembly is not None and assembly.arrived == assembly.manifest.bucket_count // 2:
            pipe.send("half")

    relay.arrived = arrived  # type: ignore[method-assign]
    pipe.send("ready")
    while True:
        if (found := subscriber.next(held, 1.0)) is not None:
            held = found[0]
            pipe.send((held.update, time.monotonic()))


def own_on(node: str, own: Any) -> Any:
    """Memory that is opened on this node alone."""

    def named(relay: WeightRelay, manifest: Any, memory: Any) -> Any:
        return replace(made := own(relay, manifest, memory), place=replace(made.place, here=node)).signed()

    return named


class Hosts:
    """A publisher and receivers, the first `count` of them, two on a host, in the order in which they came."""

    def __init__(self, pids: list[int], megabytes: int, fanout: int, count: int) -> None:
        self._pipe, process = started(pids[0], publish, megabytes, fanout)
        told(self._pipe)
        self.receivers, self.processes = [], [process]
        for number in range(count):
            node, name = 1 + number // EACH, f"r{number}"
            self._pipe.send(name)
            pipe, process = started(pids[node], receive, told(self._pipe), name, node, HOSTS[node])
            told(pipe)
            self.receivers.append(pipe)
            self.processes.append(process)
        self._number = -1

    def seconds(self, kill_first: bool = False) -> float:
        """Of one version, until all have it."""
        self._number += 1
        self._pipe.send(self._number)
        began, ends, left = told(self._pipe), [], self.receivers
        if kill_first:
            while told(left[0]) != "half":
                pass
            self.processes[1].kill()
            left = left[1:]
        for pipe in left:
            while (heard := told(pipe)) == "half" or heard[0] != self._number:
                pass
            ends.append(heard[1])
        return max(ends) - began

    def sent(self) -> float:
        self._pipe.send(-1)
        return float(told(self._pipe))

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("megabytes", nargs="?", type=int, default=16)
    parser.add_argument("--rate", type=float, default=4.0, help="MB/s that a host sends")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(f"{args.megabytes} MB, {args.rate:g} MB/s from each host, {args.rounds} rounds")
    print(f"{'':>26}{'seconds':>10}{'÷ one':>8}{'versions sent':>15}{'relay killed: s':>17}")
    one = 0.0
    with linked(HOSTS, Link(0.001, 0.0, args.rate * 2**20)) as pids:
        for what, count, fanout in (("one receiver", 1, 0), ("star, 8", 8, 0), ("fanout 2, 8", 8, 2), ("fanout 1, 8", 8, 1)):
            hosts = Hosts(pids, args.megabytes, fanout, count)
            hosts.seconds()  # everybody has connected
            before, taken = hosts.sent(), [hosts.seconds() for _ in range(args.rounds)]
            sent = (hosts.sent() - before) / args.rounds / (args.megabytes << 20)
            one = one or statistics.median(taken)
            killed = f"{hosts.seconds(kill_first=True):17.2f}" if fanout else ""
            middle = statistics.median(taken)
            print(f"{what:>26}{middle:10.2f}{middle / one:8.2f}{sent:15.2f}{killed}", flush=True)
            hosts.end()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
