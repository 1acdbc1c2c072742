"""ZeroMQ sockets as the bus uses them: encrypted, authenticated, never blocking on a peer, and wakeable."""

import logging
import resource
import socket
import threading
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import zmq
from msgspec import Struct
from msgspec.structs import replace
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import recv_monitor_message

from asyncrl.errors import Fenced
from asyncrl.weights.messages import RelayAddress

HEARTBEAT_MS = 5_000  # a peer whose machine vanished sends no FIN
HEARTBEAT_TIMEOUT_MS = 30_000  # ample: on a slow link a heartbeat waits behind a whole bucket
STALLED_MS = 20_000  # a peer whose machine takes no byte for so long is cut off, and what waits for it is freed
MAX_QUEUED = 128  # answers that wait for one receiver; the bytes of buckets have a bound of their own
GOODBYE_MS = 200  # how long closing may take for the last message to leave
HANDSHAKE_MS = 5_000  # a connection without the run's keys lasts no longer
MAX_REQUEST_BYTES = 1 << 16  # requests are tiny; a bigger one is not ours
MAX_REPLY_BYTES = 128 << 20  # twice the largest bucket; room for a manifest of a million tensors
MAX_CONNECTIONS = 1024  # of one publisher, strangers' included
DESCRIPTORS = 4096  # that a process with a publisher wants: for those, and for Ray's and its own files

log = logging.getLogger(__name__)


class Address(Struct, frozen=True, kw_only=True):
    """Where a publisher is, and the keys that open it to one receiver. A secret: it is handed out through Ray, never logged."""

    endpoint: str
    incarnation: int
    server_key: bytes
    client_public: bytes
    client_secret: bytes

    def same_publisher(self, other: "Address") -> bool:
        """Whether they lead to one publisher, with whatever keys of the receiver."""
        return replace(other, client_public=self.client_public, client_secret=self.client_secret) == self

    def __repr__(self) -> str:
        return f"Address({self.endpoint}, incarnation={self.incarnation}, keys=…)"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        # rich prints locals of tracebacks; msgspec's own __rich_repr__ would show every field.
        return [("endpoint", self.endpoint), ("incarnation", self.incarnation)]


class Waker:
    """Ends another thread's poll. `set` may be called from any thread; the polling thread calls `clear`."""

    def __init__(self) -> None:
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)
        self._write.setblocking(False)

    def fileno(self) -> int:
        return self._read.fileno()

    def set(self) -> None:
        with suppress(OSError):  # full: the poll is as good as woken; closed: nobody polls any more
            self._write.send(b"w")

    def clear(self) -> None:
        with suppress(BlockingIOError):
            while self._read.recv(4096):
                pass

    def close(self) -> None:
        self._read.close()
        self._write.close()


class PublisherSocket:
    """A publisher's ROUTER on a free port of `host`, with a fresh key, and the thread that admits clients (ZAP): those with a
    key that `admit` made and `void` did not end.

    host: the address by which receivers reach this node; only that one is bound. Raises zmq.ZMQError if it isn't this
    node's. The socket belongs to the thread that uses it first, which calls `watch` when `monitor` can be read: strangers
    can connect, though they get no answer, and must not use up the descriptors of this process.
    """

    def __init__(self, host: str, incarnation: int) -> None:
        self._server_key, server_secret = zmq.curve_keypair()
        self._incarnation = incarnation
        self._lock = threading.Lock()
        self._given: dict[str, tuple[int, Address | None]] = {}  # by receiver, with its incarnation; None: its key is void
        self._valid: dict[bytes, str] = {}  # public keys, and whose they are
        self._context = zmq.Context()
        self._doorkeeper = ThreadAuthenticator(self._context)
        self._doorkeeper.start()
        admits = SimpleNamespace(callback=lambda domain, key: self.admits(key))
        self._doorkeeper.configure_curve_callback("*", credentials_provider=admits)
        self.socket = self._context.socket(zmq.ROUTER)
        _common(self.socket)
        self.socket.setsockopt(zmq.CURVE_SERVER, 1)
        self.socket.setsockopt(zmq.CURVE_SECRETKEY, server_secret)
        # Without MANDATORY a ROUTER drops silently; with it a send to a dead or full peer says so.
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.socket.setsockopt(zmq.SNDHWM, MAX_QUEUED)
        self.socket.setsockopt(zmq.MAXMSGSIZE, MAX_REQUEST_BYTES)
        self.monitor = self.socket.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        self._most, self._open, self.cut = connections_that_fit(), set[int](), 0
        try:
            self.socket.bind(f"tcp://{host}:*")
        except zmq.ZMQError:
            self.close()
            raise
        self._endpoint = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def admit(self, name: str, incarnation: int = 0) -> Address:
        """What a receiver needs to connect, with keys of its own: the same ones until they are void. From any thread.

        A later incarnation of it makes those of an earlier one void. Raises Fenced for one that is not the latest.
        """
        with self._lock:
            latest, address = self._given.get(name, (incarnation, None))
            if incarnation < latest:
                raise Fenced(f"weight receiver {name}: incarnation {incarnation} was replaced by {latest}; it gets no key")
            if address is None or incarnation > latest:
                if address is not None:
                    del self._valid[address.client_public]
                public, secret = zmq.curve_keypair()
                address = Address(
                    endpoint=self._endpoint,
                    incarnation=self._incarnation,
                    server_key=self._server_key,
                    client_public=public,
                    client_secret=secret,
                )
                self._given[name], self._valid[public] = (incarnation, address), name
            return address

    @property
    def source(self) -> RelayAddress:
        """Where receivers find it that have keys of their own (`welcome`)."""
        return RelayAddress(endpoint=self._endpoint, server_key=self._server_key)

    def welcome(self, guests: dict[bytes, str]) -> None:
        """These public keys are served, and no others. From any thread."""
        with self._lock:
            self._valid = dict(guests)

    def admits(self, key: bytes) -> bool:
        """Whether a client with this public key is served. From any thread."""
        return key in self._valid

    def owner(self, key: bytes) -> str | None:
        """The receiver that this public key was given to; None if it is not served. From any thread."""
        return self._valid.get(key)

    def void(self, key: bytes) -> None:
        """No client with this public key is served any more. Its receiver may be admitted again, with another one."""
        with self._lock:
            if (name := self._valid.pop(key, None)) in self._given:
                self._given[name] = self._given[name][0], None

    @property
    def connections(self) -> int:
        return len(self._open)

    def watch(self) -> None:
        """Counts connections that came and went; cuts new ones off while there are too many."""
        while self.monitor.poll(0):
            event = recv_monitor_message(self.monitor)
            if event["event"] == zmq.EVENT_DISCONNECTED:
                self._open.discard(event["value"])
                continue
            self._open.add(event["value"])
            if len(self._open) > self._most:
                self._cut(event["value"])

    def _cut(self, descriptor: int) -> None:
        """Ends a connection; ZeroMQ then notices, and closes the descriptor, which is its own."""
        with suppress(OSError):  # it has ended by itself
            connection = socket.socket(fileno=descriptor)
            try:
                # A descriptor may by now be another's: touch only what came in at our port.
                if connection.getsockname()[1] == int(self._endpoint.rpartition(":")[2]):
                    connection.shutdown(socket.SHUT_RDWR)
                    self.cut += 1
            finally:
                connection.detach()

    def close(self) -> None:
        self.socket.disable_monitor()
        self.monitor.close(0)
        self.socket.close()
        self._doorkeeper.stop()
        self._context.term()


