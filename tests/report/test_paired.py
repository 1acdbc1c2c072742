"""A run and its fork beside each other, by hand."""

from asyncrl.report.paired import paired_lines


def test_updates_are_paired_and_those_from_the_log_stand_apart() -> None:
    source = {update: {"reward/mean": 0.5, "eval/score": 0.1 * update} for update in (3, 4, 5, 6)}
    fork = {
        3: {"reward/mean": 0.5, "training/replayed": 1.0},
        4: {"reward/mean": 0.6, "eval/score": 0.5, "training/replayed": 0.0},
        5: {"reward/mean": 0.8, "training/replayed": 0.0},
        9: {"reward/mean": 7.0, "training/replayed": 0.0},  # the source was never there
    }
    head, *lines = paired_lines(source, fork)
    assert head.split() == ["fork", "−", "source", "updates", "source", "fork", "difference"]
    assert [line.split() for line in lines] == [
        ["reward/mean", "1", "log", "0.5", "0.5", "+0", "±", "inf"],
        ["reward/mean", "2", "live", "0.5", "0.7", "+0.2", "±", "0.1"],  # 0.1 and 0.3: s = 0.1414, over the root of 2
        ["eval/score", "1", "live", "0.4", "0.5", "+0.1", "±", "inf"],
    ]
    assert paired_lines(source, {}) == [head]
