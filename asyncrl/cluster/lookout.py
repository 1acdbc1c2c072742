"""Looks at a run's sentinels while it goes on, in a thread of its own: the run never waits for a query.

metrics of the driver's records ─► note ─► (thread: tables, queries) ─► settle ─► a checkpoint, or the end of the run
rollouts: from the log's end ───────────────┘            └─► sentinels.jsonl, a warning

A sentinel fires when its condition begins to hold, and again only when it has been false in between, also where the run was
resumed. Updates that a restore trains again are looked at again only by sentinels that have not fired since.
"""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from asyncrl.config import SentinelSpec
from asyncrl.disk import naming_full_disk
from asyncrl.errors import DataError, SentinelFired
from asyncrl.replay.log.recent import COLUMNS, RecentRollouts
from asyncrl.report.sentry import Database, Fired, QueryError, SentinelQuery
from asyncrl.rundir import RunDir, redact
from asyncrl.types import Record

log = logging.getLogger(__name__)
BACKLOG = 1000  # records that wait to be looked at; where queries are slower than updates, older ones are passed over
DRAIN_S = 60.0  # the longest that the end of a run waits for its last looks


class _Watched:
    """A sentinel, and how it stands."""

    def __init__(self, query: SentinelQuery) -> None:
        self.query, self.spec = query, query.spec
        self.held = 0  # looks in a row at which it held
        self.seen = 0  # records that there were at its last look
        self.raised = False  # it has fired, and holds since
        self.settled = -1  # update at which it fired, or was over, last: up to there it is looked at no more
        self.looked = -1  # update of its last look
        self.problem = ""  # why it could not be looked at, as it was told last

    def takes(self, update: int, seen: int, holds: bool) -> bool:
        """Notes a look at an update. Whether it has fired, or is over, with this one."""
        went_on = update >= self.looked  # else a restore went back
        self.held = (self.held * went_on + 1) * holds
        self.looked, self.seen = update, seen
        if self.raised == holds or 0 < self.held < self.spec.patience:
            return False
        self.raised, self.settled = holds, update
        return True


