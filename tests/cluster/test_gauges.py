"""Every metric of the table is one that Ray takes."""

import re

from asyncrl.cluster.gauges import RayGauges
from asyncrl.report.names import table
from asyncrl.report.trackers import RunFacts


def test_ray_takes_every_row_of_the_table() -> None:
    gauges = RayGauges()
    gauges.start(RunFacts(name="run", run_dir="nowhere"))
    for row in table():
        gauges.log({re.sub(r"<\w+>", "1", name): 0.5 for name in row.each()}, 1, 0.0)