class SubscriberSocket:
    """A subscriber's DEALER to one address, and a monitor that tells why a connection fails."""

    _CAUSES = {
        zmq.EVENT_CONNECT_RETRIED: "connection refused or lost, trying again",
        zmq.EVENT_DISCONNECTED: "the publisher closed the connection",
        zmq.EVENT_HANDSHAKE_FAILED_AUTH: "the publisher refused our key",
        zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "the peer speaks another protocol, or another key",
        zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "the handshake was cut off: dead publisher, or wrong key",
    }

    def __init__(self, address: Address) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        _common(self.socket)
        self.socket.setsockopt(zmq.CURVE_SERVERKEY, address.server_key)
        self.socket.setsockopt(zmq.CURVE_PUBLICKEY, address.client_public)
        self.socket.setsockopt(zmq.CURVE_SECRETKEY, address.client_secret)
        self.socket.setsockopt(zmq.MAXMSGSIZE, MAX_REPLY_BYTES)
        self.socket.setsockopt(zmq.RECONNECT_IVL, 100)
        self.socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1_000)
        self.refused = False  # our key: ZeroMQ does not try again
        self.monitor = self.socket.get_monitor_socket(sum(self._CAUSES))
        self.socket.connect(address.endpoint)

    def trouble(self) -> str:
        """Why the connection last failed, since the previous call; empty if it did not."""
        cause = ""
        while self.monitor.poll(0):
            event = zmq.Event(recv_monitor_message(self.monitor)["event"])
            self.refused |= event == zmq.EVENT_HANDSHAKE_FAILED_AUTH
            # A refusal is followed by a disconnection, which says less.
            cause = self._CAUSES.get(zmq.EVENT_HANDSHAKE_FAILED_AUTH if self.refused else event, cause)
        return cause

    def close(self, linger_ms: int = 0) -> None:
        """Waits up to `linger_ms` for what was sent to leave."""
        self.socket.disable_monitor()
        self.monitor.close(0)
        self.socket.close(linger_ms)
        self._context.term()


def _common(sock: zmq.Socket[bytes]) -> None:
    sock.setsockopt(zmq.LINGER, 0)
    sock.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    sock.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    # Heartbeats don't see it: they wait behind a bucket that the peer doesn't take.
    sock.setsockopt(zmq.TCP_MAXRT, STALLED_MS)
    sock.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)


def connections_that_fit() -> int:
    """Raises this process's limit of open files if it is low and may be raised; returns how many connections it bears."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limits = [limit for limit in (DESCRIPTORS, hard) if limit != resource.RLIM_INFINITY]
    if soft != resource.RLIM_INFINITY and soft < min(limits):
        soft = min(limits)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= DESCRIPTORS:
        return MAX_CONNECTIONS
    log.warning(
        "this process may open %d files, so at most %d receivers of weights can connect; raise the limit (ulimit -n) to %d",
        soft,
        soft // 4,
        DESCRIPTORS,
    )
    return soft // 4
