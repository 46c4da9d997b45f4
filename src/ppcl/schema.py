"""Registers what Hydra needs before it can compose `conf/`. Importing this loads no torch."""

from __future__ import annotations

from ppcl.config import OPEN_GROUPS, Config, SearchConfig
from ppcl.defaults import register_resolvers
from ppcl.paths import job_folder
from ppcl.stages import help_lines


def register_schema() -> None:
    """Register `Config` as the schema of `conf/config.yaml`, and the resolvers that files in `conf/` use."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    schema = OmegaConf.structured(Config)
    for key in OPEN_GROUPS:
        OmegaConf.set_struct(OmegaConf.select(schema, key), False)
    ConfigStore.instance().store(name="schema", node=schema)
    ConfigStore.instance().store(group="hydra/sweeper", name="ppcl_search", node=SearchConfig)
    OmegaConf.register_new_resolver("ppcl_stages", help_lines, replace=True)
    OmegaConf.register_new_resolver("ppcl_folder", lambda run, folder: run or folder, replace=True)
    OmegaConf.register_new_resolver("ppcl_job", job_folder, replace=True)
    register_resolvers()
