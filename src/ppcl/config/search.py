"""The keys of a search with Optuna."""

from __future__ import annotations

from dataclasses import dataclass, field

from ppcl.config.bounds import MOST_SEED
from ppcl.options import option

# Results of a job that a search can minimise, as `ppcl compare` reads them.
MINIMISED = (
    *("velocity_error", "drop_percent", "latent_distance", "params_percent"),
    *("latency_ms", "peak_memory_mb", "training_seconds"),
)


@dataclass
class SearchConfig:
    """The keys of `hydra.sweeper` in a search with Optuna, `sweep=search`. They are not part of a run's configuration.

    `trials`: the number of trials in all, with those of earlier commands.
    `minimise`: the result that should be as low as possible.
    `seed`: the seed of what Optuna's sampler draws.
    `parallel`: trials that run at once. None: as many as the launcher's jobs, `hydra.launcher.n_jobs`, or else one.
    `params`: what is searched, as in a sweep: `interval(0.1, 1)`, `tag(log, interval(0.01, 1))`, `range(1, 9)`, or
        values, `a,b`. Keys that are typed in these forms are searched, too.
    """

    _target_: str = "hydra_plugins.ppcl_search.Search"
    trials: int = option(20, least=1, most=100_000)
    minimise: str = option("velocity_error", choices=MINIMISED)
    seed: int = option(0, least=0, most=MOST_SEED)
    parallel: int | None = option(None, least=1, most=10_000)
    params: dict[str, str] = field(default_factory=dict)
