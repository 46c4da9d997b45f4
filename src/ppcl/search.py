"""Searches for the settings with the best result: `ppcl --multirun sweep=search`. Optuna proposes what to try.

A trial is a job of a sweep, run by any launcher of Hydra. The study is a file in the sweep's folder, with which the
same command goes on. Importing this loads neither Optuna nor torch.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from ppcl.artifacts.files import atomic_path, write_json
from ppcl.artifacts.jobs import BEST, JOB, MULTIRUN, NOT_ENDED, read_job, write_job
from ppcl.artifacts.locks import locked
from ppcl.command import as_overrides
from ppcl.config import SearchConfig
from ppcl.errors import UsageError
from ppcl.launch import launched
from ppcl.options import declared
from ppcl.paths import conf_dir, job_folder
from ppcl.validation.values import one_of

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from hydra.plugins.launcher import Launcher
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

_DIGITS, _MOST_DIGITS = 4, 17  # significant ones of the numbers that are tried
_NEAR = 1e-3  # by which share of its range a number may be rounded
_STUDY = "study.journal"
_IDENTITY = "search"  # the study's attribute that says what is searched
# Settings that change no result of a trial: another value of them goes on with the search.
_OF_COMMAND = ("name", "run", "explain", "logger.", "watch.", "paths.runs_dir", "paths.cache_dir")
_OF_MACHINE = ("trainer.progress", "trainer.num_threads", "trainer.check_memory", "trainer.memory_gb")


@dataclass(frozen=True)
class _Plan:
    """Describes a search: its folder, the overrides that all trials share, the ranges, and the result to minimise."""

    settings: SearchConfig
    config: DictConfig
    folder: Path
    fixed: list[str]
    space: dict[str, Override]

    def texts(self, trial: FrozenTrial) -> list[str]:
        """Return the overrides that set a trial apart."""
        return [f"{key}={_written(trial.params[key], trial.distributions[key])}" for key in self.space]

    def overrides(self, trial: FrozenTrial) -> list[str]:
        return [*self.fixed, *self.texts(trial)]

    def job(self, trial: FrozenTrial) -> Path:
        """Return the folder of a trial's job."""
        return self.folder / job_folder(",".join(sorted(self.texts(trial))))


def _written(value: Any, distribution: Any) -> str:
    """Return a value in few digits, but so many that it stays in its range, and near what Optuna has drawn of it."""
    if not isinstance(value, float):
        return str(value)
    low, high = distribution.low, distribution.high
    texts = (f"{value:.{digits}g}" for digits in range(_DIGITS, _MOST_DIGITS))
    near = (text for text in texts if low <= float(text) <= high and abs(float(text) - value) <= _NEAR * (high - low))
    return next(near, repr(value))


def search(given: SearchConfig, config: DictConfig, launcher: Launcher) -> None:
    """Run trials until there are as many as asked for, and say which is the best.

    `config`: that of the sweep. A failed trial ends nothing. Raises `UsageError` for settings without sense, and where
    the folder holds another search.
    """
    _check(given, config)
    from ppcl.sweep import divide

    fixed, swept = divide(config)
    space = {override.get_key_element(): override for override in swept}
    if not space:
        raise UsageError("hydra/sweeper=ppcl_search has nothing to search: give a key a range, as in sweep=search.")
    plan = _Plan(given, config, Path(config.hydra.sweep.dir), [str(one.input_line) for one in fixed], space)
    distributions = {key: _distribution(override) for key, override in space.items()}
    at_once = given.parallel or max(1, config.hydra.launcher.get("n_jobs") or 1)
    with locked(plan.folder / "search.lock", f"{plan.folder} is searched", "wait for it, or give another name"):
        study = _open(plan)
        OmegaConf.save(config, plan.folder / MULTIRUN)
        while trials := _next(plan, study, distributions, at_once):
            jobs = [plan.overrides(trial) for trial in trials]
            for ended in launcher.launch(jobs, initial_job_idx=trials[0].number):
                _ = ended.return_value  # raises the error of a worker that has died
        _tell_best(plan, study)


