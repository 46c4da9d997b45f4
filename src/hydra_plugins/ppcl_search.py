"""Makes the search of `ppcl.search` known to Hydra, which takes sweepers from the package `hydra_plugins` only."""

from __future__ import annotations

from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class Search(Sweeper):
    """Runs the jobs that Optuna proposes. `settings`: the keys of `ppcl.config.SearchConfig`."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> None:
        """Run the search; `arguments` are in the configuration, too."""
        from ppcl.config import SearchConfig
        from ppcl.search import search

        assert self.config is not None  # by `setup`
        assert self.launcher is not None
        search(SearchConfig(**self.settings), self.config, self.launcher)
