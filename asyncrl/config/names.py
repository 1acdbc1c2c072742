"""Common settings of verl and TRL beside asyncrl's: what unknown overrides are answered with, and docs/comparison.md lists."""

import csv
from pathlib import Path

# Each row: the names in verl, in TRL and here, several with a space between. Behind ours may stand what is different about it.
TABLE = Path(__file__).with_name("names.csv")


def elsewhere(path: str) -> str:
    """`; verl calls it that: here it is …` for a name of another project's, empty for any other. path: as on a command line."""
    with TABLE.open() as file:
        for row in csv.DictReader(file):
            for project in ("verl", "TRL"):
                if path.lstrip("+") in row[project].split():  # verl's overrides add a key with a plus
                    return f"; {project} calls it that: here it is {row['asyncrl']}"
    return ""
