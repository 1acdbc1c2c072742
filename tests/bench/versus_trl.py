"""asyncrl against TRL's GRPOTrainer, side by side on this machine: `python tests/bench/versus_trl.py [--tasks …] [--score]`.

Both train the same warm policy on the same prompts and exact reward: 32 groups of 8 an update, one AdamW step each, float32.

    arithmetic     answers of 4 tokens                                     recipes/arithmetic.py
    long_tail      answers of 1 to 160 tokens, a log-normal few of them long     tests/bench/long_tail.py

Speed: `--rounds` times in turns, asyncrl and TRL with one and with two threads (its better one counts); samples and generated
tokens per second after a few updates, without start-up and without evaluations. With `--score`: wall clock from the first
update on to a held-out score, for three seeds; TRL's clock stands still while it is evaluated, asyncrl's goes on.
Run it on a quiet machine: everything shares its cores. It needs `pip install -e '.[bench]'`.
"""

import argparse
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

HERE = Path(__file__).resolve()
GROUPS, N, SKIPPED = 32, 8, 5  # SKIPPED: updates before the clock runs
RECIPES = {"arithmetic": HERE.parents[2] / "recipes" / "arithmetic.py", "long_tail": HERE.with_name("long_tail.py")}
TARGETS = {"arithmetic": 0.95, "long_tail": 0.6}
EVAL_EVERY = 10


class Pace(NamedTuple):
    """What a side made: per second, and the seconds until its held-out score was reached (None: it was not)."""

    samples_per_s: float
    tokens_per_s: float
    seconds_to_score: float | None


