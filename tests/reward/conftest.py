import pytest

# A reward whose behaviour the response chooses; ground_truth is its argument.
SOURCE = '''
import os, re, signal, subprocess, sys, time

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return globals()["do_" + solution_str](ground_truth)

def do_number(value):
    return value

def do_nan(value):
    return float("nan")

def do_raise(value):
    raise ValueError("bad answer")

def do_surrogate(value):
    raise ValueError("\\ud800")

def do_loop(value):
    while True:
        pass

def do_regex(value):
    re.match("(a+)+$", "a" * 60 + "b")  # holds the GIL for years

def do_exit(value):
    os._exit(3)

def do_crash(value):
    os.kill(os.getpid(), signal.SIGSEGV)

def do_alarm(value):
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    while True:
        pass

def do_leave_alarm(value):
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    return 1.0

def do_wait(value):
    time.sleep(value)
    return 1.0

def do_print(value):
    print("printed by the reward")
    os.write(1, b"\\x00\\xff written to descriptor one\\n")
    sys.stdout.flush()
    subprocess.run(["echo", "from a subprocess"])
    assert sys.stdin.read() == ""
    return 1.0

def do_meet(value):
    """Returns only once another process has come to the same place."""
    mine, other = value
    open(mine, "w").close()
    while not os.path.exists(other):
        time.sleep(0.001)
    return 1.0

def do_child(value):
    """Starts a process that outlives nobody, tells its pid, and never returns."""
    child = subprocess.Popen(["sleep", "1000"])
    with open(value + ".part", "w") as file:
        file.write(str(child.pid))
    os.rename(value + ".part", value)
    while True:
        pass

def do_flee(value):
    """Double-forks into a session of its own a process that ignores signals and holds a FIFO open; then never returns."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            os.write(os.open(value, os.O_WRONLY), b"x")
            time.sleep(1000)
        os._exit(0)
    os.wait()
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)
    do_regex(None)

def do_leave(value):
    """As `do_flee`, and a thread; but returns."""
    import threading
    threading.Thread(target=time.sleep, args=(1000,)).start()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.write(os.open(value, os.O_WRONLY), b"x")
            time.sleep(1000)
        os._exit(0)
    return 1.0

def do_memory(value):
    return float(len(b"x" * (8 << 30)))

def do_flood(value):
    while True:
        os.write(1, b"x" * 100_000)
        time.sleep(0.01)

def do_close(value):
    os.closerange(3, 256)
    return 1.0

def do_write(value):
    """Writes bytes to whatever it has open."""
    for number in range(3, 64):
        try:
            os.write(number, bytes(value))
        except OSError:
            pass
    return 1.0

def do_kill_keeper(value):
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(1000)

def do_seen(value):
    return float(sum(name.isdigit() for name in os.listdir("/proc")))

def do_pid(value):
    return os.getpid()

def do_orphan(value):
    """Dies while a forked child holds its pipes open."""
    if os.fork() == 0:
        while True:
            time.sleep(1)
    os._exit(4)
'''


@pytest.fixture
def function(tmp_path):
    path = tmp_path / "user_reward.py"
    path.write_text(SOURCE)
    return f"{path}:compute_score"
