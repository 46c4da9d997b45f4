"""The typed configuration: one dataclass for each group of keys, with types, defaults and allowed values.

`conf/` fills these groups, and `ppcl.validation` checks them. Keys that are declared with `option` state their bounds,
and whether artifacts depend on them. No number may be NaN or infinite. None is written `null` on the command line and
in YAML.
"""

from ppcl.config.data import DataConfig
from ppcl.config.machine import LoggerConfig, PathsConfig, StrategyConfig, TrainerConfig
from ppcl.config.model import ModelConfig, SamplingConfig
from ppcl.config.pruning import BudgetConfig, IntervalsConfig, MethodConfig, ProbeConfig, WidthConfig, WidthSet
from ppcl.config.results import (
    STORED_VARIANTS,
    VARIANTS,
    BenchmarkConfig,
    ExportConfig,
    GenerateConfig,
    ImportConfig,
    LoraConfig,
    QuantizeConfig,
)
from ppcl.config.root import Config
from ppcl.config.search import MINIMISED, SearchConfig
from ppcl.config.training import DistillConfig, FinetuneConfig, PretrainConfig, TrainingConfig, WatchConfig

# Groups that may contain keys not declared here. The code that reads such a group checks its keys.
OPEN_GROUPS = (
    *("benchmark.settings", "distill.losses", "method.settings"),
    *("model.sampling.scheduler", "model.sampling.arguments"),
)

__all__ = [
    "MINIMISED",
    "OPEN_GROUPS",
    "STORED_VARIANTS",
    "VARIANTS",
    "BenchmarkConfig",
    "BudgetConfig",
    "Config",
    "DataConfig",
    "DistillConfig",
    "ExportConfig",
    "FinetuneConfig",
    "GenerateConfig",
    "ImportConfig",
    "IntervalsConfig",
    "LoggerConfig",
    "LoraConfig",
    "MethodConfig",
    "ModelConfig",
    "PathsConfig",
    "PretrainConfig",
    "ProbeConfig",
    "QuantizeConfig",
    "SamplingConfig",
    "SearchConfig",
    "StrategyConfig",
    "TrainerConfig",
    "TrainingConfig",
    "WatchConfig",
    "WidthConfig",
    "WidthSet",
]
