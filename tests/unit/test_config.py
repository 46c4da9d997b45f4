"""Keys of the configuration: what they declare, and what of them goes into fingerprints."""

from dataclasses import dataclass

import pytest

from ppcl.artifacts.files import write_json
from ppcl.artifacts.headers import Header, is_current
from ppcl.config import Config, DistillConfig
from ppcl.errors import UsageError
from ppcl.options import Bounds, declared, identity, option


@dataclass
class Yesterday(DistillConfig):
    """The settings of a student as they are today."""


@dataclass
class Tomorrow(Yesterday):
    """The same with one key more, which does by default what was done without it."""

    smoothing: float = option(0.0, before=0.0)


@dataclass
class DayAfter(Yesterday):
    """The same with another default, once the new key has proved itself."""

    smoothing: float = option(0.5, before=0.0)


def header(settings):
    return Header("ppcl.plug", {"interval": [3, 5], "distill": identity(settings)})


@pytest.fixture
def plug(tmp_path):
    """`plug(settings)`: the record of a plug made with these settings."""

    def make(settings):
        path = tmp_path / "transformer_blocks.3-5.json"
        write_json(path, header(settings).to_json())
        return path

    return make


def test_a_plug_of_before_a_key_was_added_is_still_taken(plug):
    assert is_current(plug(Yesterday()), header(Tomorrow()))


def test_a_plug_of_before_a_key_was_added_is_refused_where_the_key_does_something(plug):
    with pytest.raises(UsageError, match=r"distill\.smoothing=unset, now 0\.1"):
        is_current(plug(Yesterday()), header(Tomorrow(smoothing=0.1)))


def test_a_plug_made_under_an_old_default_is_refused_under_the_new_one(plug):
    for old in (Yesterday(), Tomorrow()):
        with pytest.raises(UsageError, match=r"distill\.smoothing=unset, now 0\.5"):
            is_current(plug(old), header(DayAfter()))


def test_the_old_behaviour_keeps_its_fingerprint_under_a_new_default(plug):
    assert is_current(plug(Yesterday()), header(DayAfter(smoothing=0.0)))


def test_a_changed_default_refuses_what_was_made_under_the_old_one(plug):
    @dataclass
    class Changed(Yesterday):
        lr: float = option(5e-4, least=0)

    with pytest.raises(UsageError, match=r"distill\.lr=1e-05, now 0\.0005"):
        is_current(plug(Yesterday()), header(Changed()))


def test_what_changes_no_result_is_in_no_fingerprint():
    changed = DistillConfig(checkpoint_every=7, gradient_checkpointing=False, intervals=["3-5"], replay=4)
    assert header(changed).fingerprint == header(DistillConfig()).fingerprint


def keys():
    return {item.name: item for item in declared(Config(name="run", stages=["plan"]))}


def test_every_key_is_declared_under_its_full_name():
    found = keys()
    assert found["distill.lr"].bounds == Bounds(above=0, most=1000)
    assert found["finetune.optimizer"].choices == ("adamw", "muon")
    assert "model.sampling.height" in found


def test_every_number_declares_its_bounds():
    """But for blocks, which are compared with those of the model."""
    without = {name for name, item in keys().items() if item.numeric and item.bounds == Bounds()}
    stacks = ("transformer_blocks", "single_transformer_blocks")
    blocks = {f"width.{stack}.{kind}" for stack in stacks for kind in ("text", "ffn")}
    assert without == blocks | {f"intervals.{stack}" for stack in stacks}


def test_defaults_lie_within_their_own_bounds():
    for name, item in keys().items():
        value = item.value
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        values = [each for each in items if each is not None]
        for each in values:
            if isinstance(each, (int, float)) and not isinstance(each, bool):
                item.bounds.check(name, each)
        assert item.choices is None or set(values) <= set(item.choices), name


@pytest.mark.parametrize(
    ("bounds", "value", "said"),
    [
        (Bounds(least=0), -1, "key=-1 must be at least 0."),
        (Bounds(least=0, most=1), 2.5, "key=2.5 must be at least 0 and at most 1."),
        (Bounds(above=0), 0.0, "key=0 must be above 0."),
        (Bounds(above=0, below=1), 1.0, "key=1 must be above 0 and below 1."),
        (Bounds(), float("nan"), "key=nan must be a finite number."),
        (Bounds(least=0), float("inf"), "key=inf must be a finite number and at least 0."),
        (Bounds(least=1), 10**12, "key=1000000000000 must be at least 1 and at most 1000000000."),
    ],
)
def test_a_number_out_of_bounds_is_one_sentence(bounds, value, said):
    with pytest.raises(UsageError) as raised:
        bounds.check("key", value)
    assert str(raised.value) == said


@pytest.mark.parametrize(
    ("bounds", "value"),
    [(Bounds(least=0), 0), (Bounds(most=1), 1.0), (Bounds(most=2**32), 2**32), (Bounds(), -1e30), (Bounds(), 10**9)],
)
def test_a_number_at_its_bound_is_taken(bounds, value):
    bounds.check("key", value)
