"""Log-probabilities and entropies in chunks against all logits at once: memory and time, forward and backward. Prints ratios.

Run: python tests/bench/bench_logprobs.py [--tokens 2048] [--vocabulary 151936] [--width 256] [--threads 1]
Each is measured in a process of its own, by its peak of resident memory beyond weights and hidden states; the gradients count.
"""

import argparse
import multiprocessing
import resource
import time
from pathlib import Path

import torch

from asyncrl.models.logprobs import Head, entropy, sampled_logprobs

MIB = 2**20


def measure(how: str, args: argparse.Namespace) -> tuple[float, float]:
    """Seconds, and MiB at the peak."""
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(args.vocabulary, args.width, generator=generator).mul_(0.1).requires_grad_()
    hidden = torch.randn(args.tokens, args.width, generator=generator, requires_grad=True)
    ids = torch.randint(0, args.vocabulary, (args.tokens,), generator=generator)
    held = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    began = time.perf_counter()
    if how == "chunked":
        logp, spread = Head(weight).scores(hidden, ids, 1.0)
    else:
        logits = torch.nn.functional.linear(hidden, weight)
        logp = sampled_logprobs(logits, ids, 1.0)
        with torch.no_grad():
            spread = entropy(logits, 1.0)
    logp.sum().backward()
    seconds = time.perf_counter() - began
    assert spread.isfinite().all()
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - held) / MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=["chunked", "plain"], help="where the other's memory does not fit")
    args = parser.parse_args()
    measured = {}
    for how in [args.only] if args.only else ["plain", "chunked"]:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            measured[how] = seconds, peak = pool.apply(measure, (how, args))
        print(f"{how:8} {args.tokens} tokens, {args.vocabulary} words: {seconds:6.2f} s, {peak:7.0f} MiB")
    if len(measured) == 2:
        time_ratio, memory_ratio = (ours / plain for ours, plain in zip(measured["chunked"], measured["plain"], strict=True))
        print(f"chunked over plain: time {time_ratio:.2f}, memory {memory_ratio:.3f}")


if __name__ == "__main__":
    main()
