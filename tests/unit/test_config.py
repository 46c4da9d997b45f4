"""Keys of the configuration: what they declare, and what of them goes into fingerprints."""

from dataclasses import dataclass, fields, is_dataclass

import pytest

from ppcl.artifacts.files import write_json
from ppcl.artifacts.headers import Header, is_current
from ppcl.config import Config, DistillConfig
from ppcl.errors import UsageError
from ppcl.options import declared, identity, option


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


def test_every_key_is_declared_under_its_full_name():
    found = {name: (least, choices) for name, _, least, choices in declared(Config(name="run", stages=["plan"]))}
    assert found["distill.lr"] == (0, None)
    assert found["finetune.optimizer"] == (None, ("adamw", "muon"))
    assert "model.sampling.height" in found


def test_defaults_lie_within_their_own_bounds():
    def check(group):
        for item in fields(group):
            value = getattr(group, item.name)
            if is_dataclass(value):
                check(value)
                continue
            least, choices = item.metadata.get("least"), item.metadata.get("choices")
            items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
            values = [each for each in items if each is not None]
            assert least is None or min(values, default=least) >= least, item.name
            assert choices is None or set(values) <= set(choices), item.name

    check(Config(name="run", stages=["plan"]))
