"""`asyncrl {run,sft,simulate,eval,samples,…}`. Only the chosen job is imported: a mistake costs no torch.

Exit status: 0 done; 1 the job failed; 2 what was asked for can't work (a spec, an argument, a data file); 130 Ctrl-C, SIGTERM
or SIGHUP; 141 whoever read standard output has left (`| head -1`).
Standard output carries results only; logs, progress and errors go to standard error. LOG_LEVEL=DEBUG says more.
"""

import argparse
import importlib
import logging
import os
import select
import sys
from collections.abc import Sequence

from asyncrl import __version__
from asyncrl.errors import AsyncRLError, exit_status

# Each function takes a parser, adds its job's arguments, and sets the default `job`: from arguments to exit status.
JOBS = {
    "run": ("asyncrl.jobs.run:run_job", "train a model by a recipe"),
    "sft": ("asyncrl.jobs.sft:sft_job", "SFT warm start: train a model on demonstrations"),
    "attach": ("asyncrl.jobs.attach:attach_job", "watch a run that another process leads, until it ends"),
    "status": ("asyncrl.jobs.status:status_job", "how runs stand: led by whom, where, how fast, what went wrong"),
    "scale": ("asyncrl.jobs.scale:scale_job", "how many generators, reward workers and ranks a run should have from now on"),
    "stop": ("asyncrl.jobs.stop:stop_job", "end a run in order, with a checkpoint"),
    "fork": ("asyncrl.jobs.fork:fork_job", "a new run from a checkpoint and the log of another, under other settings"),
    "rescore": ("asyncrl.jobs.rescore:rescore_job", "score a run's rollouts again; repair it where rewards were wrong"),
    "simulate": ("asyncrl.jobs.simulate:simulate_job", "how fast a recipe would run on which machines, and how stale"),
    "eval": ("asyncrl.jobs.evaluate:eval_job", "score a model or checkpoint on held-out data"),
    "samples": ("asyncrl.jobs.samples:samples_job", "prompts, responses and rewards of a run, picked and sorted"),
    "trace": ("asyncrl.jobs.trace:trace_job", "who did what when in a run, for Perfetto"),
    "export": ("asyncrl.jobs.export:export_job", "write a policy as a Hugging Face folder"),
    "merge": ("asyncrl.jobs.export:export_job", "the same, also of verl's FSDP shards"),
    "report": ("asyncrl.jobs.report:report_job", "one page of what runs did, to open in a browser"),
    "replay": ("asyncrl.jobs.replay:replay_job", "train again from a run's log, and compare to the bit"),
    "audit": ("asyncrl.jobs.audit:audit_job", "what other algorithms would have made of a run's batches"),
    "clean": ("asyncrl.jobs.clean:clean_job", "list and remove what dead runs left on this machine"),
    "doctor": ("asyncrl.jobs.doctor:doctor_job", "check this machine, and say what fixes it"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status; argparse itself exits with 0 (help) or 2 (usage)."""
    try:
        chosen, rest = _choose(sys.argv[1:] if argv is None else list(argv))
        from asyncrl.rundir import StandardError, set_up_logging  # here, so that an interrupt of slow imports is told as one

        set_up_logging(StandardError())
        for library in ("huggingface_hub", "transformers"):
            logging.getLogger(library).propagate = False  # they print their warnings themselves: once is enough
        if not sys.stderr.isatty():  # progress bars of the hub and of transformers are for terminals
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        name, _, function = JOBS[chosen][0].partition(":")
        module = importlib.import_module(name)
        parser = argparse.ArgumentParser(prog=f"asyncrl {chosen}", description=(module.__doc__ or "").partition("\n")[0])
        getattr(module, function)(parser)
        # Intermixed: `run RECIPE --name x a.b=c` has positionals on both sides of an option.
        args = parser.parse_intermixed_args(rest)
        status: int = args.job(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        if not _reader_left():
            raise
        return 141  # 128 + SIGPIPE, as of any command in a pipe
    except AsyncRLError as error:
        _say(f"error: {error}", error)
        logging.getLogger(__name__).debug("where it came from", exc_info=True)
        return exit_status(error)
    except OSError as error:
        from asyncrl.disk import full_disk
        from asyncrl.processes import homeless

        if why := homeless():
            print(f"error{why}", file=sys.stderr)
            return 2
        if not full_disk(error):
            raise
        print(f"error: {error}: nothing more could be saved; free disk space, then go on with --resume", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        _say(f"interrupted: {interrupt}" if str(interrupt) else "interrupted", interrupt)
        return 130


def _say(message: str, error: BaseException) -> None:
    """The message, and what the error notes on how to go on."""
    from asyncrl.rundir import redact

    print(redact("\n".join([message, *getattr(error, "__notes__", ())])), file=sys.stderr)


def _reader_left() -> bool:
    """Whether standard output is a pipe that nobody reads; it then becomes /dev/null, so that Python's end is quiet too."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    left = any(event & select.POLLERR for _, event in poll.poll(0))
    if left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return left


def _choose(argv: list[str]) -> tuple[str, list[str]]:
    """The job's name and its own arguments."""
    lines = "\n".join(f"  {name:<8} {about}" for name, (_, about) in JOBS.items())
    parser = argparse.ArgumentParser(
        prog="asyncrl",
        description="Asynchronous reinforcement learning for language models.",
        epilog=f"jobs:\n{lines}\n\n`asyncrl JOB --help` explains each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="asyncrl [--version] JOB …",
    )
    parser.add_argument("--version", action="version", version=f"asyncrl {__version__}")
    parser.add_argument("job", choices=JOBS, metavar="JOB", help=", ".join(JOBS))
    return parser.parse_args(argv[:1]).job, argv[1:]


if __name__ == "__main__":
    sys.exit(main())
