"""Runs a command: composes its configuration from overrides, checks and records it, and runs its stages.

`ppcl` on the command line and `ppcl.run` in Python both use this. Importing this loads neither torch nor Hydra.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import fields
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppcl.config import GenerateConfig
from ppcl.errors import UsageError
from ppcl.launch import is_first, launched
from ppcl.paths import check_folder, check_name, conf_dir
from ppcl.results import read_record
from ppcl.sentences import in_words

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from rich.console import Console

    from ppcl.context import Run

# Keys that `run=FOLDER` does not take from the recorded configuration. They belong to the command: what it does, with
# how many processes and on which device. No result of the run depends on them.
OF_COMMAND = (
    *("stages", "explain", "lora", "published", "strategy", "model.streaming", "trainer.accelerator"),
    *("export.push_to_hub", "export.private", "export.commit_message"),
    *(f"generate.{item.name}" for item in fields(GenerateConfig) if item.name not in ("batch_size", "plug_fraction")),
)
# Learning rates, and the groups whose `relative_update` can take their place.
_RATES = (
    ("distill.lr", ("distill",)),
    ("width.lr", ("width", "distill")),
    ("finetune.lr", ("finetune",)),
    ("finetune.muon_lr", ("finetune",)),
)
# Stages that only draw and measure. With `run=FOLDER` their settings, such as another seed, are not recorded.
_LOOKING = {"generate", "evaluate", "report"}
# What data there is follows from where it lies.
_BY_PATH = ("data.name", "data.captions", "data.timesteps", "data.shift")


# Composing


def compose(overrides: Sequence[str]) -> tuple[DictConfig, Path]:
    """Return the configuration that `ppcl *overrides` has, not yet checked, and the run's folder.

    It leaves Hydra's global state as it was, so it can be called within a Hydra application. Raises `UsageError` for an
    unknown choice of a group, and errors of Hydra and OmegaConf, which `in_words` turns into `UsageError`.
    """
    check_choices(overrides)
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import open_dict

    from ppcl.schema import register_schema

    register_schema()
    current = GlobalHydra.instance()
    outer, current.hydra = current.hydra, None
    try:
        with hydra.initialize_config_dir(str(conf_dir().resolve()), version_base="1.3"):
            raw = hydra.compose("config", list(overrides), return_hydra_config=True)
    finally:
        GlobalHydra.instance().hydra = outer
    folder = Path(raw.hydra.run.dir).absolute()
    with open_dict(raw):
        del raw["hydra"]
    return raw, folder


def check_choices(overrides: Sequence[str]) -> None:
    """Raise `UsageError` for the first `group=choice` without a file. Hydra's own message would fill a page.

    It does so too for a `name=` that leads out of the folder of runs, since Hydra would make the folder at once.
    """
    for override in overrides:
        group, sign, choice = override.lstrip("+").partition("=")
        if not group.strip():
            raise UsageError(f"{override} names no key: write KEY=VALUE, such as experiment=try.")
        if group in ("name", "paths.runs_dir", "paths.cache_dir") and sign and "$" not in choice:
            for name in choice.split(",") if choice[:1] not in ("'", '"') else [choice.strip(choice[0])]:
                check_name(group, name.strip())
        folder = conf_dir() / group
        if not group or not sign or not folder.is_dir() or not group.isidentifier():
            continue
        for name in (part.strip("'\"") for part in choice.split(",")):
            if not (folder / f"{name}.yaml").is_file():  # nor does Hydra take null or nothing for a choice
                known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
                raise UsageError(f"{group}={name} is unknown; conf/{group} has {known}.")


def as_overrides(settings: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """Return overrides as strings. A mapping gives `key=value` for every value, with nested keys joined by dots.

    Raises `UsageError` for a single string.
    """
    if isinstance(settings, str):
        raise UsageError(f"{settings!r} is one string: give a list of overrides, such as [{settings!r}].")
    if not isinstance(settings, Mapping):
        return [quoted(str(item)) for item in settings]
    found = []
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            found += as_overrides({f"{key}.{inner}": item for inner, item in value.items()})
        else:
            found.append(f"{key}={_written(value)}")
    return found


def _written(value: Any) -> str:
    """Return a value in the syntax of Hydra's overrides."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (int, float)):
        return repr(int(value) if isinstance(value, int) else float(value))  # numpy's numbers print otherwise
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_written, value))}]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_written(item)}" for key, item in value.items()) + "}"
    if re.fullmatch(r"(?!(null|true|false|nan|inf)$)[a-z_/][\w./-]*", str(value), re.IGNORECASE | re.ASCII):
        return str(value)  # a word that needs no quotes
    from hydra.core.override_parser.types import Quote, QuotedString

    text = str(value).replace("${", "\\${")  # text, and no interpolation
    return QuotedString(text, Quote.single).with_quotes()


