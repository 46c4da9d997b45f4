"""Checks, when a command starts, that each stage will find its inputs, on disk or from an earlier stage of the command.

Without these checks a command could train for hours before its last stage fails for a missing file.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

from ppcl import parallel
from ppcl.artifacts.files import read_json
from ppcl.artifacts.headers import Header, is_current
from ppcl.artifacts.plan import plug_name, projector_name, read_plug_name
from ppcl.context import Run
from ppcl.data.recording.record import check_prompts
from ppcl.errors import UsageError
from ppcl.export.hub import check_token
from ppcl.export.quantized import require_bitsandbytes
from ppcl.methods.registry import load_method
from ppcl.options import identity
from ppcl.stages import STAGES
from ppcl.tracing import check_traceable
from ppcl.tracking.loggers import check_logger
from ppcl.validation.model import has_vae, model_folder, needs_weights
from ppcl.validation.pruning import budget_of
from ppcl.variants.variants import another_run, finetuned_folder, newest

# Stages that build variants, and so need students and projectors.
_ARRANGING = ("finetune", "export", "quantize", "generate", "evaluate", "report")

# What a report shows: the stages that make it, and the files that they leave.
_SHOWN = {"pretrain", "detect", "depth", "width", "plan", "import_published", "finetune", "generate"}
_LEFT = ("plan/*.json", "plugs/*.json", "training/*.json", "images/*/*/manifest.json")


def check_needs(run: Run) -> None:
    """Raise `UsageError` for the first stage of the command that would lack an input, a device or a library.

    Loads no weights, and of a teacher reads the names and shapes of its tensors alone.
    """
    _check_machine(run)
    check_traceable(run)
    made: set[str] = set()
    for stage in STAGES:  # in the order in which they run
        if stage in run.config.stages:
            _check_stage(run, stage, made)
            made.add(stage)
    if run.teacher.files.in_place and _needs_transformer(run):
        run.teacher.files.check()


def _check_machine(run: Run) -> None:
    accelerator = run.config.trainer.accelerator
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UsageError(f"trainer.accelerator={accelerator}: torch finds no GPU here; use trainer.accelerator=cpu.")
    check_logger(run.config)
    scheme, stages = run.config.quantize.scheme, run.config.stages
    if "quantize" in stages and scheme in ("int8", "int4") and find_spec("torchao") is None:
        raise UsageError(f"quantize.scheme={scheme} needs torchao: pip install 'torchao>=0.18'.")
    if "quantize" in stages and scheme == "nf4":
        require_bitsandbytes()
    if "export" in stages and run.config.export.push_to_hub is not None:
        check_token(run.config.export.push_to_hub)
    folder = model_folder(run.config.model)
    needing = [stage for stage in run.config.stages if STAGES[stage].encoders == "device"]
    if run.config.data.name == "prompts":  # recorded up to the latents, which no VAE decodes
        needing = [stage for stage in needing if stage != "cache"]
    if folder is not None and needing and not has_vae(folder):
        raise UsageError(
            f"'stages=[{needing[0]}]' draws or encodes pictures, and model.path={run.config.model.path} has no VAE: "
            "give a folder of the whole pipeline, or leave that stage out."
        )


def check_teacher(run: Run) -> None:
    """Refuse a teacher whose files do not fit together or hold numbers that are not finite, if a stage needs them.

    Its files are downloaded if they are on the Hub, and read once, by rank 0, if they are new or have changed. Large
    ones take minutes, so this is the last check. The other ranks take what rank 0 remembers.
    """
    config, teacher = run.config, run.teacher
    encoded = config.data.stored and any(stage == "cache" or STAGES[stage].data for stage in config.stages)

    def read() -> None:
        if _needs_transformer(run):
            teacher.files.check()
            _ = teacher.identity
        if encoded:
            _ = teacher.encoder_identity

    if config.model.path is None or "pretrain" in config.stages:
        return
    with parallel.together():
        if parallel.share()[0] == 0:
            read()
    read()
    if any(STAGES[stage].encoders != "nowhere" for stage in config.stages if needs_weights(config, stage)):
        teacher.check_encoding()


def _needs_transformer(run: Run) -> bool:
    """Whether a stage of the command needs the weights of the teacher's transformer."""
    config = run.config
    if config.model.path is None or "pretrain" in config.stages:
        return False
    needing = [STAGES[stage] for stage in config.stages if needs_weights(config, stage)]
    measured = "plan" in config.stages and budget_of(config) is not None
    recorded = "cache" in config.stages and config.data.name == "prompts"
    return measured or recorded or any(stage.transformer != "nowhere" for stage in needing)


