"""Competition mathematics (MATH, Hendrycks et al. 2021): answers in a box, compared as mathematics.

It needs `pip install 'asyncrl[math]'`. The files are those of MATH-lighteval on Hugging Face, or others with `problem` and
`solution` in a folder: parquet or JSONL; where there is an `answer` too (as in MATH-500) that is compared with. It is not
called math.py: a recipe's folder joins the import path, where that would hide Python's own module.

    asyncrl run recipes/competition_math.py --deploy deploy/gpu-2.yaml
    asyncrl run recipes/competition_math.py 'arguments={source: /data/MATH}' model.path=/models/Qwen3-1.7B --dry-run
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from gsm8k import make_prompts
from gsm8k import recipe as gsm8k

from asyncrl import Recipe
from asyncrl.config import ModelSpec, RewardSpec, SamplingSpec

recipe = msgspec.structs.replace(
    gsm8k,
    name="competition_math",
    prepare="competition_math.py:prepare",
    arguments={"source": "DigitalLearningGmbH/MATH-lighteval"},
    model=ModelSpec(path="Qwen/Qwen3-1.7B"),
    reward=RewardSpec(function="asyncrl.reward.verify:math"),
    sampling=SamplingSpec(n=8, max_response_length=3072),
)

INSTRUCTION = "Let's think step by step and output the final answer within \\boxed{}."


def prepare(recipe: Recipe, run_dir: Path) -> None:
    """Makes `{run}/data`: train.parquet and test.parquet, if they are not there already from the same source."""
    make_prompts(recipe, run_dir, "data/*.parquet", problem)


def problem(row: Mapping[str, Any]) -> tuple[str, str]:
    """The problem as it is asked, and its answer, or the whole solution that holds it in a box."""
    return f"{row['problem']} {INSTRUCTION}", row.get("answer") or row["solution"]
