#!/bin/sh
# against_removal.sh flux|edit [SEED..]: all ways, three seeds; interrupted, it goes on where it was.
set -e
cd "$(dirname "$0")/.."
name=$1
shift
for seed in ${@:-10 11 12}; do
    .venv/bin/ppcl --multirun "experiment=$name" "data.train_seed=$seed" $ARGS
    # A student that learns nothing is the first block of its interval: plain removal. Tuned as long, and for the steps of both.
    for steps in 100 400; do
        .venv/bin/ppcl --multirun "experiment=$name" "name=${name}_removed_$steps" "data.train_seed=$seed" \
            distill.steps=1 distill.lr=0 "finetune.steps=$steps" "generate.variants=[teacher,ppcl-finetuned]" $ARGS
    done
done
.venv/bin/python experiments/against_removal.py "$name"
