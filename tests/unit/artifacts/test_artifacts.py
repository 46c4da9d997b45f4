import json
from dataclasses import replace

import pytest
import torch

from ppcl.artifacts.files import atomic_folder, atomic_path, check_safetensors, read_json, write_json
from ppcl.artifacts.headers import Header, fingerprint, first_difference, is_current
from ppcl.artifacts.plan import PruningPlan, plug_name, projector_name, read_plug_name, read_projector_name
from ppcl.artifacts.plugs import Plug, Projector, load_plugs, load_projectors
from ppcl.artifacts.probes import Probes
from ppcl.artifacts.tensors import read_tensors, write_tensors
from ppcl.errors import UsageError

MADE_FROM = {"model": {"family": "qwen_image", "dtype": "float32"}, "probe": {"ridge": 1e-6, "num_batches": 4}}


def probes(made_from=MADE_FROM):
    generator = torch.Generator().manual_seed(0)
    weights = {f"transformer_blocks.{i}.image": torch.randn(4, 4, generator=generator) for i in range(2)}
    biases = {key: torch.randn(4, generator=generator) for key in weights}
    return Probes(Probes.header_for(made_from), weights, biases, dict.fromkeys(weights, 0.25))


def plug(interval=(2, 4)):
    state = {"attn.to_q.weight": torch.randn(3, 3).T, "norm.bias": torch.zeros(3, dtype=torch.bfloat16)}
    return Plug(
        Header("ppcl.plug", {"interval": list(interval)}), "transformer_blocks", state, {"train": 0.5}, interval
    )


# Writing


def test_a_block_that_succeeds_leaves_the_file_alone_in_its_folder(tmp_path):
    target = tmp_path / "new" / "a.txt"
    with atomic_path(target) as temporary:
        temporary.write_text("whole")
        assert not target.exists()
    assert [path.name for path in target.parent.iterdir()] == ["a.txt"]
    assert target.read_text() == "whole"


def write_half(path, error):
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error


def test_a_block_that_raises_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError, match="disk on fire"):
        write_half(tmp_path / "a.txt", RuntimeError("disk on fire"))
    assert list(tmp_path.iterdir()) == []


def test_a_block_that_raises_leaves_the_old_file_as_it_was(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write_half(tmp_path / "a.txt", KeyboardInterrupt())
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "old")]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    """The old content survives a failure, and what a killed process left goes with the next attempt."""

    def write(text, error=None):
        with atomic_folder(tmp_path / "export") as temporary:
            (temporary / f"{text}.txt").write_text(text)
            if error:
                raise error

    write("old")
    (tmp_path / ".export.999999.tmp").mkdir()
    with pytest.raises(RuntimeError):
        write("half", RuntimeError())
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["export", "export/old.txt"]
    write("new")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["export", "export/new.txt"]


def test_json_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"object": object()})
    assert list(tmp_path.iterdir()) == []


# Reading


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "does not exist"),
        (b"{'single': 'quotes'}", "is not a JSON file"),
        (b"\xff\xfe", "is not a JSON file"),
        (b"[1, 2]", "does not hold a JSON object"),
        (b"", "is not a JSON file"),
        (b"[" * 100_000, "is not a JSON file"),
    ],
)
def test_a_bad_json_file_is_named(tmp_path, content, complaint):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=complaint) as caught:
        read_json(path, "The plan")
    assert str(caught.value).startswith(f"The plan {path} ")


@pytest.mark.parametrize("size", [0, 6, 20, -1])
def test_a_truncated_tensor_file_is_named(tmp_path, size):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"w": torch.randn(20, 20)}, {})
    whole = path.read_bytes()
    check_safetensors(path)
    path.write_bytes(whole[:size])
    for read in (check_safetensors, read_tensors):
        with pytest.raises(UsageError, match="truncated") as caught:
            read(path)
        assert str(path) in str(caught.value)


def test_a_missing_tensor_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"absent\.safetensors does not exist"):
        read_tensors(tmp_path / "absent.safetensors")