def load(recipe: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(recipe.stem, recipe)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pace(ends_s: list[float], lengths: list[float], evals: list[tuple[float, float]], target: float) -> Pace:
    """ends_s: when each update had ended, on a clock at 0 before the first. lengths: mean tokens of its samples. evals: when,
    and what score."""
    rate = GROUPS * N * (len(ends_s) - SKIPPED) / (ends_s[-1] - ends_s[SKIPPED - 1])
    reached = next((when for when, score in evals if score >= target), None)
    return Pace(rate, rate * statistics.fmean(lengths[SKIPPED:]), reached)


# ------------------------------------------------------------------------------------------------------------- asyncrl


def asyncrl(task: str, seed: int, updates: int, data: Path, eval_every: int) -> Pace:
    """`asyncrl run`, as a user starts it, with the recipe's own settings but for the size of an update."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(data, Path(folder) / task / "data")
        settings = [f"seed={seed}", f"total_steps={updates}", f"learner.batch_groups={GROUPS}", f"sampling.n={N}"]
        settings += [f"evaluation.freq={eval_every}", "checkpoint.save_freq=100000"]
        command = [sys.executable, "-m", "asyncrl.cli", "run", str(RECIPES[task]), "--runs-dir", folder, *settings]
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
        lines = [json.loads(line) for line in (Path(folder) / task / "metrics.jsonl").read_text().splitlines()]
    steps, evals = ([line for line in lines if line["kind"] == kind] for kind in ("step", "eval"))
    began = evals[0]["time"]  # of the weights before the first update, whose rollouts are being made by then
    ends_s = [line["time"] - began for line in steps]
    scores = [(line["time"] - began, line["eval/score"]) for line in evals]
    return pace(ends_s, [line["response_length/mean"] for line in steps], scores, TARGETS[task])


# ----------------------------------------------------------------------------------------------------------------- TRL


def trl(task: str, seed: int, updates: int, data: Path, threads: int) -> Pace:
    """The same by TRL, in a process of its own."""
    command = [sys.executable, str(HERE), "--trl", task, str(seed), str(updates), str(data), str(threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    return pace(*json.loads(done.stdout.splitlines()[-1]), TARGETS[task])


def rows(data: Path, split: str) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    if (file := data / f"{split}.parquet").exists():
        found: list[dict[str, Any]] = pq.read_table(file).to_pylist()
    else:
        found = [json.loads(line) for line in (data / f"{split}.jsonl").read_text().splitlines()]
    return [{"prompt": row["prompt"], "answer": row["reward_model"]["ground_truth"]} for row in found]


def trl_side(task: str, seed: int, updates: int, data: Path, threads: int) -> tuple[list[float], list[float], list[Any]]:
    """What `pace` takes."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(threads)
    module = load(RECIPES[task])
    recipe, score = module.recipe, module.compute_score
    spec, longest = recipe.learner, recipe.sampling.max_response_length
    model = AutoModelForCausalLM.from_pretrained(data / "warm", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(data / "warm", padding_side="left")
    held_out = rows(data, "heldout")

    def reward(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
        texts = [completion[0]["content"] for completion in completions]
        return [score("", text, right) for text, right in zip(texts, answer, strict=True)]

    @torch.no_grad()
    def evaluate() -> float:
        texts = [tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True) for row in held_out]
        asked = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        made = model.generate(**asked, do_sample=False, max_new_tokens=longest, pad_token_id=tokenizer.pad_token_id)
        answers = tokenizer.batch_decode(made[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)
        return statistics.fmean(score("", text, row["answer"]) for text, row in zip(answers, held_out, strict=True))

    ends_s: list[float] = []
    scores: list[tuple[float, float]] = []
    lengths: list[float] = []

    class Clock(TrainerCallback):
        """Stands still during evaluations."""

        began = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            scores.append((0.0, evaluate()))
            self.began = time.monotonic()

        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            ends_s.append(time.monotonic() - self.began)
            if state.global_step % EVAL_EVERY == 0:
                before = time.monotonic()
                scores.append((ends_s[-1], evaluate()))
                self.began += time.monotonic() - before

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "completions/mean_length" in logs:
                lengths.append(logs["completions/mean_length"])

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            seed=seed,
            max_steps=updates,
            per_device_train_batch_size=GROUPS * N,
            num_generations=N,
            max_completion_length=longest,
            temperature=recipe.sampling.temperature,
            learning_rate=spec.lr,
            adam_beta1=spec.betas[0],
            adam_beta2=spec.betas[1],
            warmup_steps=spec.warmup_steps,
            lr_scheduler_type="cosine",
            max_grad_norm=spec.max_grad_norm,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_list(rows(data, "train")),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        trainer.train()
    return ends_s, lengths, scores


# --------------------------------------------------------------------------------------------------------------- tables


def made_data(task: str, seed: int, folder: Path) -> Path:
    """The task's data and warm policy, which both sides begin with."""
    from msgspec.structs import replace

    module = load(RECIPES[task])
    run = folder / f"{task}-{seed}"
    (run / "data").mkdir(parents=True, exist_ok=True)
    module.prepare(replace(module.recipe, seed=seed), run)
    return run / "data"


def show_speed(task: str, rounds: int, updates: int, trl_updates: int, folder: Path) -> None:
    data, found = made_data(task, 0, folder), []
    for number in range(rounds):
        ours = asyncrl(task, 0, updates, data, eval_every=updates)
        theirs = max((trl(task, 0, trl_updates, data, threads) for threads in (1, 2)), key=lambda side: side.samples_per_s)
        found.append((ours, theirs))
        each = [f"{side.samples_per_s:,.0f} samples/s, {side.tokens_per_s:,.0f} tokens/s" for side in (ours, theirs)]
        print(f"{task}, round {number + 1}: asyncrl {each[0]}; TRL {each[1]}", flush=True)
    ratio = statistics.median(ours.samples_per_s / theirs.samples_per_s for ours, theirs in found)
    tokens = statistics.median(ours.tokens_per_s / theirs.tokens_per_s for ours, theirs in found)
    print(f"{task}: asyncrl ÷ TRL, median of {rounds}: {ratio:.2f} × samples/s, {tokens:.2f} × tokens/s", flush=True)


def show_score(task: str, updates: int, threads: int, folder: Path) -> None:
    ratios = []
    for seed in range(3):
        data = made_data(task, seed, folder)
        ours, theirs = asyncrl(task, seed, updates, data, EVAL_EVERY), trl(task, seed, updates, data, threads)
        times = [f"{side.seconds_to_score:.1f} s" if side.seconds_to_score else "not reached" for side in (ours, theirs)]
        print(f"{task}, seed {seed}, held-out {TARGETS[task]}: asyncrl {times[0]}, TRL {times[1]}", flush=True)
        if ours.seconds_to_score and theirs.seconds_to_score:
            ratios.append(theirs.seconds_to_score / ours.seconds_to_score)
    if ratios:
        print(f"{task}: asyncrl is there {statistics.median(ratios):.2f} × sooner (median of {len(ratios)} seeds)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=40, help="of asyncrl for the speed; TRL makes half as many")
    parser.add_argument("--score", action="store_true", help="also the time to a held-out score, of three seeds")
    parser.add_argument("--score-updates", type=int, default=200, help="over which the schedules run")
    parser.add_argument("--threads", type=int, default=2, help="of TRL, for the score")
    parser.add_argument("--trl", nargs=5, metavar=("TASK", "SEED", "UPDATES", "DATA", "THREADS"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.trl:
        task, seed, updates, data, threads = asked.trl
        print(json.dumps(trl_side(task, int(seed), int(updates), Path(data), int(threads))))
        return
    with tempfile.TemporaryDirectory() as folder:
        for task in asked.tasks:
            show_speed(task, asked.rounds, asked.updates, max(SKIPPED + 5, asked.updates // 2), Path(folder))
            if asked.score:
                show_score(task, asked.score_updates, asked.threads, Path(folder))


if __name__ == "__main__":
    main()