class Lookout:
    """The sentinels of a run. `note` and `settle` are called by the thread that leads it."""

    def __init__(self, sentinels: Mapping[str, SentinelSpec], paths: RunDir) -> None:
        self._paths = paths
        self._watched = {name: _Watched(SentinelQuery(name, spec, COLUMNS)) for name, spec in sentinels.items()}
        queries = [watched.query for watched in self._watched.values()]
        windows = [query.spec.window for query in queries if query.of_rollouts]
        columns = sorted({column for query in queries for column in query.columns})
        longest = None if None in windows else max((window for window in windows if window is not None), default=0)
        self._rollouts = RecentRollouts(paths.replay, columns, longest) if windows else None
        self._metrics = {metric for query in queries for metric in query.metrics}
        self._updates: dict[int, dict[str, Any]] = {}  # what is asked of the metrics of each
        self._kept = self._newest = 0  # records so far, and the update of the newest of a step
        self._due: deque[Record | None] = deque(maxlen=BACKLOG)
        self._told: deque[Fired] = deque()
        self._changed = threading.Condition()
        self._working = self._closed = False
        self._recall()
        self._thread = threading.Thread(target=self._run, name="sentinels", daemon=True)
        self._thread.start()

    def note(self, records: Sequence[Record]) -> None:
        """Takes what is new. Waits for nothing."""
        with self._changed:
            self._due.extend(records)
            self._changed.notify_all()

    def settle(self, save: Callable[[], None], fired: dict[str, int]) -> None:
        """Does what those that fired ask for. save: begins a checkpoint. fired: gets the update of each. Raises SentinelFired
        for one that stops."""
        while self._told:
            told = self._told.popleft()
            fired[told.sentinel] = told.step
            if told.then == "checkpoint":
                save()
            elif told.then == "stop":
                raise SentinelFired(redact(f"{told}\n  its rows are in {self._paths.sentinels}"))

    def drain(self) -> None:
        """Waits until all that was noted is looked at, each sentinel at the newest update, for DRAIN_S at most."""
        with self._changed:
            self._due.append(None)
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: self._closed or not (self._due or self._working), DRAIN_S):
                log.warning("sentinels: the last looks take longer than %g s, and are left out", DRAIN_S)

    def close(self) -> None:
        """Ends the thread when the look under way has ended. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    # ------------------------------------------------------------------------------------- what was before this start

    def _recall(self) -> None:
        """Fired sentinels of an earlier start; one whose condition has changed since begins anew."""
        path = self._paths.sentinels
        if not path.exists():
            return
        lines = path.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):  # cut short by a kill
            os.truncate(path, sum(map(len, lines[:-1])))
            lines.pop()
        for line in lines:
            told = msgspec.json.decode(line, type=Fired)
            watched = self._watched.get(told.sentinel)
            if watched is not None and watched.spec.when == told.when:
                watched.raised, watched.settled = told.event == "fired", told.step
        for name, watched in self._watched.items():
            if watched.raised:
                log.warning(
                    "sentinel %s has fired at update %d: it will again only when it was false since", name, watched.settled
                )

    def _read_metrics(self) -> None:
        """The updates of earlier starts."""
        if not self._paths.metrics.exists():
            return
        with self._paths.metrics.open("rb") as file:
            for line in file:
                if line.endswith(b"\n") and (record := msgspec.json.decode(line))["kind"] in ("step", "eval"):
                    self._keep(record["step"], record["incarnation"], record["time"], record)

    # ------------------------------------------------------------------------------------------------ the thread

    def _run(self) -> None:
        try:
            self._read_metrics()
            with closing(Database()) as database:
                while self._next(database):
                    pass
        except Exception:
            log.exception("sentinels: no longer looked at, as this went wrong")
        finally:
            with self._changed:
                self._closed, self._working = True, False
                self._changed.notify_all()

    def _next(self, database: Database) -> bool:
        """Takes one record, or the mark of the end; waits for it. False: closed."""
        with self._changed:
            self._working = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._due or self._closed)
            if self._closed:
                return False
            record, self._working = self._due.popleft(), True
        if record is None:
            self._look(database, self._newest, last=True)
            return True
        self._keep(record.version.update, record.version.incarnation, record.time, record.metrics)
        if record.kind == "step":
            self._newest = record.version.update
            self._look(database, self._newest)
        return True

    def _keep(self, update: int, incarnation: int, time: float, metrics: Mapping[str, Any]) -> None:
        own = self._updates.setdefault(update, {"step": update})
        own |= {"incarnation": incarnation, "time": time, **{name: metrics[name] for name in self._metrics & metrics.keys()}}
        self._kept += 1

    def _look(self, database: Database, update: int, last: bool = False) -> None:
        """Those whose turn it is at this update; the last time all that have not seen everything."""
        rollouts: pa.Table | None = None
        for watched in self._watched.values():
            due = watched.seen < self._kept if last else update % watched.spec.every == 0
            if not due or update <= watched.settled:
                continue
            try:
                if watched.query.of_rollouts and rollouts is None and self._rollouts is not None:
                    rollouts = self._rollouts.table(update)
                count, rows = database.holds(watched.query, self._tables(watched.query, update, rollouts))
            except (QueryError, DataError) as error:
                if str(error) != watched.problem:
                    log.warning("sentinel %s could not be looked at: %s", watched.query.name, error)
                watched.problem = str(error)
                continue
            if watched.takes(update, self._kept, count > 0):
                self._tell(watched, update, count, rows)

    def _tables(self, query: SentinelQuery, update: int, rollouts: pa.Table | None) -> dict[str, pa.Table]:
        first = -1 if query.spec.window is None else update - query.spec.window
        tables = {"updates": query.updates([self._updates[u] for u in sorted(self._updates) if first < u <= update], update)}
        if rollouts is not None and query.of_rollouts:
            tables["rollouts"] = rollouts.filter(pc.greater(rollouts["trained_update"], first)).select(query.columns)
        return tables

    def _tell(self, watched: _Watched, update: int, count: int, rows: list[dict[str, Any]]) -> None:
        """Writes down that it fired, or that it is over."""
        told = Fired(
            time=time.time(),
            step=update,
            sentinel=watched.query.name,
            event="fired" if count else "over",
            then=watched.spec.then,
            when=watched.spec.when,
            count=count,
            rows=rows,
        )
        with naming_full_disk(self._paths.sentinels), self._paths.sentinels.open("ab") as file:
            file.write(told.encode())
        if not count:
            log.info("sentinel %s is over at update %d", told.sentinel, update)
            return
        log.warning("%s", redact(str(told)))
        self._told.append(told)
