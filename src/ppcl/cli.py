"""The command line: `ppcl key=value ...`. Hydra parses its flags and starts the jobs of a sweep."""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from ppcl.command import check_choices, execute, quoted
from ppcl.errors import SaidElsewhere, Stopped, UsageError
from ppcl.launch import is_first, take_gpu
from ppcl.paths import conf_dir
from ppcl.progress import visible
from ppcl.sentences import failed_access, in_words, sentence
from ppcl.watch import Watch

EXIT_USAGE, EXIT_SIGNAL = 2, 128  # a signal's number is added to the second
# What is no run: module and function, and how it is used.
TOOLS = {
    "compare": (
        ("ppcl.report.compare", "compare_command"),
        """usage: ppcl compare FOLDER FOLDER.. [to=FOLDER]

Write a table of finished runs, comparison.html, .csv and .png, to the folder that holds them all, or to the one that
to= names: the settings that differ, and what came of them. The folder of a sweep stands for all of its jobs.

  ppcl compare runs/sizes
  ppcl compare runs/try runs/mine to=runs/compared""",
    ),
    "npz": (
        ("ppcl.pictures.arrays", "npz_command"),
        """usage: ppcl npz FOLDER OUT.npz

Write the pictures of a folder, sorted by name, to one array, as the evaluator of ADM (guided-diffusion) reads them.""",
    ),
    "dashboard": (
        ("ppcl.tracking.dashboard", "make_dashboard"),
        """usage: ppcl dashboard ENTITY/PROJECT

Save a dashboard with panels for sweeps to a project of W&B. It needs an account, and the package wandb-workspaces.""",
    ),
}


def _run_tool(name: str, arguments: list[str]) -> None:
    """Do one of `TOOLS`, such as `ppcl compare FOLDER..`, or print how it is used."""
    (module, function), usage = TOOLS[name]
    if {"-h", "--help"} & {*arguments}:
        print(usage)
        return
    try:
        with in_words():
            print(getattr(import_module(module), function)(arguments))
    except UsageError as error:
        print(f"ppcl: {visible(str(error))}", file=sys.stderr)
        sys.exit(EXIT_USAGE)


def main() -> None:
    """Console script `ppcl`. Without arguments it prints help.

    A user's mistake prints one sentence and exits with 2. A signal that stops a training exits with 128 and its number:
    130 for Ctrl-C, 143 for SIGTERM, 138 for SIGUSR1, 140 for SIGUSR2.
    """
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    if sys.argv[1:] == ["--version"]:
        from ppcl import __version__

        print(f"ppcl {__version__}")
        return
    if sys.argv[1] in TOOLS:
        _run_tool(sys.argv[1], sys.argv[2:])
        return

    def refuse(error: UsageError) -> NoReturn:
        if is_first():
            print(f"ppcl: {visible(str(error))}", file=sys.stderr)
        sys.exit(EXIT_USAGE)

    wants_traceback = "HYDRA_FULL_ERROR" in os.environ
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us as they are, not printed and swallowed
    try:
        check_choices([argument for argument in sys.argv[1:] if not argument.startswith("-")])
    except UsageError as error:
        refuse(error)

    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf.errors import OmegaConfBaseException

    from ppcl import sweep
    from ppcl.schema import register_schema

    register_schema()
    sweep.failures.clear()
    sys.argv[1:] = [argument if argument.startswith("-") else quoted(argument) for argument in sys.argv[1:]]
    try:
        sweep.check_sweep(sys.argv[1:])
    except UsageError as error:
        refuse(error)

    mistakes: list[Exception] = []
    here = os.getpid()

    def complain(error: Exception) -> None:
        if wants_traceback:
            raise error
        mistakes.append(error)
        if not isinstance(error, SaidElsewhere):
            print(f"ppcl: {visible(sentence(error))}", file=sys.stderr)

    @hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
    def app(raw: Any) -> None:
        job = HydraConfig.get()
        if os.getpid() != here:  # a worker that a launcher of Hydra, such as joblib's, has started
            take_gpu(job.job.num)
        if job.mode == RunMode.MULTIRUN:
            sweep.announce(job)
        run_job = partial(execute, raw, job.overrides.task, Path(job.runtime.output_dir))
        if job.mode == RunMode.MULTIRUN and raw.run is None and not raw.explain:
            sweep.run_job(job, run_job)  # which records a failure, and tells of it at the end of the sweep
            return
        try:  # here, since Hydra prints a line of its own about what leaves a job
            run_job()
        except (UsageError, OmegaConfBaseException) as error:
            if os.getpid() != here:  # that worker hands the error on
                raise
            complain(error)

    try:
        app()
    except (UsageError, HydraException, OmegaConfBaseException) as error:  # of composing, which every rank does alike
        complain(error if is_first() else SaidElsewhere())
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        failure = failed_access(error)
        if failure is None:
            if Watch.current is not None:
                Watch.current.wait_for_end()
            raise
        complain(failure)
    except KeyboardInterrupt as error:
        number = error.number if isinstance(error, Stopped) else signal.SIGINT
        if not isinstance(error, Stopped) or is_first():  # all ranks stop together
            by = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
            print(f"ppcl: {by}; the same command resumes.", file=sys.stderr)
        sys.exit(EXIT_SIGNAL + number)
    if mistakes or sweep.failures:
        sys.exit(EXIT_USAGE)


if __name__ == "__main__":
    main()
