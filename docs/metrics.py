"""Writes docs/metrics.md: every metric, from asyncrl/report/names.csv.

python docs/metrics.py            # writes the page
python docs/metrics.py --check    # exits with 1 where the page is stale, and writes nothing
"""

import re
import sys
from itertools import groupby
from pathlib import Path

from asyncrl.report.names import table

PAGE = Path(__file__).with_name("metrics.md")
HEAD = """\
# Metrics: every figure of a run

<!-- Written by `python docs/metrics.py`, from asyncrl/report/names.csv. Do not edit. -->

A run writes them to `metrics.jsonl` in its folder, one flat line per update, evaluation and (every 5 s) state of the actors,
and to its [trackers](deployments.md#trackers); in Prometheus `reward/mean` is `ray_asyncrl_reward_mean`. Where another project
has the figure, its name stands beside: *same* if it is ours. Names that verl, or else TRL, made known are used as they are.

`{a,b}` are several names, `<what>` is what the run has there: a data source, a part of the reward, a lag in updates. Means over
tokens are over those that were trained, unless said otherwise; all figures are equal on all ranks, but for timings, which are
those of the leading rank. Time per step is `timing_s/unaccounted` with what it names, to the microsecond. (What models on ranks
of their own take, `deploy.critic` and `deploy.reference`, is taken beside, and in no sum.)
"""
ABOUT = {
    "update": "## Updates\n\nLines of kind `step`.",
    "evaluation": "## Evaluations\n\nLines of kind `eval`. Episodes add `eval/num_turns/…`, `eval/tools/…` and "
    "`eval/episode/…`; one of several settings has its name behind `eval/`: `eval/<setting>/score`.",
    "actors": "## Actors\n\nLines of kind `actors`: what every actor says of itself. In trackers their names begin with "
    "`actors/`.",
    "warm start": "## Warm start\n\nLines of `asyncrl sft`.",
}


def page() -> str:
    """The whole page as Markdown."""
    parts = [HEAD]
    for kind, rows in groupby(table(), key=lambda row: row.kind):
        lines = [ABOUT[kind], "", "| metric | unit | meaning | verl | TRL | prime-rl |", "|---|---|---|---|---|---|"]
        for row in rows:
            elsewhere = (_name(text) for text in (row.verl, row.trl, row.prime_rl))
            meaning = row.meaning.replace("*", r"\*").replace("|", r"\|")
            lines.append(f"| `{row.name}` | {row.unit} | {meaning} | {' | '.join(elsewhere)} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _name(text: str) -> str:
    """What another project calls it: words with a slash or an underscore are names."""
    return re.sub(r"[\w<>@{,}/-]*[/_][\w<>@{,}/-]*", lambda name: f"`{name[0]}`", text)


def main(arguments: list[str]) -> int:
    """Writes the page, or with --check compares it. Returns the exit status."""
    written, found = page(), PAGE.read_text() if PAGE.exists() else ""
    if written == found:
        return 0
    if "--check" in arguments:
        print(f"{PAGE} is stale: run `python docs/metrics.py`", file=sys.stderr)
        return 1
    PAGE.write_text(written)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
