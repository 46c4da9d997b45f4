"""Score the fine-tuned models on prompts that nothing was trained on and nothing was chosen by.

python -m experiments.half_size.fresh_prompts [EVAL_SEED ..]
"""

from __future__ import annotations

import sys
from pathlib import Path

from experiments.common import SEEDS, make_run, mean_and_spread, score_pipeline, write_csv
from ppcl.variants.switch import Switch
from ppcl.variants.variants import variants_of

HERE = Path(__file__).parent

EVAL_SEEDS = tuple(int(seed) for seed in sys.argv[1:]) or (5, 6, 7)
PER_CATEGORY = 60


def main() -> None:
    rows = []
    teacher: dict[int, float] = {}
    for seed in SEEDS:
        settings = ("experiment=half_size", f"data.train_seed={seed}", "trainer.compile=false")
        for eval_seed in EVAL_SEEDS:
            run = make_run(f"half_size/{seed}", *settings, f"data.eval_seed={eval_seed}")
            if eval_seed not in teacher:
                teacher[eval_seed] = score_pipeline(run, PER_CATEGORY)["overall"]
            (tuned,), plugs = variants_of(run, ["ppcl-finetuned"])
            switch = Switch(run, plugs)
            switch(tuned)
            scores = score_pipeline(run, PER_CATEGORY)
            switch.restore()
            drop = 100 * (1 - scores["overall"] / teacher[eval_seed])
            rows.append({"seed": seed, "eval_seed": eval_seed, "teacher": teacher[eval_seed], **scores})
            rows[-1]["drop_percent"] = drop
            print(rows[-1], flush=True)
    write_csv(HERE / "fresh_prompts.csv", rows)
    mean, spread = mean_and_spread(row["drop_percent"] for row in rows)
    print(f"drop {mean:.1f} +- {spread:.1f} percent over {len(SEEDS)} seeds and {len(EVAL_SEEDS)} sets of prompts")


if __name__ == "__main__":
    main()
