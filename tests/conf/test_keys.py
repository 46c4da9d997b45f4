"""No numeric key takes a value without sense, or ends in a traceback. `make battery` tries all of them."""

import random

import pytest

from tests.battery.keys import Battery, numeric_keys, overrides

TRIED = 40  # of all, which take a minute


@pytest.fixture(scope="module")
def battery():
    return Battery()


def test_numeric_keys_end_in_acceptance_or_in_a_sentence_that_names_them(battery):
    for override in random.Random(0).sample(overrides(), TRIED):
        trial = battery(override)
        assert trial.accepted or trial.named, (override, trial.error or trial.sentence)


def test_no_key_takes_nan_or_infinity(battery):
    keys = random.Random(1).sample([*numeric_keys()], 6)
    for key, form in [*keys, ("+model.sampling.scheduler.shift", "{}"), ("distill.losses.direction", "{}")]:
        for value in ("nan", "inf"):
            assert battery(f"{key}={form.format(value, value)}").named, key


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed=-1", "at least 0"),
        ("distill.beta1=2", "below 1"),
        ("method.num_samples=0", "at least 1"),
        ("trainer.num_threads=0", "at least 1"),
        ("data.shift=0", "above 0"),
        ("distill.max_grad_norm=-1", "above 0"),
        ("budget.params=1.5", "more than the whole model"),
        ("budget.params=60", "more than the whole model"),
        ("budget.latency_ratio=1.5", "at most 1"),
        ("trainer.accelerator=tpu", "auto, cpu, gpu, cuda"),
        ("intervals.transformer_blocks=[[1.7,3]]", "whole number"),
        ("intervals.transformer_blocks=[[1,3.0]]", "whole number"),
        ("method.start=100", "leaves no interval"),
        ("method.end=0", "at least 1"),
        ("method.num_remove=1000", "exceeds"),
        ("model.arch.num_layers=1.7", "no number of blocks"),
        ("+model.arch.foo=1", "no setting"),
        ("+foo=1", "foo is no configuration key"),
        ("~foo", "foo is no configuration key"),
        ("+seed=1", "there already"),
        ("name=null", "must have a value"),
        ("generate.prompt=${x}", "write \\${x} for the text"),
    ],
)
def test_a_value_without_sense_is_refused(battery, override, said):
    trial = battery(override)
    assert trial.sentence is not None, trial
    assert said in trial.sentence


@pytest.mark.parametrize("override", ["budget.params=0.6", "budget.params=1", "budget.params=6e9", "seed=4294967295"])
def test_a_value_with_sense_is_taken(battery, override):
    assert battery(override).accepted
