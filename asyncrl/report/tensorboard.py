"""TensorBoard: event files in the run directory's `tensorboard`. Imports no torch."""

import os
import time
from collections.abc import Mapping
from typing import Any

from asyncrl.report.trackers import RunFacts
from asyncrl.rundir import RunDir


class TensorBoard:
    """Writes plain scalars, which readers without TensorBoard's plugins know too; nothing before the first."""

    def __init__(self) -> None:
        self._records: Any = None

    def start(self, facts: RunFacts) -> None:
        self._folder = RunDir(facts.run_dir).tensorboard

    def log(self, metrics: Mapping[str, float], step: int, time: float) -> None:
        # Here, as they take 0.2 s to import. torch's own writer would import torch; TensorBoard's write in threads.
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        if self._records is None:
            self._records = self._open()
            self._records.write(Event(wall_time=time, file_version="brain.Event:2").SerializeToString())
        self._records.write(Event(wall_time=time, step=step, summary=Summary(value=values)).SerializeToString())
        self._records.flush()

    def close(self) -> None:
        if self._records is not None:
            self._records.close()

    def _open(self) -> Any:
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{os.uname().nodename}.{os.getpid()}"
        return RecordWriter((self._folder / name).open("ab"))
