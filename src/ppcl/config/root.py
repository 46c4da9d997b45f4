"""The root of the configuration."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from ppcl.config.bounds import MOST_SEED
from ppcl.config.data import DataConfig
from ppcl.config.machine import LoggerConfig, PathsConfig, StrategyConfig, TrainerConfig
from ppcl.config.model import ModelConfig
from ppcl.config.pruning import BudgetConfig, IntervalsConfig, MethodConfig, ProbeConfig, WidthConfig
from ppcl.config.results import BenchmarkConfig, ExportConfig, GenerateConfig, ImportConfig, LoraConfig, QuantizeConfig
from ppcl.config.training import DistillConfig, FinetuneConfig, PretrainConfig, WatchConfig
from ppcl.options import option


@dataclass
class Config:
    """The root of the configuration, which `conf/config.yaml` fills.

    `name`: the run's name. Its folder is `paths.runs_dir`/`name`.
    `stages`: the stages to run. They run in the order of `ppcl.stages.STAGES`, however they are listed.
    `run`: the folder of an earlier run to continue. Its recorded configuration applies, except for the keys that this
        command gives. The recorded configuration always has None here.
    `explain`: print how much memory, disk and time each stage is estimated to need, and run none of them.
    `seed`: the seed of the first picture that `stages=[generate]` draws. Picture number n has the seed `seed` + n.
    """

    name: str = MISSING
    stages: list[str] = MISSING
    run: str | None = None
    explain: bool = False
    seed: int = option(42, least=0, most=MOST_SEED)
    model: ModelConfig = field(default_factory=ModelConfig)
    intervals: IntervalsConfig = field(default_factory=IntervalsConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    width: WidthConfig = field(default_factory=WidthConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    published: ImportConfig = field(default_factory=ImportConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
