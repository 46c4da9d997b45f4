"""Checks the configuration once, before anything heavy is loaded. Every error names the key, its value and a remedy.

After these checks stages work with plain dataclasses, and do not check values again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ppcl.attention import check_attention
from ppcl.benchmarks.base import benchmark_names
from ppcl.config import Config
from ppcl.errors import UsageError
from ppcl.methods.registry import load_method, method_names
from ppcl.options import check_options, unknown_key
from ppcl.sentences import of_key
from ppcl.stages import STAGES
from ppcl.validation.data import check_data
from ppcl.validation.finetune import check_finetune
from ppcl.validation.model import check_model, check_pretrain, check_size, check_streaming
from ppcl.validation.outputs import (
    check_adapter,
    check_benchmark,
    check_export,
    check_generate,
    check_import,
    check_lora,
    check_quantize,
    resolve_benchmark,
)
from ppcl.validation.prompts import read_prompts
from ppcl.validation.pruning import check_budget, check_method, check_width_group, resolve_intervals
from ppcl.validation.strategy import check_strategy, resolve_precision
from ppcl.validation.values import one_of


def parse(raw: DictConfig) -> Config:
    """Return the composed Hydra configuration as a checked `Config`; raises `UsageError` for a wrong key or value."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), raw)
        losses = OmegaConf.select(raw, "distill.losses")
        if losses is not None:  # merging adds the schema's own loss to a record that is without it
            OmegaConf.update(merged, "distill.losses", losses, merge=False)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "the configuration"
        raise UsageError(of_key(key, str(error))) from None
    assert isinstance(config, Config)
    for key in _unknown(config, raw):
        raise UsageError(unknown_key(key, config))
    check(config)
    return config


def _unknown(group: Any, raw: DictConfig, prefix: str = "") -> Iterator[str]:
    """Yield every key that the configuration does not have: `+key=value` gets past Hydra."""
    known = {item.name for item in fields(group)}
    for key in raw:
        if key not in known:
            yield f"{prefix}{key!s}"
        elif is_dataclass(value := getattr(group, str(key))):
            yield from _unknown(value, raw[key], f"{prefix}{key}.")


def check_rates(config: Config) -> None:
    """Check that each training has its learning rates from one key; raises `UsageError`."""
    distill, width, finetune = config.distill, config.width, config.finetune
    for group, settings in (("distill", distill), ("width", width), ("finetune", finetune)):
        other = "distill" if group == "width" and width.relative_update is None else group
        relative = getattr(config, other).relative_update
        keys = ("lr", "muon_lr") if group == "finetune" else ("lr",)
        for key in keys:
            if getattr(settings, key) is not None and relative is not None:
                remedy = "finetune.relative_update=null" if group == "finetune" else "recipe=paper"
                raise UsageError(
                    f"{group}.{key}={getattr(settings, key)} has no effect with {other}.relative_update={relative}: "
                    f"leave it out, or add {remedy}, which trains with {group}.{key}."
                )
        if settings.lr is None and relative is None:
            usual = "0.01" if group == "finetune" else "0.025"
            raise UsageError(
                f"{group}.lr=null needs {other}.relative_update, such as {usual}: there is no learning rate."
            )
    if finetune.optimizer == "muon" and finetune.muon_lr is None and finetune.relative_update is None:
        raise UsageError("finetune.muon_lr=null needs finetune.relative_update, such as 0.01: Muon has no rate.")
    if distill.optimizer == "muon" and distill.relative_update is None:
        raise UsageError("distill.optimizer=muon needs distill.relative_update, such as 0.025; distill.lr is AdamW's.")


