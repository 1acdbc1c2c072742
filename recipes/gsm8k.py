"""Grade-school mathematics (GSM8K, Cobbe et al. 2021) with a Qwen3 of 0.6B: the recipe to start from with a real model.

`prepare` makes chat prompts of the public data set's files, which it takes from Hugging Face, or from a folder that holds
them: parquet or JSONL with `question` and `answer`, in whatever subfolder.

    asyncrl run recipes/gsm8k.py --deploy deploy/gpu-2.yaml
    asyncrl run recipes/gsm8k.py 'arguments={source: /data/gsm8k}' model.path=/models/Qwen3-0.6B --dry-run
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from asyncrl import Recipe
from asyncrl.config import DataSpec, EvaluationSpec, LearnerSpec, ModelSpec, RewardSpec, SamplingSpec, StalenessSpec
from asyncrl.errors import DataError

recipe = Recipe(
    name="gsm8k",
    prepare="gsm8k.py:prepare",
    arguments={"source": "openai/gsm8k"},
    model=ModelSpec(path="Qwen/Qwen3-0.6B"),
    data=DataSpec(files=("{run}/data/train.parquet",), max_prompt_length=512),
    reward=RewardSpec(function="asyncrl.reward.verify:gsm8k"),
    sampling=SamplingSpec(n=8, max_response_length=1024),
    staleness=StalenessSpec(max_lag=8),
    learner=LearnerSpec(batch_groups=64, lr=1e-6),
    evaluation=EvaluationSpec(files=("{run}/data/test.parquet",), freq=20),
    total_steps=500,
)

INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'


def prepare(recipe: Recipe, run_dir: Path) -> None:
    """Makes `{run}/data`: train.parquet and test.parquet, if they are not there already from the same source."""
    make_prompts(recipe, run_dir, "main/*", problem)


def problem(row: Mapping[str, Any]) -> tuple[str, str]:
    """The question as it is asked, and the number that is right."""
    return f"{row['question']} {INSTRUCTION}", row["answer"].rpartition("####")[2].strip()


def make_prompts(recipe: Recipe, run_dir: Path, files: str, problem: Callable[[Mapping[str, Any]], tuple[str, str]]) -> None:
    """Makes train.parquet and test.parquet in verl's schema. files: those that are fetched where the source is on Hugging Face.
    problem: the text and the ground truth of a row."""
    from asyncrl.prompts.reading import records
    from asyncrl.prompts.tables import write_table
    from asyncrl.rundir import atomic_file, write_atomic

    source, made = str(recipe.arguments["source"]), run_dir / "data" / "made.json"
    if made.is_file() and json.loads(made.read_text()) == source:
        return
    made.unlink(missing_ok=True)
    for split in ("train", "test"):
        rows = []
        for file in _files(source, split, files):
            for where, row in records(file):
                try:
                    text, truth = problem(row)
                except KeyError as error:
                    raise DataError(f"{where}: no column {error}; columns found: {', '.join(row)}") from None
                rows.append(
                    {
                        "data_source": recipe.name,
                        "prompt": [{"role": "user", "content": text}],
                        "reward_model": {"style": "rule", "ground_truth": truth},
                        "extra_info": {"split": split, "index": len(rows)},
                    }
                )
        with atomic_file(run_dir / "data" / f"{split}.parquet") as beside:
            write_table(rows, beside, source)
    write_atomic(made, json.dumps(source))


def _files(source: str, split: str, files: str) -> list[Path]:
    """The files of a split, in a folder here or out of Hugging Face's cache, into which they are fetched."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(source, repo_type="dataset", allow_patterns=files))
        except Exception as error:  # of its HTTP library, or what it makes of them
            raise DataError(
                f"arguments.source={source!r} is no folder here, and can't be fetched from Hugging Face "
                f"({type(error).__name__}: {error}); name a folder with the data set's files: 'arguments={{source: FOLDER}}'"
            ) from error
    for kind in ("parquet", "jsonl"):
        if found := sorted(folder.rglob(f"{split}*.{kind}")):
            return [file for file in found if "socratic" not in file.parts]  # GSM8K's other form
    raise DataError(f"{folder} holds neither {split}*.parquet nor {split}*.jsonl; name the folder of the data set's files")
