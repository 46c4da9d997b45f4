#!/bin/sh
# against_removal.sh flux|edit [SEED..]: all ways, three seeds; interrupted, it goes on where it was.
set -e
cd "$(dirname "$0")/.."
name=$1
shift
for seed in ${@:-10 11 12}; do
    .venv/bin/ppcl --multirun "experiment=$name" "data.train_seed=$seed" $ARGS
    # Plain removal of the same intervals, tuned as long, and for the steps of both.
    for steps in 100 400; do
        .venv/bin/ppcl --multirun "experiment=$name" "name=${name}_removed_$steps" "data.train_seed=$seed" \
            distill.mode=none "stages=[finetune,generate,evaluate]" "paths.base_run=runs/$name/$seed" \
            "finetune.steps=$steps" "generate.variants=[teacher,ppcl-finetuned]" $ARGS
    done
done
.venv/bin/python -m experiments.against_removal "$name"
