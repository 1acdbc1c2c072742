import json
import os
import select
import signal
import subprocess
import sys
import time

import pytest

from asyncrl import forks
from asyncrl.containment import refused
from asyncrl.errors import ConfigError, Unavailable
from asyncrl.reward.pool import RewardPool
from asyncrl.reward.results import Sample, Verdict

pytestmark = pytest.mark.slow


def sample(do, value=None):
    return Sample("test", do, json.dumps(value), "null")


def alive(pid):
    """Whether the process runs; a zombie does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.005)


def test_each_failure_costs_its_own_sample_only(function, tmp_path):
    batch = [sample("number", 0.5)] * 3
    for do in ("raise", "exit", "nan", "crash", "alarm", "loop", "orphan"):
        batch += [sample(do), sample("number", 2.0)]
    with RewardPool(function, deadline_s=1.5, log=tmp_path / "log") as pool:
        verdicts = pool.map(batch)
        restarts = pool.restarts
    assert verdicts[:3] == [Verdict("ok", 0.5)] * 3
    assert verdicts[4::2] == [Verdict("ok", 2.0)] * 7
    failed = dict(zip(("raise", "exit", "nan", "crash", "alarm", "loop", "orphan"), verdicts[3::2], strict=True))
    assert {do: v.status for do, v in failed.items() if v.status != "invalid"} == {"loop": "timeout"}
    assert all(v.reward is None for v in failed.values())
    assert "ValueError: bad answer" in failed["raise"].error
    assert "in do_raise" in failed["raise"].error
    assert failed["exit"].error == "process died: exit code 3"
    assert failed["crash"].error == "process died: SIGSEGV"
    assert failed["alarm"].error == "process died: SIGALRM"
    assert failed["orphan"].error == "process died: exit code 4"
    assert failed["loop"].error == "no score within reward.deadline_s=1.5"
    assert restarts == 5  # raise and nan leave their process alone


def test_an_alarm_left_running_does_not_hit_the_next_sample(function):
    with RewardPool(function) as pool:
        assert [v.status for v in pool.map([sample("leave_alarm"), sample("wait", 0.7)])] == ["ok", "ok"]
        assert pool.restarts == 0


def test_an_error_text_that_utf8_cannot_hold_is_still_a_verdict(function):
    with RewardPool(function) as pool:
        [verdict] = pool.map([sample("surrogate")])
        assert pool.restarts == 0
    assert verdict.status == "invalid"
    assert "surrogates not allowed" in verdict.error


def test_prints_go_to_the_log_and_break_no_frame(function, tmp_path):
    with RewardPool(function, log=tmp_path / "log") as pool:
        assert pool.map([sample("print"), sample("number", 1.0)]) == [Verdict("ok", 1.0)] * 2
    log = (tmp_path / "log").read_bytes()
    assert b"printed by the reward" in log
    assert b"descriptor one" in log
    assert b"from a subprocess" in log


def test_samples_behind_a_killed_one_keep_their_full_deadline(function):
    # A warm process takes many samples at once: those behind the endless one go to its successor.
    with RewardPool(function, deadline_s=2.0) as pool:
        pool.map([sample("number", 1.0)] * 200)
        verdicts = pool.map([sample("number", 1.0), sample("loop"), sample("wait", 1.1), sample("wait", 1.1)])
        assert [v.status for v in verdicts] == ["ok", "timeout", "ok", "ok"]
        assert pool.restarts == 1


def test_two_processes_score_at_the_same_time(function, tmp_path):
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    with RewardPool(function, processes=2, deadline_s=20.0) as pool:
        assert pool.map([sample("meet", [a, b]), sample("meet", [b, a])]) == [Verdict("ok", 1.0)] * 2


def test_one_process_scores_one_at_a_time(function, tmp_path):
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    with RewardPool(function, processes=1, deadline_s=1.0) as pool:
        first, second = pool.map([sample("meet", [a, b]), sample("meet", [b, a])])
        assert (first.status, second.status) == ("timeout", "ok")


def test_two_processes_share_sleep_bound_work_evenly(function):
    waits = [sample("wait", 0.1)] * 8
    with RewardPool(function, processes=1) as one, RewardPool(function, processes=2) as two:
        for _ in range(3):  # the machine may be busy with something else
            walls = []
            for pool in (one, two):
                start = time.monotonic()
                pool.map(waits)
                walls.append(time.monotonic() - start)
            assert walls[0] >= 0.8
            if walls[1] < 0.6:
                break
    assert walls[1] < 0.75 * walls[0]


@pytest.mark.usefixtures("plain_numbers")
def test_a_deadline_kills_what_the_reward_started(function, tmp_path):
    with RewardPool(function, deadline_s=1.5) as pool:
        [verdict] = pool.map([sample("child", str(tmp_path / "pid"))])
    assert verdict.status == "timeout"
    until(lambda: not alive(int((tmp_path / "pid").read_text())))


@pytest.mark.usefixtures("plain_numbers")
def test_close_leaves_no_process_even_in_mid_sample(function, tmp_path):
    pool = RewardPool(function, processes=2, deadline_s=60.0)
    with pool:
        pids = {int(v.reward) for v in pool.map([sample("pid")])}
        pool.submit([(0, sample("child", str(tmp_path / "a"))), (1, sample("child", str(tmp_path / "b")))])
        until(lambda: not pool.poll(0.01) and (tmp_path / "a").exists() and (tmp_path / "b").exists())
        pids |= {int((tmp_path / name).read_text()) for name in "ab"}
    assert pool.pending == 0
    until(lambda: not any(map(alive, pids)))


PARENT = """
import sys, json
from asyncrl.reward.pool import RewardPool
from asyncrl.reward.results import Sample
with RewardPool(sys.argv[1], deadline_s=600.0) as pool:
    [verdict] = pool.map([Sample("", "pid", "null", "null")])
    pool.submit([(0, Sample("", sys.argv[2], json.dumps(sys.argv[-1]), "null"))])
    pool.poll(0.0)
    print(int(verdict.reward), flush=True)
    while True:
        pool.poll(600.0)
