"""Writes the pruned pipeline as a folder that stock diffusers loads: stock class, fewer blocks."""

from __future__ import annotations

import json

from ppcl import __version__
from ppcl.artifacts import Header, atomic_folder, is_current, write_json
from ppcl.export.model_card import model_card
from ppcl.stages.run import Run
from ppcl.stages.variants import required_plugs
from ppcl.surgery.count import count_parameters
from ppcl.surgery.plugboard import Plugboard, load_student


def run(run: Run) -> None:
    folder = run.folder / "export"
    plugs = required_plugs(run)
    header = Header(
        "ppcl.export",
        {
            "model": run.model_identity,
            "students": {name: plug.header.fingerprint for name, plug in plugs.items()},
        },
    )
    if is_current(folder / "ppcl.json", header):
        run.say("export", f"reused {folder}")
        return
    pipeline, config = run.pipeline, run.config
    students = {name: load_student(run.family, pipeline.transformer, plug) for name, plug in plugs.items()}
    board = Plugboard(run.family, pipeline.transformer, run.intervals, students).all()
    provenance = {
        "version": __version__,
        "base_model": config.model.path,
        "revision": config.model.revision,
        "kept_layers": board.kept,
        "removed_intervals": {stack: [list(p) for p in pairs] for stack, pairs in run.intervals.items()},
        "method": config.method.name,
        "distill": f"{config.distill.mode}, init {config.distill.init}, {config.distill.steps} steps",
        "data": config.data.name,
        "fingerprint": header.fingerprint,
    }
    with atomic_folder(folder) as temporary:
        try:
            pipeline.transformer.register_to_config(ppcl=provenance)
            pipeline.save_pretrained(temporary)
            (temporary / "README.md").write_text(_card(run, board), encoding="utf-8")
        finally:
            board()
            pipeline.transformer.register_to_config(ppcl=None)
        write_json(temporary / "ppcl.json", header.to_json() | provenance)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    run.say("export", f"wrote {folder} ({size / 1e6:.1f} MB); DiffusionPipeline.from_pretrained loads it")


def _card(run: Run, board: Plugboard) -> str:
    config, sampling = run.config, run.config.model.sampling
    return model_card(
        count_parameters(run.family, config.model.arch, run.intervals)
        | {
            "title": f"{config.model.name} pruned by PPCL",
            "license": "apache-2.0",
            "base_model": config.model.path,
            "family": run.family.name,
            "version": __version__,
            "dtype": config.model.dtype,
            # diffusers loads a component of another package only where that package is imported
            "imports": "import ppcl\n" if type(run.pipeline.vae).__module__ == "ppcl" else "",
            "negative_prompt": sampling.negative_prompt,
            "true_cfg_scale": sampling.true_cfg_scale,
            "num_inference_steps": sampling.num_inference_steps,
            "height": sampling.height,
            "width": sampling.width,
            "seed": config.seed,
            "intervals": json.dumps(run.intervals),
            "students": len(board.names),
            "method": config.method.name,
            "kept_layers": json.dumps(board.kept),
        }
    )
