"""Two hosts on one machine: network namespaces, and between them a link with a delay, a loss and a rate. Needs root and Linux.

The kernel here need not have netem: both ends are TUN devices, and a process carries the packets from one to the other.
"""

import contextlib
import ctypes
import fcntl
import heapq
import multiprocessing
import os
import random
import select
import struct
import subprocess
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

CLONE_NEWNET, TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x40000000, 0x400454CA, 0x0001, 0x1000
MTU = 1500


class Link(NamedTuple):
    """One way delay in seconds, share of packets that are lost, and bytes/s; the same in both directions."""

    delay_s: float = 0.0
    loss: float = 0.0
    bytes_per_s: float = float("inf")


def enter(pid: int) -> None:
    """Puts this process into the network of another."""
    with open(f"/proc/{pid}/ns/net") as file:
        _check(ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET))


def _check(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@contextlib.contextmanager
def linked(addresses: Sequence[str], link: Link) -> Iterator[list[int]]:
    """Namespaces with these addresses (10.x.y.z), each of which reaches the others over the link; yields a pid in each."""
    hosts = [subprocess.Popen(["unshare", "--net", "sleep", "infinity"]) for _ in addresses]
    carrier = None
    try:
        while any(os.readlink(f"/proc/{host.pid}/ns/net") == os.readlink("/proc/self/ns/net") for host in hosts):
            time.sleep(0.01)
        ready, told = multiprocessing.Pipe(False)
        carrier = multiprocessing.get_context("fork").Process(
            target=_carry, args=([host.pid for host in hosts], addresses, link, told), daemon=True
        )
        carrier.start()
        assert ready.poll(30), "the link is not up"
        yield [host.pid for host in hosts]
    finally:
        for process in [*hosts, *([carrier] if carrier else [])]:
            process.kill()
        for host in hosts:
            host.wait()


def _open(pid: int, address: str) -> int:
    enter(pid)
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", b"net0", IFF_TUN | IFF_NO_PI))
    for command in (
        "ip link set lo up",
        f"ip addr add {address}/8 dev net0",
        f"ip link set dev net0 mtu {MTU} txqueuelen 20000 up",
    ):
        subprocess.run(command.split(), check=True)
    return tun


def _carry(pids: Sequence[int], addresses: Sequence[str], link: Link, told: "multiprocessing.connection.Connection") -> None:
    tuns = [_open(pid, address) for pid, address in zip(pids, addresses, strict=True)]
    told.send(True)
    to = {bytes(map(int, address.split("."))): tun for address, tun in zip(addresses, tuns, strict=True)}
    free = dict.fromkeys(tuns, 0.0)  # when the line from there has sent what it was given
    due: list[tuple[float, int, int, bytes]] = []
    lost, number = random.Random(0), 0
    while True:
        wait_s = max(0.0, due[0][0] - time.monotonic()) if due else None
        for tun in select.select(tuns, [], [], wait_s)[0]:
            now = time.monotonic()
            for _ in range(64):
                try:
                    packet = os.read(tun, 1 << 16)
                except BlockingIOError:
                    break
                target = to.get(packet[16:20])
                free[tun] = max(free[tun], now) + len(packet) / link.bytes_per_s
                if target is None or (link.loss and lost.random() < link.loss) or free[tun] > now + 0.5:  # its queue is full
                    continue
                number += 1
                heapq.heappush(due, (free[tun] + link.delay_s, number, target, packet))
        now = time.monotonic()
        while due and due[0][0] <= now:
            with contextlib.suppress(BlockingIOError):  # the device's queue is full: lost, as on a real one
                os.write(due[0][2], due[0][3])
            heapq.heappop(due)