"""


@pytest.mark.usefixtures("plain_numbers")
@pytest.mark.parametrize("do", ["loop", "regex"])
def test_a_hanging_process_dies_with_its_killed_parent(function, do):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, function, do], stdout=subprocess.PIPE, text=True)
    scoring = int(parent.stdout.readline())
    assert alive(scoring)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    until(lambda: not alive(scoring))


THREADED = """
import threading, time
threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()

def compute_score(*sample):
    return float(threading.active_count())
"""

ONCE = """
import os
if os.path.exists({mark!r}):
    os._exit(7)
open({mark!r}, "w").close()

def compute_score(*sample):
    os._exit(3)
"""


def test_a_function_that_cannot_be_loaded_is_fatal_and_not_respawned(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("import missing_dependency_xyz\n")
    pool = RewardPool(f"{path}:compute_score", processes=2)
    with pytest.raises(ConfigError, match="missing_dependency_xyz"), pool:
        pass
    assert pool.restarts == 0


@pytest.mark.parametrize(
    ("body", "error", "how"),
    [
        ("import os\nos._exit(7)\n", ConfigError, "exit code 7"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n", Unavailable, r"SIGKILL \(out of memory\?\)"),
    ],
    ids=["ends itself: fatal", "killed: not the function's fault"],
)
def test_a_process_that_ends_while_its_file_is_being_loaded(tmp_path, body, error, how):
    path = tmp_path / "ends.py"
    path.write_text(body)
    pool = RewardPool(f"{path}:compute_score")
    with pytest.raises(error, match=f"process died: {how} while its file was being loaded"), pool:
        pass


@pytest.mark.usefixtures("plain_numbers")
def test_a_process_that_died_while_it_had_nothing_to_do_costs_no_sample(function):
    with RewardPool(function) as pool:
        [verdict] = pool.map([sample("pid")])
        os.kill(int(verdict.reward), signal.SIGKILL)
        assert select.select([scorer._peer for scorer in pool._scorers], [], [], 20.0)[0]
        assert pool.map([sample("number", 1.0)]) == [Verdict("ok", 1.0)]
        assert pool.restarts == 1


def test_a_file_is_loaded_once_and_that_it_could_be_is_remembered(tmp_path):
    path = tmp_path / "once.py"
    path.write_text(ONCE.format(mark=str(tmp_path / "loaded")))
    with RewardPool(f"{path}:compute_score", processes=2) as pool:
        assert pool.map([sample("number")] * 3) == [Verdict("invalid", error="process died: exit code 3")] * 3
        until(lambda: not pool.poll(0.01) and all(scorer.ready for scorer in pool._scorers))
        pool._forks._forker.kill()
        with pytest.raises(Unavailable, match="exit code 7 while its file was being loaded"):
            until(lambda: pool.poll(0.01))


def test_code_that_leaves_threads_is_loaded_by_each_process(tmp_path):
    """A fork would not have its threads, nor end their locks."""
    path = tmp_path / "threaded.py"
    path.write_text(THREADED)
    with RewardPool(f"{path}:compute_score", processes=2) as pool:
        assert [verdict.reward for verdict in pool.map([sample("number")] * 3)] == [2.0] * 3


def test_threads_of_an_allocator_are_no_reason_to_load_twice(tmp_path):
    path = tmp_path / "arrow.py"
    path.write_text(f"import pyarrow\nopen({str(tmp_path / 'loads')!r}, 'a').write('x')\ncompute_score = lambda *sample: 1.0")
    with RewardPool(f"{path}:compute_score", processes=2) as pool:
        assert pool.map([sample("number")])[0].reward == 1.0
    assert (tmp_path / "loads").read_text() == "x"


@pytest.mark.usefixtures("contained")
def test_nothing_survives_its_deadline(function, fifo):
    """Neither a double fork in a session of its own, nor signals ignored, nor a C function that holds the GIL."""
    with RewardPool(function, deadline_s=0.5) as pool:
        first, second = pool.map([sample("flee", fifo.path), sample("number", 1.0)])
        fifo.wait_free()
        assert (first.status, second.status) == ("timeout", "ok")


@pytest.mark.usefixtures("contained")
def test_what_a_function_leaves_running_ends_with_its_process(function, fifo):
    with RewardPool(function) as pool:
        assert [v.status for v in pool.map([sample("leave", fifo.path), sample("number", 1.0)])] == ["ok", "ok"]
        fifo.wait_held()
        assert pool.restarts == 0
        assert pool.map([sample("exit")])[0].status == "invalid"
        fifo.wait_free()


@pytest.mark.usefixtures("contained")
def test_nothing_survives_a_killed_owner(function, fifo):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, function, "leave", fifo.path], stdout=subprocess.PIPE)
    fifo.wait_held()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    fifo.wait_free()


@pytest.mark.skipif(bool(refused()), reason="this machine gives no namespaces")
def test_processes_see_themselves_alone_and_have_numbers_of_their_own(function):
    with RewardPool(function) as pool, RewardPool(function) as other:
        assert pool.map([sample("seen")])[0].reward == 2.0  # and the keeper
        numbers = [one.map([sample("pid")])[0].reward for one in (pool, other)]
        assert pool.map([sample("exit")])[0].status == "invalid"
        numbers += [pool.map([sample("pid")])[0].reward]
    assert len(set(numbers)) == 3


@pytest.mark.usefixtures("contained")
def test_a_function_that_kills_its_keeper_costs_itself_alone(function):
    with RewardPool(function, deadline_s=1.0) as pool:
        first, second = pool.map([sample("kill_keeper"), sample("number", 1.0)])
        assert (first.status in ("invalid", "timeout"), second.status) == (True, "ok")


@pytest.mark.parametrize(
    ("do", "value", "error"),
    [
        ("close", None, "process died: exit code 1"),
        ("write", [255] * 64, "at once; at most 67,108,864 are read"),
        ("write", [0] * 7 + [1, 0xC1], "sent what can't be read"),
        ("memory", None, "MemoryError"),
    ],
    ids=["closes what is open", "a huge frame", "no frame", "memory"],
)
def test_what_a_function_may_break(function, do, value, error):
    with RewardPool(function, memory_bytes=4 << 30, deadline_s=5.0) as pool:
        first, second = pool.map([sample(do, value), sample("number", 1.0)])
        assert first.status == "invalid"
        assert error in first.error
        assert second.status == "ok"


def test_a_flooded_log_is_begun_anew(function, tmp_path, monkeypatch):
    monkeypatch.setattr(forks, "_LOG_BYTES", 1 << 20)
    log = tmp_path / "log"
    with RewardPool(function, deadline_s=30.0, log=log) as pool:
        pool.submit([(0, sample("flood"))])
        until(lambda: not pool.poll(0.01) and log.stat().st_size > 1 << 20)
        until(lambda: not pool.poll(0.01) and log.stat().st_size < 1 << 20)


def test_a_file_that_never_finishes_loading_is_fatal(tmp_path):
    path = tmp_path / "slow.py"
    path.write_text("while True: pass\n")
    pool = RewardPool(f"{path}:compute_score", start_timeout_s=0.5)
    with pytest.raises(ConfigError, match=r"not loaded after start_timeout_s=0\.5"), pool:
        pass


def test_samples_larger_than_a_pipe_go_through(function):
    big = Sample("x" * 300_000, "number", "1.0", "null")
    with RewardPool(function) as pool:
        assert pool.map([big] * 5) == [Verdict("ok", 1.0)] * 5


def test_poll_is_bounded_while_a_sample_runs(function):
    with RewardPool(function, deadline_s=60.0) as pool:
        pool.submit([("slow", sample("loop"))])
        start = time.monotonic()
        assert pool.poll(0.05) == []
        assert time.monotonic() - start < 5.0
        assert pool.pending == 1
        with pytest.raises(RuntimeError, match="1 pending"):
            pool.map([sample("number", 1.0)])


def test_no_descriptor_leaks(function, descriptors):
    before = descriptors()
    with RewardPool(function) as pool:
        pool.map([sample("exit")] * 3)
    pool.close()
    assert descriptors() <= before
