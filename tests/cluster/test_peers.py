import threading
import time

import pytest

from asyncrl.cluster.peers import Peers
from asyncrl.errors import Closed, Unavailable


def soon() -> float:
    return time.monotonic() + 10.0


def test_a_known_peer_is_returned_at_once():
    peers = Peers()
    peers.put("store", 0, "first")
    assert peers.wait("store", -1, soon()) == (0, "first")
    assert peers.peek("store") == "first"
    assert peers.peek("bus") is None


def test_an_older_edition_changes_nothing():
    peers = Peers()
    peers.put("store", 2, "newer")
    peers.put("store", 1, "older")
    assert peers.wait("store", -1, soon()) == (2, "newer")


def test_a_waiter_is_woken_by_a_newer_edition_only():
    peers, got = Peers(), []
    peers.put("store", 0, "dead")
    waiter = threading.Thread(target=lambda: got.append(peers.wait("store", 0, soon())))
    waiter.start()
    peers.put("bus", 5, "other")
    peers.put("store", 1, "alive")
    waiter.join(timeout=10)
    assert got == [(1, "alive")]


def test_no_peer_before_the_deadline_is_named():
    with pytest.raises(Unavailable, match="store"):
        Peers().wait("store", -1, time.monotonic())


def test_close_wakes_a_waiter():
    peers, raised = Peers(), []

    def wait() -> None:
        try:
            peers.wait("store", -1, soon())
        except Closed as error:
            raised.append(str(error))

    waiter = threading.Thread(target=wait)
    waiter.start()
    peers.close()
    waiter.join(timeout=10)
    assert raised == ["stopped while waiting for store"]