def _check(given: SearchConfig, config: DictConfig) -> None:
    if find_spec("optuna") is None:
        raise UsageError("hydra/sweeper=ppcl_search needs the package optuna: pip install optuna.")
    if launched():
        raise UsageError("sweep=search starts its jobs itself: start it without torchrun or srun.")
    if config.explain:
        raise UsageError("explain=true has no result to search by: estimate one job, without --multirun and sweep=.")
    for key in declared(given, "hydra.sweeper."):
        if key.choices is not None:
            one_of(key.name, key.value, tuple(key.choices))
        if isinstance(key.value, int):
            key.bounds.check(key.name, key.value)


def _distribution(override: Override) -> BaseDistribution:
    """Return Optuna's form of a range; `UsageError` if it has no such form."""
    from hydra.core.override_parser.types import IntervalSweep, RangeSweep
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    values = override.value()
    try:
        if isinstance(values, (IntervalSweep, RangeSweep)) and values.start is not None:
            ends: list[Any] = [values.start, values.end] if isinstance(values, IntervalSweep) else [*values.range()]
            if not ends or not all(map(math.isfinite, ends)):
                raise ValueError("it needs two ends, the lower first")
            whole = all(isinstance(end, int) for end in ends)
            kind: Any = IntDistribution if whole else FloatDistribution
            step = {} if isinstance(values, IntervalSweep) else {"step": values.step}
            return kind(ends[0], ends[-1], log="log" in values.tags, **step)
        return CategoricalDistribution([str(value) for value in override.sweep_string_iterator()])
    except (ValueError, OverflowError) as error:
        raise UsageError(f"{override.input_line} is no range to search: {str(error).rstrip('.')}.") from None


