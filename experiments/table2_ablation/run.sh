#!/bin/sh
# Every row for the seeds given (10 11 12), before and after two fine-tunings of its plugs.
# Interrupted, it goes on where it was.
set -e
cd "$(dirname "$0")/../.."
for seed in ${@:-10 11 12}; do
    for row in baseline lp_a lp lp_b dp wp_text wp_ffn; do
        .venv/bin/ppcl --multirun "experiment=table2_$row" "data.train_seed=$seed"
        .venv/bin/ppcl --multirun "experiment=table2_$row" "data.train_seed=$seed" finetune.steps=50,200 \
            "stages=[finetune,generate,evaluate]" "generate.variants=[teacher,ppcl-finetuned]" \
            "paths.base_run=runs/table2/$row/$seed" "hydra.sweep.subdir=$seed-\${finetune.steps}"
    done
done