def _check_tuned(run: Run) -> None:
    """Raise `UsageError` if `finetuned/` was made with other settings, before earlier stages train for nothing."""
    folder, mode = finetuned_folder(run), run.config.distill.mode
    path = folder / "ppcl.json"
    if not path.exists():
        return
    made_from = read_json(path, "The record", "finetune").get("made_from", {})
    students = any(read_plug_name(name) for name in made_from.get("plugs", {}))
    if students if mode == "none" else "removed" in made_from:
        was, trains = ("with", "none") if students else ("without", "some")
        raise UsageError(
            f"{path} was made {was} students, and distill.mode={mode} trains {trains}: {another_run(run, folder)}."
        )
    now = Header("ppcl.finetuned", made_from | {"finetune": identity(run.config.finetune)})
    is_current(path, now, another_run(run, folder))


def _check_exported(run: Run, made: set[str]) -> None:
    """Raise `UsageError` if `export/` holds another variant than this command is about to make and export."""
    path = run.folder / "export" / "ppcl.json"
    variant = run.config.export.variant or newest(run, made)
    if variant is not None and path.exists():
        made_from = read_json(path, "The record", "export").get("made_from", {})
        is_current(path, Header("ppcl.export", made_from | {"variant": variant}), another_run(run, path.parent))


def _check_stage(run: Run, stage: str, made: set[str]) -> None:
    """Check the inputs of one stage. `made`: the stages that run before it in this command."""
    config = run.config
    budgeted = stage == "plan" and budget_of(config) is not None
    if stage == "cache" and config.data.name == "prompts" and config.model.path is not None:
        check_prompts(run)
    if stage == "detect":
        if not run.plan_path.exists():  # an earlier plan is reused
            _check_detection(run, made)
    elif stage in ("boundaries", "depth"):
        _check_intervals(run, stage, made)
    elif stage == "width" or budgeted:
        _check_intervals(run, stage, made)
        _check_students(run, stage, made)
        if budgeted:
            _check_projectors(run, stage, made)
    elif stage in _ARRANGING:
        if stage == "finetune":
            _check_tuned(run)
        if stage == "export":
            _check_exported(run, made)
        names = _variants(run, stage)
        arranged = {_quantized_base(run) if name == "ppcl-quantized" else name for name in names}
        if arranged - {"teacher"}:
            _check_intervals(run, stage, made)
        if any(name.startswith("ppcl") for name in arranged):
            _check_students(run, stage, made)
        if {"ppcl-width", "ppcl-planned", "ppcl-finetuned"} & arranged:
            _check_projectors(run, stage, made)
        if budget_of(config) and {"ppcl-planned", "ppcl-finetuned"} & arranged and "plan" not in made:
            _check_choice(run, stage)
        for name, maker in (("ppcl-finetuned", "finetune"), ("ppcl-quantized", "quantize")):
            record = run.folder / {"finetune": "finetuned", "quantize": "quantized"}[maker] / "ppcl.json"
            if name in names and maker not in made and not record.exists():
                raise UsageError(
                    f"'stages=[{stage}]' needs {name}, and {record} does not exist: add {maker} to stages."
                )
    if stage in ("evaluate", "report") and "teacher" not in (config.generate.variants or ["teacher"]):
        raise UsageError(
            f"'stages=[{stage}]' compares variants with the teacher: add teacher to "
            f"'generate.variants=[{','.join(config.generate.variants or [])}]'."
        )
    trained = {"depth", "width", "finetune", "quantize"} & made  # makes a model that has not been drawn yet
    if stage == "evaluate" and "generate" not in made and (trained or not (run.folder / "images").is_dir()):
        raise UsageError(
            f"'stages=[evaluate]' scores pictures, and {run.folder / 'images'} has none yet: add generate to stages."
        )
    if stage == "report" and "evaluate" not in made:
        _check_reportable(run, trained=bool(trained), made=made)
    needs_export = stage == "remap_lora" and config.lora.model is None and "export" not in made
    if needs_export and not (run.folder / "export").is_dir():
        raise UsageError("'stages=[remap_lora]' needs an exported model: add export to stages, or give lora.model.")


