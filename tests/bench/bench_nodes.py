"""A node with two of four generators is killed every 30 s, and a new one added: `python tests/bench/bench_nodes.py [MINUTES]`.

What that costs in tokens and samples, beside an undisturbed run of the same length; restarts and preemptions that were counted,
and what the log says of rows, groups and versions (as bench_faults.py checks it). Long-tailed answers, in pieces of eight
tokens; see on_nodes.py for the engines, and for `max_restarts=0`.
"""

import argparse
import tempfile
import threading
from pathlib import Path

from on_nodes import Led, add_node, deployment, make_recipe, say, several
from ray.cluster_utils import Cluster

GENERATORS = 4


def kill_nodes(cluster: Cluster, nodes: list, every_s: float, over: threading.Event, killed: list) -> None:
    """The oldest each time, without a word."""
    while not over.wait(every_s):
        node = nodes.pop(0)
        cluster.remove_node(node, allow_graceful=False)
        killed.append(node)
        nodes.append(add_node(cluster))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("minutes", nargs="?", type=float, default=10.0)
    parser.add_argument("--every", type=float, default=30.0, help="seconds between two kills")
    args = parser.parse_args()
    rates: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as made, several(nodes=2) as (cluster, nodes):
        folder = Path(made)
        recipe = make_recipe(folder)
        for name in ("undisturbed", "disturbed"):
            led = Led(recipe, deployment(cluster, GENERATORS), folder, name)
            led.until(lambda led=led: len(led.pids) == GENERATORS)
            over, killed = threading.Event(), []
            killer = threading.Thread(target=kill_nodes, args=(cluster, nodes, args.every, over, killed))
            if name == "disturbed":
                killer.start()
            rates[name] = led.measure(60 * args.minutes)
            over.set()
            if name == "disturbed":
                killer.join()
            problems = led.end()
            made_, lost, resumed = led.tokens()
            result = led.result
            say(
                [
                    (f"{name}: samples/s", f"{rates[name]:.1f}"),
                    ("nodes killed", len(killed)),
                    ("tokens made, lost, gone on from", f"{made_}, {lost} ({lost / made_:.2%}), {resumed}"),
                    ("restarts", result.restarts),
                    ("preemptions", sum(result.preemptions.values())),
                    ("largest lag", result.max_trained_lag),
                    ("rows lost, groups trained twice, bound passed", problems or "none"),
                ]
            )
    print(f"samples/s, disturbed : undisturbed  {rates['disturbed'] / rates['undisturbed']:.2f}")


if __name__ == "__main__":
    main()
