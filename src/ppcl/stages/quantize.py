"""Write the pruned pipeline with 8-bit or 4-bit weights, in the formats of diffusers' quantisation configs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from ppcl.artifacts.files import atomic_folder, read_json, temporary_folder, write_json
from ppcl.artifacts.folders import check_model, list_files
from ppcl.artifacts.headers import Header, is_current
from ppcl.context import Run
from ppcl.errors import UsageError
from ppcl.export.folder import base_name, forget_paths, keep_own_files, model_card_of, provenance_of
from ppcl.export.model_card import quantized_section, with_section
from ppcl.export.quantized import (
    declare,
    nf4_settings,
    require_bitsandbytes,
    require_torchao,
    round_to_nearest,
    split_linears,
    torchao_config,
    unambiguous,
    weight_bytes,
)
from ppcl.export.remote_code import add_code
from ppcl.export.rounding import round_blocks, round_linears
from ppcl.variants.switch import Switch
from ppcl.variants.variants import another_run, furthest, made_of, quantized_folder, variants_of

Fit = Callable[..., None]


def quantized_header(run: Run, name: str, arranged: dict[str, Any], finetuned: str | None) -> Header:
    """Return the header of a quantised model, which lists everything that its weights depend on.

    `arranged`: the students, projectors and removals of variant `name`. `finetuned`: the fingerprint of the fine-tuned
        model, if the variant is one. Calibration data is listed only for `quantize.rounding=least_squares`.
    """
    config, data = run.config.quantize, run.config.data
    settings: dict[str, Any] = {"scheme": config.scheme, "skip": sorted(config.skip)}
    if config.scheme != "nf4":
        settings |= {"group_size": config.group_size, "rounding": config.rounding}
    if config.rounding == "least_squares":
        settings["with"] = {key: getattr(config, key) for key in ("num_batches", "batch_size", "damping")}
        settings["with"]["data"] = {
            "name": data.name,
            "seed": data.calibration_seed,
            **run.data.levels,
        }
    made_from = {"model": run.teacher.identity, "variant": name, "finetuned": finetuned} | arranged
    return Header("ppcl.quantized", made_from | {"quantize": settings})


def run(run: Run) -> None:
    """Quantise `quantize.variant`, or by default this run's newest result, and write its pipeline to `quantized/`.

    Raises `UsageError` if the library that the scheme needs is missing, if no layer can be quantised, or if
    `quantized/` was made with other settings.
    """
    config, folder = run.config.quantize, quantized_folder(run)
    if config.scheme == "nf4":
        require_bitsandbytes()
    else:
        require_torchao(f"quantize.scheme={config.scheme}")
    name = config.variant or furthest(run)
    (variant,), plugs = variants_of(run, [name])
    header = quantized_header(run, name, made_of(variant, plugs), variant.finetuned)
    if is_current(folder / "ppcl.json", header, another_run(run, folder, variant)):
        check_model(folder, read_json(folder / "ppcl.json", "The record", "quantize"), "quantize")
        run.say("quantize", f"reused {folder}")
        return
    switch = Switch(run, plugs, alone=config.rounding == "least_squares")  # which runs the model on the device
    model = switch.standalone(variant)
    model.register_to_config(ppcl=provenance_of(run, variant, switch, header))
    before, params = weight_bytes(model), model.num_parameters()
    chosen, skipped, undivided = split_linears(model, config.skip, config.group_size)
    if not chosen:
        raise UsageError(
            f"quantize.group_size={config.group_size} divides the width of no layer that quantize.skip leaves: "
            f"{'their widths are ' + _widths(model, undivided) if undivided else 'it leaves none'}."
        )
    if undivided:
        run.say("quantize", f"group_size={config.group_size} does not divide {', '.join(undivided)}: left as they are")
    kept = unambiguous([*skipped, *undivided], chosen)
    try:
        if config.scheme == "nf4":
            model = _to_nf4(run, model, kept)
        else:
            quantize(run, model, chosen, torchao_config(config.scheme, config.group_size, kept))
        with atomic_folder(folder) as temporary:
            run.teacher.transformer = model
            run.teacher.pipeline.save_pretrained(temporary)
            keep_own_files(run, temporary)
            add_code(temporary)
            forget_paths(temporary, base_name(run))
            facts = {"params": params, "weight_bytes": weight_bytes(model), "unquantized_bytes": before}
            card = model_card_of(run, switch, name, params)
            section = quantized_section(config.scheme, run.config.model.dtype, facts["weight_bytes"], before)
            (temporary / "README.md").write_text(with_section(card, "quantized", section), encoding="utf-8")
            record = header.to_json() | facts | {"quantized": chosen} | list_files(temporary)
            write_json(temporary / "ppcl.json", record)
    finally:
        switch.restore()
    run.say(
        "quantize",
        f"wrote {name} to {folder}: {len(chosen)} layers in {config.scheme}, {len(skipped) + len(undivided)} as they "
        f"were; weights {before / 1e6:.2f} to {facts['weight_bytes'] / 1e6:.2f} MB",
    )


def _widths(model: Any, names: Iterable[str]) -> str:
    """Return the different input widths of the named layers, as a list in words."""
    return ", ".join(map(str, sorted({model.get_submodule(name).in_features for name in names})))


def quantize(run: Run, model: Any, chosen: list[str], config: Any, fit: Fit = round_linears) -> None:
    """Quantise the layers of `model` named in `chosen` with torchao, in place, and add the entry to its config.

    `config`: the quantisation config of diffusers. `fit`: with `quantize.rounding=least_squares`, rounds the weights of
        layers, given the second moments of their inputs.
    """
    settings = run.config.quantize
    if settings.rounding == "nearest":
        _to_nearest(model, chosen, config)
    else:
        blocks = tuple(f"{stack}." for stack in run.family.stacks)
        outside = [name for name in chosen if not name.startswith(blocks)]
        stream = run.data.stream(run.config.data.calibration_seed, settings.batch_size)
        steps = range(settings.num_batches)
        batches = [run.data.to_device(batch) for step in steps for batch in stream.divided(step, 1)]
        how = {"scheme": settings.scheme, "group_size": settings.group_size, "damping": settings.damping}
        show = partial(run.track, description="rounding")
        nearest = partial(_to_nearest, model, outside, config)
        round_blocks(run.family, model, batches, chosen, partial(fit, **how), prepare=nearest, each_block=show)
    declare(model, config)


def _to_nearest(model: Any, names: Iterable[str], config: Any) -> None:
    for name in names:
        round_to_nearest(model.get_submodule(name), config)


def _to_nf4(run: Run, model: Any, kept: list[str]) -> Any:
    """Return `model` in nf4.

    It is written to a temporary folder and loaded again, since bitsandbytes quantises a model as it loads it.
    """
    from diffusers import BitsAndBytesConfig

    config = BitsAndBytesConfig(**nf4_settings(run.teacher.dtype, kept))
    with temporary_folder(run.folder / "nf4") as folder:
        model.save_pretrained(folder)
        quantized = type(model).from_pretrained(
            folder, quantization_config=config, dtype=run.teacher.dtype, device_map={"": run.device}
        )
    return quantized.eval().requires_grad_(False)
