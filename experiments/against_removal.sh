#!/bin/sh
# against_removal.sh flux|edit [SEED..]: both ways, three seeds; interrupted, it goes on where it was.
set -e
cd "$(dirname "$0")/.."
name=$1
shift
for seed in ${@:-10 11 12}; do
    .venv/bin/ppcl --multirun "experiment=$name" "data.train_seed=$seed" $ARGS
    # A student that learns nothing is the first block of its interval: plain removal. It is tuned for the steps of both.
    .venv/bin/ppcl --multirun "experiment=$name" "name=${name}_removed" "data.train_seed=$seed" \
        distill.steps=1 distill.lr=0 finetune.steps=400 "generate.variants=[teacher,ppcl-finetuned]" $ARGS
done
.venv/bin/python experiments/against_removal.py "$name"
