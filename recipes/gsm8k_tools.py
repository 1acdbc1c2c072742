"""GSM8K with a Python tool: the policy may run programs, over four turns at most, until it answers without one.

Each program is a process of its own within the episode's: one without end, or one that eats memory, costs its call, which the
policy reads as an error. The last answer alone is compared with the right number: what a program printed answers nothing.
Data as for recipes/gsm8k.py. Any model does whose chat template shows tools and that writes calls as Qwen and Hermes do.

    asyncrl run recipes/gsm8k_tools.py --deploy deploy/gpu-1.yaml
    asyncrl run recipes/gsm8k_tools.py 'arguments={source: /data/gsm8k}' model.path=Qwen/Qwen2.5-0.5B-Instruct --dry-run
"""

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from gsm8k import make_prompts
from gsm8k import problem as plain
from gsm8k import recipe as gsm8k

from asyncrl import Recipe
from asyncrl.config import EpisodeSpec, ModelSpec, RewardSpec, SamplingSpec
from asyncrl.reward import verify

recipe = msgspec.structs.replace(
    gsm8k,
    name="gsm8k_tools",
    prepare="gsm8k_tools.py:prepare",
    model=ModelSpec(path="Qwen/Qwen2.5-1.5B-Instruct"),
    reward=RewardSpec(function="gsm8k_tools.py:last_answer"),
    sampling=SamplingSpec(n=8, max_response_length=512),  # of a turn
    episode=EpisodeSpec(tools=("gsm8k_tools.py:python",), max_turns=4, max_tokens=1024, step_deadline_s=30.0),
)

INSTRUCTION = "Compute with the python tool where that helps."
LONGEST_S, MEMORY, PRINTED, SHOWN = 5.0, 1 << 30, 1 << 20, 1000  # of a program: seconds, bytes, bytes; characters of the end
_PROGRAM = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, {MEMORY}))
resource.setrlimit(resource.RLIMIT_FSIZE, ({PRINTED}, {PRINTED}))
exec(compile(sys.stdin.read(), "program", "exec"), {{"__name__": "__main__"}})
"""


def python(code: str) -> str:
    """Runs a Python program and returns what it printed.

    Args:
        code: The program. It prints its results.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as output, tempfile.TemporaryFile("w+", errors="replace") as errors:
        try:
            command = [sys.executable, "-I", "-c", _PROGRAM]
            ended = subprocess.run(command, input=code, stdout=output, stderr=errors, text=True, timeout=LONGEST_S)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"the program did not end within {LONGEST_S:g} seconds") from None
        output.seek(0)
        errors.seek(0)
        printed, error = output.read().strip()[-SHOWN:], errors.read().strip()[-SHOWN:]
    if ended.returncode:
        raise RuntimeError(error.rpartition("\n")[2] or f"the program ended with exit code {ended.returncode}")
    return printed or "(the program printed nothing)"


def last_answer(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None, *, episode: Mapping[str, Any]
) -> dict[str, Any]:
    """GSM8K's verifier on the answer that ended the episode."""
    answer = episode["messages"][-1]["content"] if episode["stop"] == "done" else ""
    return verify.gsm8k(data_source, answer, ground_truth)


def prepare(recipe: Recipe, run_dir: Path) -> None:
    """Makes `{run}/data`: train.parquet and test.parquet, if they are not there already from the same source."""
    make_prompts(recipe, run_dir, "main/*", problem)


def problem(row: Mapping[str, Any]) -> tuple[str, str]:
    """The question as it is asked, and the number that is right."""
    question, truth = plain(row)
    return f"{question} {INSTRUCTION}", truth
