"""`python -m sglang.launch_server`, but its processes are forked: they have what was imported, instead of importing it again.

That is 8 s of each of two processes, of 20 s to start. Nothing computes yet when SGLang makes them: its main process has no
threads, sockets or CUDA then.
"""

import multiprocessing
import runpy

if __name__ == "__main__":
    multiprocessing.set_start_method("fork")
    multiprocessing.set_start_method = lambda method, force=False: None  # SGLang asks for `spawn`
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