def test_tensors_come_back_bit_for_bit_with_dtype_and_metadata(tmp_path):
    tensors = {"a": torch.randn(3, 5).T, "b": torch.randn(4).to(torch.bfloat16), "c": torch.arange(3)}
    write_tensors(tmp_path / "t.safetensors", tensors, {"made": "here"})
    read, metadata = read_tensors(tmp_path / "t.safetensors")
    assert metadata == {"made": "here"}
    assert set(read) == set(tensors)
    for key, value in tensors.items():
        assert read[key].dtype == value.dtype
        assert torch.equal(read[key], value)


# Fingerprints


def test_a_fingerprint_ignores_order_and_tuples_but_no_value():
    plain = fingerprint({"a": 1, "b": {"c": [1, 2]}})
    assert fingerprint({"b": {"c": (1, 2)}, "a": 1}) == plain
    assert len(plain) == 16
    changed = [{"a": 2, "b": {"c": [1, 2]}}, {"a": 1, "b": {"c": [2, 1]}}, {"a": 1, "b": {"c": [1, 2], "d": None}}]
    assert len({plain, *map(fingerprint, changed)}) == 4


def test_a_header_depends_on_format_and_version_too():
    header = Header("ppcl.probes", MADE_FROM)
    others = [replace(header, format="ppcl.plug"), replace(header, version=2), Header("ppcl.probes", {})]
    assert len({header.fingerprint, *(other.fingerprint for other in others)}) == 4


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        (MADE_FROM | {"probe": {"ridge": 1e-3, "num_batches": 4}}, "probe.ridge=1e-06, now 0.001"),
        (MADE_FROM | {"seed": 7}, "seed=unset, now 7"),
        (MADE_FROM, "nothing"),
    ],
)
def test_the_first_difference_is_named_with_both_values(new, expected):
    assert first_difference(MADE_FROM, new) == expected


def test_an_artifact_of_other_settings_is_refused_by_the_key_that_differs(tmp_path):
    probes().save(tmp_path)
    record = tmp_path / "probes.json"
    assert is_current(record, Probes.header_for(MADE_FROM))
    other = Probes.header_for({**MADE_FROM, "probe": {"ridge": 1e-6, "num_batches": 8}})
    with pytest.raises(UsageError, match=r"probe\.num_batches=4, now 8") as caught:
        is_current(record, other)
    assert str(record) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


# A kill between the tensors and the JSON


def test_tensors_without_json_count_as_absent(tmp_path):
    probes().save(tmp_path)
    plug().save(tmp_path)
    (tmp_path / "probes.json").unlink()
    (tmp_path / "transformer_blocks.2-4.json").unlink()
    assert not is_current(tmp_path / "probes.json", Probes.header_for(MADE_FROM))
    assert load_plugs(tmp_path) == {}
    with pytest.raises(UsageError, match=r"probes\.json does not exist"):
        Probes.load(tmp_path)


@pytest.mark.parametrize("make", [probes, plug])
def test_saving_again_leaves_the_record_of_the_same_settings(tmp_path, make):
    """Another job may read it at this moment. Tensors of other settings it does not vouch for: see below."""
    make().save(tmp_path)
    (record,) = tmp_path.glob("*.json")
    tensors = next(tmp_path.glob("*.safetensors"))
    tensors.unlink()
    tensors.mkdir()  # makes the rewrite fail
    with pytest.raises(OSError, match=tensors.name):
        make().save(tmp_path)
    assert record.exists()


def test_tensors_of_another_run_are_refused(tmp_path):
    mine, other = tmp_path / "mine", tmp_path / "other"
    probes().save(mine)
    probes({"seed": 1}).save(other)
    name = "transformer_blocks.1.image.safetensors"
    (other / name).rename(mine / name)
    with pytest.raises(UsageError, match="two different runs"):
        Probes.load(mine)
    plug((2, 4)).save(mine)
    plug((0, 1)).save(mine)
    (mine / "transformer_blocks.0-1.safetensors").rename(mine / "transformer_blocks.2-4.safetensors")
    with pytest.raises(UsageError, match="two runs"):
        Plug.load(mine / "transformer_blocks.2-4.json")


