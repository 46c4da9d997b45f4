"""Puts the LoRAs of `generate.loras` onto every variant, with their block numbers mapped to its blocks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ppcl.components import loading_into
from ppcl.context import Run
from ppcl.errors import UsageError
from ppcl.layers import BlockMap
from ppcl.surgery.lora_files import Lora, read_file, read_lora
from ppcl.surgery.lora_layers import Layers, lora_loader
from ppcl.surgery.lora_marks import blocks_for, mark_of, read_mark, with_mark
from ppcl.surgery.plugboard import Plugboard
from ppcl.surgery.provenance import earlier_of, pruned_blocks
from ppcl.surgery.remap import map_blocks


@dataclass(frozen=True)
class TeacherLora:
    """A LoRA that was read for a run, and the map from the model whose blocks it counts to the teacher."""

    path: Path
    lora: Lora
    blocks: BlockMap


def read_loras(run: Run) -> list[TeacherLora]:
    """Return the LoRAs of `generate.loras`. No weights of the model are loaded.

    Raises `UsageError` for one that does not fit the full model, or counts the blocks of another one.
    """
    model, found = run.config.model, []
    provenance = model.arch.get("ppcl")
    teacher = BlockMap.of(provenance, run.num_layers)
    for path in map(Path, run.config.generate.loras):
        state, metadata = read_file(path)
        counts = run.config.lora.counts
        try:
            if counts == "pruned":
                if not teacher.renumbered:
                    raise UsageError(f"lora.counts=pruned: model.path={model.path} is no pruned model; leave it out.")
                blocks = teacher.since(teacher.kept)
            else:
                mark = None if counts == "full" else read_mark(state, metadata)
                blocks = blocks_for(mark, teacher, earlier_of(provenance))
            loader = lora_loader(run.family.facts, run.teacher.pipeline_class)
            layers = Layers.of_full_model(run.family.transformer_class, model.arch, blocks, loader)
            lora = read_lora(state, metadata, layers)
        except UsageError as error:
            raise UsageError(f"generate.loras={path}: {error}") from None
        found.append(TeacherLora(path, lora, blocks))
        if lora.left_out:
            run.say("generate", f"{path.name}: diffusers leaves out {len(lora.left_out)} parts, as {lora.left_out[0]}")
    return found


def put_on_loras(run: Run, loras: list[TeacherLora], board: Plugboard) -> None:
    """Load `loras` into the run's pipeline, whose blocks `board` has arranged."""
    pipeline, states = run.teacher.pipeline, {}
    modules = dict(run.teacher.transformer.named_modules())  # before PEFT wraps some of them
    for number, item in enumerate(loras):
        blocks = item.blocks.then(board.kept)
        mapped = map_blocks(item.lora.state, modules, blocks.kept, blocks.removed, source=run.config.lora.source)
        if mapped.state:
            states[f"lora_{number}"] = mapped.state
        if mapped.dropped:
            run.say("generate", f"{item.path.name}: {len(mapped.dropped)} modules are of blocks that are gone")
    own = pruned_blocks(run.teacher.transformer)  # by its config: of the teacher, or of a quantised model in its place
    mark = mark_of((own or board.teacher_blocks).kept)
    for name, state in states.items():
        pipeline.load_lora_weights(with_mark(state, mark), adapter_name=name, **loading_into(run.teacher.component))
    if states:
        pipeline.set_adapters(list(states), [run.config.generate.lora_scale] * len(states))
