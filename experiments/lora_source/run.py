"""Put a LoRA of the teacher onto pruned models: which block's part of it should a student take?

The LoRA paints the background dark. Its effect on a pruned model is compared with its effect on the teacher, for each
value of `lora.source`, before and after fine-tuning.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from experiments.common import SEEDS, make_run, mean_and_spread, write_csv
from ppcl.benchmarks.shapes import evaluation_scenes, to_pixels
from ppcl.data.streams import ShapesStream
from ppcl.data.worlds import shapes
from ppcl.ops import flow_matching
from ppcl.pictures.drawing import draw
from ppcl.surgery.remap import SOURCES, map_blocks
from ppcl.variants.switch import Switch
from ppcl.variants.variants import variants_of

HERE = Path(__file__).parent

RANK, STEPS, BATCH, LR = 8, 300, 32, 2e-3
DARK = 60  # in place of shapes.BACKGROUND, 235
PER_CATEGORY = 10


class DarkStream(ShapesStream):
    """Draws batches of the shapes world with a dark background."""

    def __call__(self, step: int) -> Any:
        numbers = range(step * self.batch_size, (step + 1) * self.batch_size)
        scenes = [shapes.make_scene(self.seed, number) for number in numbers]
        images = [shapes.render(scene.objects) for scene in scenes]
        night = [np.where(image == shapes.BACKGROUND, DARK, image).astype(np.uint8) for image in images]
        latents, size = self.family.encode_images(self.pipeline, shapes.to_tensor(night))
        generator = self._generator(step)
        noise = torch.randn(latents.shape, generator=generator)
        sigmas = flow_matching.sample_sigmas(len(scenes), generator, scheme="logit_normal", shift=self.config.shift)
        dropped = torch.rand(len(scenes), generator=generator) < self.config.caption_dropout
        captions = ["" if drop else scene.caption for drop, scene in zip(dropped.tolist(), scenes, strict=True)]
        return self.family.training_batch(latents, self.prompts(captions), noise, sigmas, size)


def train_lora(run: Any) -> dict[str, torch.Tensor]:
    """Train a LoRA of the teacher's attention and MLP layers by flow matching on dark pictures; return its tensors."""
    transformer = run.teacher.pipeline.transformer
    torch.manual_seed(0)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "img_mlp.net.0.proj", "img_mlp.net.2"]
    transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR)
    stream = DarkStream(run.family, run.teacher.pipeline, run.config.data, 100, BATCH)
    for step in range(STEPS):
        batch = stream(step)
        loss = (transformer(**batch.inputs)[0] - batch.target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            print(f"LoRA step {step + 1}: loss {loss.item():.4f}", flush=True)
    state = get_peft_model_state_dict(transformer)
    transformer.delete_adapters("default")
    transformer.requires_grad_(False)
    return {f"transformer.{key}": value.detach().clone() for key, value in state.items()}


def look(
    run: Any, held_out: list[Any], target: list[torch.Tensor] | None
) -> tuple[dict[str, float], list[torch.Tensor]]:
    """Return measures by name, and the velocities on the held-out batches.

    The measures are the relative error of the velocities against `target`, if given, and the background's brightness.
    Scores are not among them, because the detector needs a light background.
    """
    transformer = run.teacher.pipeline.transformer
    with torch.no_grad():
        velocity = [transformer(**batch.inputs)[0] for batch in held_out]
    scenes = evaluation_scenes(run.config.data.eval_seed, PER_CATEGORY)
    captions = [scene.caption for scene in scenes]
    pictures = [to_pixels(drawn.picture) for drawn in draw(run, run.teacher.pipeline, captions, range(len(scenes)))]
    found = {"background": float(np.mean([np.median(picture) for picture in pictures]))}
    if target is not None:
        error = sum((a - b).square().sum().item() for a, b in zip(velocity, target, strict=True))
        found["velocity_error"] = error / sum(b.square().sum().item() for b in target)
    return found, velocity


def main() -> None:
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    state: dict[str, torch.Tensor] = {}
    for seed in SEEDS:
        run = make_run(f"half_size/{seed}", "experiment=half_size", f"data.train_seed={seed}", "trainer.compile=false")
        state = state or train_lora(run)
        stream = DarkStream(run.family, run.teacher.pipeline, run.config.data, 101, 64)
        held_out = [stream(step) for step in range(3)]
        plain, _ = look(run, held_out, None)
        run.teacher.pipeline.load_lora_weights(dict(state))
        whole, target = look(run, held_out, None)
        run.teacher.pipeline.unload_lora_weights()
        if seed == SEEDS[0]:
            rows.append({"model": "teacher", "seed": seed, "source": "none", "velocity_error": "", **plain})
            rows.append({"model": "teacher", "seed": seed, "source": "its own", "velocity_error": 0.0, **whole})
        variants, plugs = variants_of(run, ["ppcl-planned", "ppcl-finetuned"])
        switch = Switch(run, plugs)
        for variant in variants:
            for source in ("none", *SOURCES):
                transformer = switch(variant)
                if source != "none":
                    modules, board = dict(transformer.named_modules()), switch.board
                    mapped = map_blocks(state, modules, board.kept, board.removed_intervals, source=source)
                    run.teacher.pipeline.load_lora_weights(mapped.state)
                found, _ = look(run, held_out, target)
                if source != "none":
                    run.teacher.pipeline.unload_lora_weights()
                rows.append({"model": variant.name, "seed": seed, "source": source, **found})
                print(rows[-1], flush=True)
        switch.restore()
    columns = ("model", "seed", "source", "velocity_error", "background")
    write_csv(HERE / "results.csv", [{key: row[key] for key in columns} for row in rows])
    for model in ("ppcl-planned", "ppcl-finetuned"):
        for source in ("none", *SOURCES):
            found = [row for row in rows if (row["model"], row["source"]) == (model, source)]
            means = {key: mean_and_spread(row[key] for row in found) for key in columns[3:]}
            print(model, source, {key: f"{mean:.4g} +- {spread:.2g}" for key, (mean, spread) in means.items()})


if __name__ == "__main__":
    main()
