#!/bin/sh
# Every variant for three seeds, then results.csv. Interrupted, it goes on where it was.
set -e
cd "$(dirname "$0")/../.."
for row in baseline lp_a lp lp_b dp wp_text wp_ffn; do
    .venv/bin/ppcl --multirun "experiment=table2_$row" data.train_seed=10,11,12 "$@"
done
.venv/bin/python experiments/table2_ablation/collect.py