def _open(plan: _Plan) -> Study:
    """Return the study in the sweep's folder, a new one if there is none; `UsageError` if it is of another search."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    plan.folder.mkdir(parents=True, exist_ok=True)
    _mend(plan.folder / _STUDY)
    storage = JournalStorage(JournalFileBackend(str(plan.folder / _STUDY)))
    is_new = not optuna.get_all_study_names(storage)
    study = (optuna.create_study if is_new else optuna.load_study)(storage=storage, study_name="search")
    now, known = _identity(plan), study.user_attrs.get(_IDENTITY)
    if known is None:  # new, or killed before it was recorded
        study.set_user_attr(_IDENTITY, now)
        return study
    before, after = ({**one["settings"], **one["space"]} for one in (known, now))
    for key in dict.fromkeys([*known["space"], *now["space"], *before]):
        searched = key in known["space"] or key in now["space"]
        if before.get(key) != after.get(key) and (searched or key in after):  # a key of another version is in one only
            raise UsageError(
                f"{plan.folder} holds a search with {_shown(key, before)}, and this one has {_shown(key, after)}: give "
                "it as before, or name=NEW for another search."
            )
    return study


def _mend(path: Path) -> None:
    """Cut off a last line that was not written whole, as a killed process leaves it.

    Raises `UsageError` for other damage.
    """
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    try:
        for line in whole.splitlines():
            if not isinstance(json.loads(line), dict):
                raise ValueError(line)
    except ValueError:
        raise UsageError(
            f"{path} is damaged: delete it, and give the same command again, which finds the trials that have ended."
        ) from None
    if whole != content:
        with atomic_path(path) as temporary:
            temporary.write_bytes(whole)


def _shown(key: str, settings: Mapping[str, str]) -> str:
    return f"{key}={settings[key]}" if key in settings else f"no {key}"


def _identity(plan: _Plan) -> dict[str, dict[str, str]]:
    """Return what must not change when the search goes on: the ranges, what is minimised, and all other settings."""
    settings: Any = OmegaConf.to_container(plan.config, resolve=False)
    del settings["hydra"]
    flat = dict(item.split("=", 1) for item in as_overrides(settings))
    kept = {key: value for key, value in flat.items() if not key.startswith(_OF_COMMAND) and key not in _OF_MACHINE}
    kept |= {"hydra.sweeper.minimise": plan.settings.minimise, "hydra.sweeper.seed": str(plan.settings.seed)}
    space = {key: str(override.input_line).split("=", 1)[1] for key, override in plan.space.items()}
    return {"settings": {key: value for key, value in kept.items() if key not in space}, "space": space}


def _next(plan: _Plan, study: Study, distributions: Mapping[str, BaseDistribution], at_once: int) -> list[FrozenTrial]:
    """Return the trials to run now, with consecutive numbers; none if there are as many as asked for.

    First it records the results of trials that have ended, also before an earlier command was killed. A trial that was
    killed runs again. One with the settings of an earlier trial has its result.
    """
    from optuna.samplers import TPESampler
    from optuna.trial import TrialState

    while True:
        waiting = []
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if _has_ended(plan, trial):
                _record(plan, study, trial)
            else:
                waiting.append(trial)
        missing = min(at_once - len(waiting), plan.settings.trials - len(study.get_trials(deepcopy=False)))
        if missing <= 0:
            return list(_consecutive(plan, waiting[:at_once]))
        for _ in range(missing):
            # A seed for each trial: the trials do not depend on how many an earlier command has run.
            study.sampler = TPESampler(seed=plan.settings.seed + len(study.get_trials(deepcopy=False)))
            study.ask(dict(distributions))


def _consecutive(plan: _Plan, trials: Sequence[FrozenTrial]) -> Iterator[FrozenTrial]:
    """Yield the first trials as long as their numbers follow each other and no two share a folder."""
    folders = set[Path]()
    for place, trial in enumerate(trials):
        if trial.number != trials[0].number + place or plan.job(trial) in folders:
            return
        folders.add(plan.job(trial))
        yield trial


def _has_ended(plan: _Plan, trial: FrozenTrial) -> bool:
    """Return whether a job with the overrides of this trial has ended, not one of an earlier sweep in the folder."""
    folder = plan.job(trial)
    own = [override for override in plan.overrides(trial) if not override.startswith("hydra")]
    if not (folder / JOB).exists():
        return False
    job = read_job(folder)
    return job.overrides == own and job.failed != NOT_ENDED


def _record(plan: _Plan, study: Study, trial: FrozenTrial) -> None:
    from optuna.trial import TrialState

    from ppcl.report.compare import results_of

    folder, key = plan.job(trial), plan.settings.minimise
    job = read_job(folder)
    value = None if job.failed else results_of(folder).get(key)
    if value is None and not job.failed:
        failed = f"hydra.sweeper.minimise={key}: the job has no such result; add the stages that make it."
        write_job(folder, replace(job, failed=failed))
    if value is None:
        study.tell(trial.number, state=TrialState.FAIL)
    else:
        study.tell(trial.number, float(value))


def _tell_best(plan: _Plan, study: Study) -> None:
    """Print the best trial with the command that makes it again, and write both to `best.json`."""
    from optuna.trial import TrialState

    from ppcl.report.compare import titled

    count, key = len(study.get_trials(deepcopy=False)), plan.settings.minimise
    ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not ended:
        (plan.folder / BEST).unlink(missing_ok=True)
        print(f"    search  none of {count} trials has a result")
        return
    value, number = min((float(trial.values[0]), trial.number) for trial in ended)
    best = study.trials[number]
    command = " ".join(["ppcl", *map(shlex.quote, _single(plan, best))])
    told = f"best of {count} trials: {titled(key, value)}"
    write_json(
        plan.folder / BEST,
        {
            **{"job": plan.job(best).name, "minimise": key, "value": value, "command": command, "told": told},
            **{"trials": count, "failed": count - len(ended)},
        },
    )
    print(f"    search  {told} with\n  {command}")


def _single(plan: _Plan, trial: FrozenTrial) -> list[str]:
    """Return the overrides of a command that runs a trial alone: without the sweep, but with what its file sets."""
    file = conf_dir() / "sweep" / f"{plan.config.hydra.runtime.choices.get('sweep')}.yaml"
    content: Any = OmegaConf.to_container(OmegaConf.load(file)) if file.exists() else {}
    of_file = as_overrides({key: content[key] for key in content if key not in ("hydra", "defaults", "name")})
    typed = [one for one in plan.fixed if not one.startswith(("hydra", "sweep=", "name="))]
    last = {one.partition("=")[0]: one for one in (*typed, *of_file, *typed, *plan.texts(trial))}
    return [*last.values(), f"name={plan.config.name}_best"]
