"""The command line: `ppcl key=value ...`, the only Hydra entry point."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppcl.errors import SaidElsewhere, UsageError
from ppcl.launch import is_first, launched
from ppcl.paths import conf_dir

if TYPE_CHECKING:
    from ppcl.context import Run

EXIT_USAGE, EXIT_INTERRUPTED = 2, 130


def execute(raw: Any, folder: Path) -> None:
    """Check the composed configuration, then run its stages in `folder`, in order."""
    from omegaconf import OmegaConf
    from rich.console import Console

    from ppcl.artifacts.files import atomic_path
    from ppcl.quiet import quiet_messages
    from ppcl.validation import parse

    quiet_messages()  # before anything that imports torch or diffusers
    shared = _meet(raw)
    with shared():
        config = parse(raw)
    from ppcl.context import Run  # loads torch, which a refused command is spared

    silent = config.strategy.kind != "single" and not is_first()
    run = Run(config, folder, Console(quiet=True) if silent else None)
    if silent:
        _run_stages(run, shared)
        return
    records = (folder / "config.yaml", folder / "versions.json")
    before = {path: path.read_bytes() for path in records if path.exists()}
    with atomic_path(folder / "config.yaml") as temporary:
        temporary.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")
    run.record_versions()
    try:
        _run_stages(run, shared)
    except UsageError:
        for path, content in before.items():  # a refused command leaves the folder's record as it was
            path.write_bytes(content)
        if not before and set(folder.iterdir()) <= set(records):  # and none of nothing
            for path in records:
                path.unlink(missing_ok=True)
        raise


def _meet(raw: Any) -> Callable[[], AbstractContextManager[None]]:
    """Meet the other ranks, if there are any; what then has to succeed on all of them or on none."""
    if raw.strategy.kind not in ("ddp", "fsdp") or not launched():
        return nullcontext
    from ppcl import parallel

    parallel.start(raw.trainer.accelerator, timedelta(minutes=raw.strategy.timeout_minutes))
    return parallel.together


def _run_stages(run: Run, shared: Callable[[], AbstractContextManager[None]]) -> None:
    """One after the other; what is neither a training nor divides by itself the first rank does for all."""
    from ppcl.describe import describe
    from ppcl.needs import check_needs
    from ppcl.quiet import quiet_progress
    from ppcl.stages import STAGES
    from ppcl.validation.pruning import budget_of

    config = run.config
    if set(config.stages) != {"plan"} or budget_of(config):  # counting needs neither library's pipelines
        quiet_progress()
    if config.trainer.num_threads is not None:
        import torch

        torch.set_num_threads(config.trainer.num_threads)
    with shared():
        check_needs(run)
    describe(run)
    for stage in sorted(set(config.stages), key=list(STAGES).index):
        run.teacher.enter(stage)
        with shared():
            if config.strategy.kind == "single" or STAGES[stage].ranks != "first" or is_first():
                import_module(f"ppcl.stages.{stage}").run(run)


def _sentence(error: Exception) -> str:
    """Return the error in one line, also where Hydra would print several."""
    text = " ".join(str(error).split())
    if text.startswith("Could not override "):
        return f"{text.split()[3].strip(chr(39) + '.')} is no configuration key; `ppcl --cfg job` prints all of them."
    if error.__cause__ is not None and not isinstance(error, UsageError):
        text += ": " + str(error.__cause__).splitlines()[0]
    return text


def _failed_write(error: Exception) -> str | None:
    """Return the system's reason for a failed read or write; None for any other error.

    safetensors and torch say it in words of their own.
    """
    if isinstance(error, OSError) and (error.filename or error.errno):
        return f"{error.filename or 'writing'}: {error.strerror}"
    found = re.search(r"\(os error (\d+)\)", str(error))
    if found:
        return f"writing: {os.strerror(int(found[1]))}"
    return "writing a checkpoint failed: is the disk full?" if "PytorchStreamWriter failed" in str(error) else None


def _unknown_choice(overrides: list[str]) -> str | None:
    """A sentence about the first `group=choice` whose file does not exist, before Hydra prints a page."""
    for override in overrides:
        group, _, choice = override.lstrip("+").partition("=")
        folder = conf_dir() / group
        if not group or not choice or not folder.is_dir() or not group.isidentifier():
            continue
        for name in choice.split(","):
            if not (folder / f"{name}.yaml").is_file() and name not in ("null", ""):
                known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
                return f"{group}={name} is unknown; conf/{group} has {known}."
    return None


def main() -> None:
    """Console script `ppcl`. A user's mistake prints one sentence and exits with 2."""
    wants_traceback = "HYDRA_FULL_ERROR" in os.environ
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us as they are, not printed and swallowed
    unknown = _unknown_choice([argument for argument in sys.argv[1:] if not argument.startswith("-")])
    if unknown:
        if is_first():
            print(f"ppcl: {unknown}", file=sys.stderr)
        sys.exit(EXIT_USAGE)

    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from ppcl.schema import register_schema

    register_schema()

    mistakes: list[str] = []
    here = os.getpid()

    def complain(error: Exception) -> None:
        if wants_traceback:
            raise error
        mistakes.append(_sentence(error))
        if not isinstance(error, SaidElsewhere):
            print(f"ppcl: {mistakes[-1]}", file=sys.stderr)

    @hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
    def app(raw: Any) -> None:
        folder = Path(HydraConfig.get().runtime.output_dir)
        try:  # here, since Hydra prints a line of its own about what leaves a job
            execute(raw, folder)
        except (UsageError, OmegaConfBaseException) as error:
            with suppress(OSError):  # Hydra made it; what has something in it stays
                folder.rmdir()
            if os.getpid() != here:  # a launcher's process: it hands the error on
                raise
            complain(error)

    try:
        app()
    except (UsageError, HydraException, OmegaConfBaseException) as error:  # of composing, which every rank does alike
        complain(error if is_first() else SaidElsewhere())
    except Exception as error:
        reason = _failed_write(error)
        if reason is None:
            raise
        complain(UsageError(f"{reason}; nothing that was whole is lost, and the same command goes on from there."))
    except KeyboardInterrupt:
        print("ppcl: interrupted; the same command resumes.", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    if mistakes:
        sys.exit(EXIT_USAGE)


if __name__ == "__main__":
    main()