def _check_detection(run: Run, made: set[str]) -> None:
    """Refuse a method with keys that it does not read, and one that lacks its probes."""
    method = load_method(run.config.method)
    method.check_keys(run.family.facts)
    if method.needs_probes and "probe" not in made and not (run.probe_folder / "probes.json").exists():
        raise UsageError("'stages=[detect]' reads probes, and there are none for this model: add probe to stages.")


def _check_reportable(run: Run, *, trained: bool, made: set[str]) -> None:
    """Refuse a report on nothing, and one with scores of models that this command is about to replace.

    `trained`: whether it makes new ones. `made`: the stages that run before the report.
    """
    if trained and any((run.folder / "scores").rglob("*.json")):
        raise UsageError(
            f"'stages=[report]' shows scores, and those in {run.folder / 'scores'} are older than what this command "
            "trains: add generate and evaluate to stages."
        )
    if made & _SHOWN or any(any(folder.glob(left)) for folder in (run.folder, run.base) for left in _LEFT):
        return
    raise UsageError(
        f"'stages=[report]' shows scores, pictures, losses and plans, and {run.folder} has none yet: add evaluate to "
        "stages."
    )


def _variants(run: Run, stage: str) -> list[str]:
    """Return the variants that a stage is asked for by name, or none if it takes its default ones."""
    config = run.config
    if stage == "finetune":
        return ["ppcl-planned"]
    if stage in ("export", "quantize"):
        asked = config.export.variant if stage == "export" else config.quantize.variant
        return ["ppcl-planned"] if asked is None and "import_published" not in config.stages else [asked or "teacher"]
    return config.generate.variants or []


def _quantized_base(run: Run) -> str:
    """The variant that this run's quantised model is made from, or is going to be."""
    record = run.folder / "quantized" / "ppcl.json"
    if record.exists():
        return str(read_json(record, "The record", "quantize")["made_from"]["variant"])
    return run.config.quantize.variant or "ppcl-planned"


def _check_choice(run: Run, stage: str) -> None:
    if not run.known_choice_path.exists():
        raise UsageError(f"'stages=[{stage}]' takes the budget's choice, and there is none yet: add plan to stages.")


def _check_intervals(run: Run, stage: str, made: set[str]) -> None:
    if not {"detect", "import_published"} & made and not run.has_intervals:
        raise UsageError(
            f"'stages=[{stage}]' needs intervals: add probe and detect to stages, or give intervals=, or name the run "
            "that has detected some by paths.base_run."
        )


def _check_students(run: Run, stage: str, made: set[str]) -> None:
    if run.config.distill.mode == "none" or {"depth", "import_published"} & made:
        return
    if not run.has_intervals:  # this command is about to detect them
        raise UsageError(f"'stages=[{stage}]' needs a student for every interval: add depth to stages.")
    names = [plug_name(stack, pair) for stack, pairs in run.intervals.items() for pair in pairs]
    _check_records(run, stage, "depth", names)


def _check_projectors(run: Run, stage: str, made: set[str]) -> None:
    if run.config.width.source == "none" or {"width", "import_published"} & made:
        return
    source = run.config.width.source
    if not run.has_intervals or (source == "auto" and not run.width_path.exists()):
        raise UsageError(f"'stages=[{stage}]' needs the projectors of width={source}: add width to stages.")
    names = [
        projector_name(stack, index, kind)
        for stack, sets in run.width.items()
        for kind, indices in sets.items()
        for index in indices
    ]
    _check_records(run, stage, "width", names)


def _check_records(run: Run, stage: str, maker: str, names: list[str]) -> None:
    missing = [name for name in names if not (run.plugs_folder / f"{name}.json").exists()]
    if missing:
        raise UsageError(
            f"'stages=[{stage}]' needs {', '.join(missing)}, which {run.plugs_folder} does not have: run "
            f"'stages=[{maker}]' first, or add {maker} to stages."
        )