def quoted(override: str) -> str:
    """Return `KEY=PATH` with the path in quotes if it has a `=`, as folders of a sweep's jobs do: Hydra needs them.

    Several paths, separated by commas, are quoted one by one. Paths that do not exist, and all else, stay as they are.
    """
    key, _, value = override.partition("=")
    if "=" not in value:
        return override
    if os.path.exists(value):
        return f"{key}={_written(value)}"
    paths, part = list[str](), ""
    for piece in value.split(","):  # a path may hold commas, too
        part = f"{part},{piece}" if part else piece
        if os.path.exists(part):
            paths.append(_written(part))
            part = ""
    return override if part or not paths else f"{key}={','.join(paths)}"


# Continuing an earlier run


def continued(raw: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Return the configuration of a command with `run=FOLDER`, or `raw` without it.

    It is the recorded configuration, except for the keys `OF_COMMAND` and those in `overrides`, which are taken from
    `raw`. A group choice replaces its whole group, but `distill=`, `width=` and `finetune=` keep the recorded recipe.
    `recovery=` replaces every key that any of its choices sets. Recorded learning rates that do not go with the recipe
    are replaced, too. Raises `UsageError` for overrides that contradict `run=FOLDER`.
    """
    if raw.run is None:
        return raw
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    record = read_record(Path(raw.run))
    recipes = _keys_of_choices("recipe")
    of_recovery = {name for names in _keys_of_choices("recovery").values() for name in names}
    said = list(OF_COMMAND)
    named = {override.split("=")[0] for override in overrides}
    if "recovery" in named and "recipe" not in named:
        raw = _with_recorded_recipe(raw, record, overrides)
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key, choice = override.key_or_group, override.value()
        if key in ("name", "paths.runs_dir"):
            raise UsageError(
                f"run={raw.run} works in that folder, so {override.input_line} has no effect: drop one of them, or use "
                f"paths.base_run={raw.run} for another run with its plugs."
            )
        if key in ("experiment", "sweep") and choice is not None:
            raise UsageError(
                f"run={raw.run} takes the recorded configuration, and {override.input_line} is a whole one of its own: "
                "drop one of them."
            )
        if key == "sampling" and isinstance(choice, str):  # only some keys of model.sampling
            said += [f"model.sampling.{name!s}" for name in OmegaConf.load(conf_dir() / key / f"{choice}.yaml")]
        elif key == "recipe" and isinstance(choice, str):
            said += recipes[choice]
        elif key == "recovery" and isinstance(choice, str):
            said += of_recovery  # also those that this one leaves as `distill` and `finetune` have them
        elif key in ("distill", "width", "finetune") and isinstance(choice, str):
            # They say nothing of what a recipe sets.
            of_recipes = {name for names in recipes.values() for name in names}
            said += [name for name in (f"{key}.{name!s}" for name in raw[key]) if name not in of_recipes]
        elif key not in ("run", "experiment", "sweep", "sampling", "recipe", "recovery") and not (
            key.startswith("hydra") or override.is_delete()
        ):
            said.append(key)
            if key in ("data.path", "data.cache"):
                said += _BY_PATH
    # Interpolations are resolved later, with the new model and data.
    present = OmegaConf.to_container(raw, resolve=False)

    def take(key: str) -> None:
        value: Any = present
        for part in key.split("."):
            value = value[part]
        OmegaConf.update(record, key, value, merge=False, force_add=True)

    for key in said:
        take(key)
    for rate, groups in _RATES:  # a recorded learning rate stays where there is a use for it
        relative = any(OmegaConf.select(record, f"{group}.relative_update") is not None for group in groups)
        if (OmegaConf.select(record, rate) is None) != relative:
            take(rate)
    record.run = None
    return record


def _with_recorded_recipe(raw: DictConfig, record: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Return `raw` as it is with the recipe of `record`, which some values of a recovery depend on.

    The recipe is recognised by its losses and its optimiser. Returns `raw` where the record has others.
    """
    from omegaconf import OmegaConf

    def told(config: DictConfig) -> list[Any]:
        return [OmegaConf.select(config, f"distill.{name}") for name in ("losses", "optimizer")]

    for path in (conf_dir() / "recipe").glob("*.yaml"):
        found, _ = compose([*overrides, f"recipe={path.stem}"])
        if told(found) == told(record):
            return found
    return raw


def _keys_of_choices(group: str) -> dict[str, list[str]]:
    """Return the full names of the keys that each choice sets of a group that sets keys of other groups."""
    from omegaconf import OmegaConf

    read: Any = {path.stem: OmegaConf.load(path) for path in (conf_dir() / group).glob("*.yaml")}
    return {
        choice: [f"{part}.{name}" for part in content for name in content[part]] for choice, content in read.items()
    }


# Running


def prepare(overrides: Sequence[str], console: Console | None = None) -> Run:
    """Return the run that `ppcl *overrides` would use, with its configuration checked. Nothing is written or run.

    Raises `UsageError` for a wrong configuration.
    """
    from ppcl.quiet import quiet_messages
    from ppcl.validation import parse

    with in_words():
        raw, folder = compose(overrides)
        check_folder(raw)
        config = parse(continued(raw, overrides))
    quiet_messages()  # before anything that imports torch or diffusers
    from ppcl.context import Run

    return Run(config, folder, console)


def execute(raw: DictConfig, overrides: Sequence[str], folder: Path, console: Console | None = None) -> None:
    """Check the composed configuration, record it in `folder`, and run its stages in order.

    If the command is refused with a `UsageError`, the folder's earlier record is restored, and a new folder is removed.
    """
    from omegaconf.errors import OmegaConfBaseException

    try:
        _execute(raw, overrides, folder, console)
    except (UsageError, OmegaConfBaseException) as error:
        with suppress(OSError):
            folder.rmdir()
        if raw.run is not None and isinstance(error, UsageError):
            error.args = (_without_run(str(error), raw.run),)
        raise


def _without_run(sentence: str, folder: str) -> str:
    """Return a refusal of a command with `run=FOLDER`, whose remedy may be another `name=`, which does not go with it.

    It then ends with what such a run needs besides.
    """
    names_run, names_name = (re.search(rf"(?<![\w.]){key}=", sentence) for key in ("run", "name"))
    if names_run or not names_name:
        return sentence
    return (
        f"{sentence.removesuffix('.')}; name= takes the place of run={folder}, so repeat the settings of that run, "
        f"which {Path(folder) / 'config.yaml'} lists."
    )


def _execute(raw: DictConfig, overrides: Sequence[str], folder: Path, console: Console | None) -> None:
    from rich.console import Console

    from ppcl.quiet import quiet_messages
    from ppcl.validation import parse

    quiet_messages()  # before anything that imports torch or diffusers
    check_folder(raw)
    looking = raw.run is not None and {*raw.stages} <= _LOOKING
    raw = continued(raw, overrides)
    shared = _meet(raw)
    with shared():
        config = parse(raw)
    from ppcl.context import Run  # loads torch, so it comes after the checks

    silent = config.strategy.kind != "single" and not is_first()
    run = Run(config, folder, Console(quiet=True) if silent else console)
    with ExitStack() as locks:
        if not (looking or config.explain):
            from ppcl.claims import claim

            with shared():
                if not silent:
                    claim(run, _LOOKING, locks)
        _record_and_run(run, looking, silent, shared)


def _record_and_run(run: Run, looking: bool, silent: bool, shared: Callable[[], AbstractContextManager[None]]) -> None:
    """Record the configuration of a command that is not just `looking`, and run its stages."""
    from omegaconf import OmegaConf

    from ppcl.artifacts.files import atomic_path, with_checksum

    config, folder = run.config, run.folder
    if silent or looking or config.explain:
        _run_stages(run, shared)
        if config.explain:
            with suppress(OSError):
                folder.rmdir()  # Hydra has made it
        return
    records = (folder / "config.yaml", folder / "versions.json")
    before = {path: path.read_bytes() for path in records if path.exists()}
    with atomic_path(folder / "config.yaml") as temporary:
        text = with_checksum(OmegaConf.to_yaml(OmegaConf.structured(config)))
        temporary.write_text(text, encoding="utf-8")
    run.record_versions()
    try:
        _run_stages(run, shared)
    except UsageError:
        for path, content in before.items():  # restore the earlier record
            path.write_bytes(content)
        own = {path for path in folder.iterdir() if path.suffix != ".lock"}
        if not before and own <= set(records):  # the folder is new and has nothing else
            for path in records:
                path.unlink(missing_ok=True)
        raise


def _in_sweep() -> bool:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def _meet(raw: Any) -> Callable[[], AbstractContextManager[None]]:
    """Start the process group if there are several ranks.

    Returns a function that makes a context in which an error on any rank is raised on all of them.
    """
    if raw.strategy.kind not in ("ddp", "fsdp") or not launched():
        return nullcontext
    from ppcl import parallel

    minutes = raw.strategy.timeout_minutes
    if not 0 < minutes <= 100_000:
        minutes = 1  # until the ranks have refused that together
    parallel.start(raw.trainer.accelerator, timedelta(minutes=minutes))
    return parallel.together


def _run_stages(run: Run, shared: Callable[[], AbstractContextManager[None]]) -> None:
    """Run the stages one after the other. A stage that ranks do not share runs on rank 0 only."""
    from ppcl.attention import attention
    from ppcl.describe import describe
    from ppcl.memory.checks import check_memory, in_memory
    from ppcl.needs import check_needs, check_teacher
    from ppcl.quiet import quiet_progress
    from ppcl.stages import STAGES
    from ppcl.tracing import ensure_traced, needs_trace
    from ppcl.tracking.publish import tracked
    from ppcl.validation.pruning import budget_of

    config = run.config
    if set(config.stages) != {"plan"} or budget_of(config):  # counting loads no pipelines, which print progress
        quiet_progress()
    if config.trainer.num_threads is not None:
        import torch

        torch.set_num_threads(config.trainer.num_threads)
    if config.explain:
        from ppcl.memory.checks import explain

        with shared():
            check_needs(run)
        explain(run)
        return
    with tracked(run, in_sweep=_in_sweep()) as publish:
        with shared():
            check_needs(run)
            check_memory(run)
            check_teacher(run)
        describe(run)
        for stage in sorted(set(config.stages), key=list(STAGES).index):
            run.teacher.enter(stage)
            with shared(), in_memory(run, stage), attention(config):
                if config.strategy.kind == "single" or STAGES[stage].ranks != "first" or is_first():
                    if needs_trace(config, stage):
                        ensure_traced(run)
                    import_module(f"ppcl.stages.{stage}").run(run)
                    publish(stage)
