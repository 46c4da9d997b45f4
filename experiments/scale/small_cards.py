"""Compare what saves memory on small cards with plain training: the held-out losses that it ends with.

    python -m experiments.scale.small_cards

The embedded teacher, the standard recipe, and the default batches of small models. Every way trains with the same data.
`another seed` trains students and projectors plainly with other data, which tells how much of a difference is chance.
Students with 8-bit states are therefore trained with three seeds, each beside plain ones of the same seed.
`runs/bench/small_cards` keeps what was trained, so that a command that was stopped goes on.
"""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import ppcl
from experiments.common import write_csv
from experiments.scale.models import STACK
from experiments.scale.replay import PAIRS
from ppcl.artifacts.files import read_json

HERE = Path(__file__).parent
FOLDER = Path("runs/bench/small_cards")
SEEDS = (10, 11, 12)
STEPS = {"depth": 200, "width": 100, "finetune": 150}
PROJECTORS = ("5.ffn", "9.ffn", "14.ffn", "15.text", "19.text")
ACCUMULATE, STATES = "accumulate=4", "optimizer_states="
LOCAL = {
    "plain": [],
    "accumulate": [ACCUMULATE],
    "groups": ["groups=3"],
    "bfloat16 states": [STATES + "bfloat16"],
    "8-bit states": [STATES + "8bit"],
}
WITHOUT = "feature_weight=0"  # as recorded velocities need it
TUNED = {
    "plain": [],
    "accumulate": [ACCUMULATE],
    "8-bit states": [STATES + "8bit"],
    "plain, output alone": [WITHOUT],
    "recorded": [WITHOUT, "recorded=true"],
    "recorded, 8-bit states": [WITHOUT, "recorded=true", STATES + "8bit"],
    "AdamW": ["optimizer=adamw", "relative_update=null", "lr=2e-3", "muon_lr=null"],
    "AdamW, 8-bit states": ["optimizer=adamw", "relative_update=null", "lr=2e-3", "muon_lr=null", STATES + "8bit"],
}
# What a way is compared with, if not with `plain`.
REFERENCES = dict.fromkeys(("plain, output alone", "recorded", "recorded, 8-bit states"), "plain, output alone")
REFERENCES |= dict.fromkeys(("AdamW", "AdamW, 8-bit states"), "AdamW")


def train(name: str, seed: int, stages: list[str], *settings: str) -> ppcl.Results:
    """Train what does not exist yet."""
    pairs = [list(pair) for pair in PAIRS]
    given = [f"intervals.{STACK}={pairs}".replace(" ", ""), "width.source=given"]
    given.append(f"width.names=[{','.join(f'{STACK}.{projector}' for projector in PROJECTORS)}]")
    steps = [f"distill.steps={STEPS['depth']}", f"width.steps={STEPS['width']}", f"finetune.steps={STEPS['finetune']}"]
    quiet = ["trainer=cpu", "trainer.progress=false", "logger=none", f"paths.runs_dir={FOLDER}"]
    places = [f"name={name}", f"paths.cache_dir={FOLDER}/cache", f"data.train_seed={seed}"]
    command = ["model=tiny_qwen_image", f"stages=[{','.join(stages)}]", *given, *steps, *quiet, *places, *settings]
    return ppcl.run(command)


def losses_of(results: ppcl.Results) -> dict[str, dict[str, float]]:
    """Return the held-out losses that a run ended with, by stage and plug."""
    found: dict[str, dict[str, float]] = {"depth": {}, "width": {}}
    for path in sorted((results.folder / "plugs").glob("*.safetensors")):
        losses = read_json(path.with_suffix(".json"), "The record of a plug")["losses"]
        found["depth" if "-" in path.stem else "width"][path.stem] = losses["heldout_loss"]
    return found


def local(way: str, seed: int, stages: tuple[str, ...] = ("depth", "width")) -> dict[str, dict[str, float]]:
    """Train students and projectors in this way; return their held-out losses by stage and plug."""
    name, settings = f"{way.replace(' ', '-')}-{seed}", [f"distill.{setting}" for setting in LOCAL[way]]
    found = losses_of(train(name, seed, list(stages), *settings))
    return {stage: found[stage] for stage in stages}


def tuned(way: str, seed: int) -> dict[str, float]:
    """Fine-tune the plain students and projectors of `seed` in this way; return the held-out velocity error."""
    name = f"tuned-{way.replace(', ', '-').replace(' ', '-')}-{seed}"
    base = f"paths.base_run={FOLDER}/plain-{seed}"
    results = train(name, seed, ["finetune"], base, *(f"finetune.{setting}" for setting in TUNED[way]))
    record = read_json(results.folder / "finetuned" / "ppcl.json", "A tuned model's record")
    return {"output": record["velocity_error"]["after"]}


def row(stage: str, way: str, losses: dict[str, float], plain: dict[str, float], **facts: Any) -> dict[str, Any]:
    """Return a row of the table: the summed loss, its ratio to plain training's, and that of the furthest plug."""
    single = [losses[name] / plain[name] for name in plain]
    found = {
        "stage": stage,
        "way": way,
        **facts,
        "steps": STEPS[stage],
        "loss": sum(losses.values()),
        "ratio": sum(losses.values()) / sum(plain.values()),
        "furthest": max(single, key=lambda ratio: abs(ratio - 1)),
        "date": date.today().isoformat(),
    }
    print("  ".join(f"{value:.4f}" if isinstance(value, float) else f"{value}" for value in found.values()), flush=True)
    return found


def main() -> None:
    """Train in every way, print a line for each and write them to `small_cards.csv`."""
    rows: list[dict[str, Any]] = []
    first, plain = SEEDS[0], {seed: local("plain", seed) for seed in SEEDS}
    for way in LOCAL:
        rows += [row(stage, way, found, plain[first][stage], seed=first) for stage, found in local(way, first).items()]
    for seed in SEEDS[1:]:
        students = local("8-bit states", seed, ("depth",))["depth"]
        rows.append(row("depth", "8-bit states", students, plain[seed]["depth"], seed=seed))
        for stage, losses in plain[seed].items():
            rows.append(row(stage, "another seed", losses, plain[first][stage], seed=seed))
    errors = {way: tuned(way, first) for way in TUNED}
    for way, error in errors.items():
        rows.append(row("finetune", way, error, errors[REFERENCES.get(way, "plain")], seed=first))
    write_csv(HERE / "small_cards.csv", rows)


if __name__ == "__main__":
    main()
