"""Every algorithm on recipes/arithmetic.py: `python tests/bench/algorithms.py [--seeds 1] [--runs-dir runs/algorithms]`.

Prints one row each: held-out exact match before and after 200 updates (or what the row says), and the wall clock. Batches are
trained in two minibatches, so that ratios leave 1 and clips have something to do. Otherwise settings are those of the recipe. A
run takes about a minute; a finished one is not run again.
"""

import argparse
from pathlib import Path

from runs import RECIPES, Finished, Settings, run, spread, table

TWO_STEPS = ("learner.mini_batch_groups=16", "learner.lr=1.5e-4")
PREFERENCES = ("learner.lr=1e-4",)  # the reference holds back less than a clip does; at 2.5e-4 scores dip on the way


def arithmetic(label: str, *overrides: str, steps: tuple[str, ...] = TWO_STEPS) -> Settings:
    return Settings(label, RECIPES / "arithmetic.py", (*steps, *overrides))


ALGORITHMS = [
    Settings("PPO with a critic", RECIPES / "arithmetic_ppo.py"),
    arithmetic("GRPO"),
    arithmetic(
        "Dr. GRPO",
        "algorithm.adv_estimator=dr_grpo",
        "algorithm.loss_agg=seq-mean-token-sum-norm",
        "algorithm.loss_scale_factor=4",
    ),
    arithmetic("RLOO", "algorithm.adv_estimator=rloo"),
    arithmetic("REINFORCE++", "algorithm.adv_estimator=reinforce_plus_plus"),
    arithmetic("ReMax", "algorithm.adv_estimator=remax"),
    arithmetic(
        "GSPO",
        "algorithm.policy_loss=gspo",
        "algorithm.clip_ratio=0.03",
        "algorithm.clip_ratio_high=0.04",
        "algorithm.loss_agg=seq-mean-token-mean",
    ),
    arithmetic("CISPO", "algorithm.policy_loss=cispo", "algorithm.clip_ratio_high=0.2"),  # its own, 4, would never bind here
    arithmetic(
        "DAPO's settings",
        "algorithm.adv_estimator=grpo",
        "algorithm.clip_ratio_high=0.28",
        "algorithm.loss_agg=token-mean",
        "sampling.keep=varied",
        "sampling.max_response_length=8",  # answers are 4 tokens long: none that is right is punished for its length
        "reward.shaping.overlong_buffer=2",
        "total_steps=80",  # the better the policy, the more groups it takes to fill a batch with varied ones
    ),
    arithmetic("online DPO", "algorithm.policy_loss=dpo", steps=PREFERENCES),
    arithmetic("KTO", "algorithm.policy_loss=kto", steps=PREFERENCES),
]


def row(settings: Settings, finished: list[Finished]) -> list[str]:
    first, last = ([getattr(run.result, name) or 0.0 for run in finished] for name in ("first_score", "last_score"))
    soon = [
        next(line["step"] for line in run.evals if line["eval/score"] >= 0.9 * after)
        for run, after in zip(finished, last, strict=True)
    ]
    return [
        settings.label,
        spread(first),
        spread(last),
        spread(after - before for before, after in zip(first, last, strict=True)),
        spread(soon, 0),
        spread((run.result.wall_s for run in finished), 0),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/algorithms"))
    arguments = parser.parse_args()
    rows = [
        row(settings, [run(settings, seed, arguments.runs_dir.resolve()) for seed in range(arguments.seeds)])
        for settings in ALGORITHMS
    ]
    print(f"\nheld-out exact match, {arguments.seeds} seed(s): mean [least, most]\n")
    print(table(["algorithm", "before", "after", "gain", "updates to nine tenths of that", "wall clock, s"], rows))


if __name__ == "__main__":
    main()