# Round trips


def test_probes_come_back(tmp_path):
    saved = probes()
    saved.save(tmp_path)
    loaded = Probes.load(tmp_path)
    assert loaded.header == saved.header
    assert loaded.residuals == saved.residuals
    for part in ("weights", "biases"):
        found, expected = getattr(loaded, part), getattr(saved, part)
        assert list(found) == list(expected)
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_plugs_come_back_in_the_order_of_the_blocks(tmp_path):
    for interval in ((10, 11), (2, 4), (0, 1)):
        plug(interval).save(tmp_path)
    write_json(tmp_path / "notes.json", {"not": "a plug"})
    loaded = load_plugs(tmp_path)
    assert list(loaded) == [f"transformer_blocks.{pair}" for pair in ("0-1", "2-4", "10-11")]
    found, expected = loaded["transformer_blocks.2-4"], plug((2, 4))
    assert (found.header, found.interval, found.losses) == (expected.header, (2, 4), {"train": 0.5})
    assert {key: value.dtype for key, value in found.state_dict.items()} == {
        "attn.to_q.weight": torch.float32,
        "norm.bias": torch.bfloat16,
    }


def test_a_plan_comes_back(tmp_path):
    plan = PruningPlan(
        "qwen_image",
        {"transformer_blocks": 8},
        {"transformer_blocks": [(0, 1), (3, 5)]},
        {"method": {"rule": "lp"}},
        {"teacher": 10, "student": 7},
        {"cka": {"transformer_blocks": {"0-1": 0.99}}},
    )
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == plan
    assert is_current(tmp_path / "plan.json", plan.header())


def test_a_plan_written_by_hand_needs_only_what_it_decides(tmp_path):
    written = {"family": "qwen_image", "num_layers": {"transformer_blocks": 8}}
    written["intervals"] = {"transformer_blocks": [[0, 1]]}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(written))
    assert PruningPlan.load(path) == PruningPlan(
        "qwen_image", {"transformer_blocks": 8}, {"transformer_blocks": [(0, 1)]}
    )
    for key in written:
        path.write_text(json.dumps({k: v for k, v in written.items() if k != key}))
        with pytest.raises(UsageError, match="is not a pruning plan"):
            PruningPlan.load(path)


@pytest.mark.parametrize(
    "intervals",
    [[[0, 1]], {"transformer_blocks": [[0]]}, {"transformer_blocks": 3}, {"a": ["xy"]}, {"a": [[0, 1.7]]}],
)
def test_a_plan_of_another_shape_is_refused(tmp_path, intervals):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"family": "f", "num_layers": {}, "intervals": intervals}))
    with pytest.raises(UsageError, match=r"plan\.json is not a pruning plan"):
        PruningPlan.load(path)


@pytest.mark.parametrize(
    "stack", ["blocks", "encoder.blocks", "stages.0.blocks", "parts.a-b.blocks", "parts.2-1.blocks"]
)
def test_names_of_plugs_and_projectors_read_back_whatever_the_stack(tmp_path, stack):
    assert read_plug_name(plug_name(stack, (3, 14))) == (stack, (3, 14))
    assert read_projector_name(projector_name(stack, 37, "text")) == (stack, 37, "text")
    assert read_plug_name(projector_name(stack, 37, "ffn")) is None
    assert read_projector_name(plug_name(stack, (3, 14))) is None
    student = replace(plug(), stack=stack)
    projector = Projector(student.header, stack, {"weight": torch.ones(2, 2)}, {}, 2, "ffn", None, None)
    for item in (student, projector):
        item.save(tmp_path)
    assert list(load_plugs(tmp_path)) == [student.name]
    assert list(load_projectors(tmp_path)) == [projector.name]