def check(config: Config) -> None:
    """Check values, their combinations, and the files that they name; raises `UsageError` for the first mistake.

    It also replaces `auto` values by what they stand for. No model is loaded.
    """
    if not config.stages:
        raise UsageError(f"'stages=[]' asks for nothing: name some of {', '.join(STAGES)}.")
    for stage in config.stages:
        one_of("stages", stage, tuple(STAGES))
    check_options(config)
    check_strategy(config)
    check_attention(config)
    method, distill = config.method, config.distill
    if config.benchmark.name != "auto":
        one_of("benchmark.name", config.benchmark.name, benchmark_names())
    one_of("method.rule", method.rule, method_names())
    if method.rule != "lp" or method.settings or method.num_remove is not None or method.params is not None:
        load_method(method)  # loads torch
    resolve_precision(config)
    if config.probe.init == "zero" and not config.probe.train_steps:
        raise UsageError("probe.init=zero needs probe.train_steps: probes that start from nothing have to learn.")
    if method.extend is not None and method.rule != "lp_b":
        raise UsageError(f"method.extend={method.extend} has no effect with method.rule={method.rule}: use lp_b.")
    seeds = (config.data.train_seed, config.data.calibration_seed, config.data.eval_seed)
    if len(set(seeds)) < 3:
        raise UsageError(
            f"data.train_seed, data.calibration_seed and data.eval_seed are {seeds}: make them different, or results "
            "are measured on samples that they were fitted to."
        )
    base = config.paths.base_run
    if base is not None and not Path(base).is_dir():
        raise UsageError(f"paths.base_run={base} is no folder: give that of a run whose plugs are to be used.")
    if config.generate.prompt_file is not None:
        read_prompts(Path(config.generate.prompt_file))
    check_rates(config)
    if not {*distill.losses} <= {"direction", "relative_per_token"}:
        from ppcl.distill.losses import LOSSES  # loads torch

        for name in distill.losses:
            if name not in LOSSES:
                raise UsageError(f"distill.losses.{name} is no loss; there are {', '.join(LOSSES)}.")
    if not any(distill.losses.values()) and not distill.magnitude_weight:
        raise UsageError(f"distill.losses={distill.losses} has no weight above 0: set distill.losses.NAME=1 for one.")
    # Losses of weight 0 are dropped, so that they do not change fingerprints.
    distill.losses = {name: weight for name, weight in distill.losses.items() if weight}
    if distill.mode == "none":
        for stage in ("depth", "boundaries"):
            if stage in config.stages:
                raise UsageError(
                    f"'stages=[{stage}]' cannot run with distill.mode=none, which trains no students: leave it out."
                )
        draws = {"generate", "evaluate", "report"} & set(config.stages)
        drawn = config.generate.variants or [] if draws else []
        for variant in ("ppcl-depth", "ppcl-mixed"):
            if variant in [*drawn, config.export.variant, config.quantize.variant]:
                raise UsageError(
                    f"distill.mode=none trains no students, so that there is no variant {variant}: use removed."
                )
    if distill.intervals == []:
        raise UsageError("distill.intervals=[] names no interval to train: name some, or leave it out for all.")
    if distill.groups != "auto" and (type(distill.groups) is not int or distill.groups < 1):
        raise UsageError(f"distill.groups={distill.groups} must be auto or a number from 1 on.")
    if distill.mode == "sequential" and distill.groups not in (1, "auto"):
        raise UsageError(
            f"distill.groups={distill.groups} needs distill.mode=parallel: a sequential chain trains as one."
        )
    if distill.mode == "sequential" and distill.intervals is not None:
        raise UsageError(
            f"distill.intervals={distill.intervals} needs distill.mode=parallel: a sequential chain trains as one."
        )
    if distill.from_boundaries and distill.mode == "sequential":
        raise UsageError("distill.from_boundaries=true needs distill.mode=parallel: a chain has no boundaries on disk.")
    if (distill.replay > 1 or distill.boundaries) and not distill.from_boundaries and "boundaries" not in config.stages:
        key = f"replay={distill.replay}" if distill.replay > 1 else f"boundaries={distill.boundaries}"
        raise UsageError(f"distill.{key} has no effect: add distill.from_boundaries=true, or leave it out.")
    if "pretrain" in config.stages:
        resolve_benchmark(config)
        check_pretrain(config)
        return
    check_model(config)
    check_size(config)
    check_streaming(config)
    check_data(config)
    resolve_benchmark(config)
    check_generate(config)
    if "finetune" in config.stages:
        check_adapter(config)
    intervals = resolve_intervals(config)
    if intervals is not None and "detect" in config.stages:
        raise UsageError(
            "intervals are given, so 'stages=[detect]' has nothing to find: leave out the stage or the intervals."
        )
    check_method(config)
    check_width_group(config, intervals)
    check_finetune(config, intervals)
    check_budget(config)
    if "export" in config.stages:
        check_export(config)
    check_quantize(config)
    if "remap_lora" in config.stages:
        check_lora(config)
    if "import_published" in config.stages:
        check_import(config)
    check_benchmark(config)
