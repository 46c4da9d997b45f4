import copy
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ppcl.config import DistillConfig
from ppcl.distill.depth import DepthDistillation
from ppcl.errors import UsageError
from ppcl.streaming import load_streamed, still
from ppcl.surgery.depth import student_block
from ppcl.taps import observe

NUM_BLOCKS = 5
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def resident(make_transformer):
    return make_transformer(NUM_BLOCKS)


@pytest.fixture(scope="module", params=[None, "200KB"], ids=["one file", "sharded"])
def folder(request, resident, tmp_path_factory):
    found = tmp_path_factory.mktemp("saved") / "transformer"
    resident.save_pretrained(found, **({"max_shard_size": request.param} if request.param else {}))
    assert (len(list(found.glob("*.safetensors"))) > 1) == bool(request.param)
    return found


@pytest.fixture
def streamed(family, folder):
    return load_streamed(family, folder, CPU, torch.float32)


def held(transformer):
    """The blocks that hold weights."""
    return [
        index
        for index, block in enumerate(transformer.transformer_blocks)
        if all(parameter.untyped_storage().nbytes() >= parameter.nbytes for parameter in block.parameters())
    ]


@torch.no_grad()
def test_outputs_are_those_of_the_resident_model_bit_for_bit(family, resident, streamed, make_batch):
    for seed in range(2):
        batch = make_batch(seed)
        expected, found = [], []
        (whole,) = observe(family, resident, batch.inputs, expected.append)
        assert torch.equal(observe(family, streamed, batch.inputs, found.append)[0], whole)
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one.outputs["image"], other.outputs["image"])
            assert torch.equal(one.outputs["text"], other.outputs["text"])


@torch.no_grad()
def test_it_is_cast_as_diffusers_would(family, folder, make_batch):
    streamed = load_streamed(family, folder, CPU, torch.bfloat16)
    resident = family.transformer_class.from_pretrained(folder, dtype=torch.bfloat16)
    batch = make_batch()
    inputs = {k: v.bfloat16() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
              for k, v in batch.inputs.items()}  # fmt: skip
    assert torch.equal(streamed(**inputs)[0], resident(**inputs)[0])


@torch.no_grad()
def test_one_block_holds_its_weights_at_a_time(family, streamed, make_batch):
    """The next one's are read by then, but wait outside the model."""
    seen = []
    observe(family, streamed, make_batch().inputs, lambda call: seen.append((call.index, held(streamed))))
    assert seen == [(index, [index]) for index in range(NUM_BLOCKS)]


@torch.no_grad()
def test_a_pass_that_ends_early_teaches_what_to_read_next(family, streamed, make_batch):
    stream = next(iter(streamed.transformer_blocks[0]._forward_pre_hooks.values())).stream
    last = ("transformer_blocks", 2)
    for _ in range(2):
        observe(family, streamed, make_batch().inputs, lambda call: None, last=last)
    assert stream._ahead[0] == 0


def test_a_block_that_is_elsewhere_is_seen_at_once(streamed):
    weight = streamed.transformer_blocks[3].attn.to_q.weight
    assert weight.isnan().all()
    assert weight.untyped_storage().nbytes() == weight.element_size()


@pytest.mark.parametrize("init", ["first", "middle", "average"])
def test_students_start_from_the_real_weights_and_are_not_streamed(resident, streamed, init):
    student = student_block(list(streamed.transformer_blocks), (1, 3), init)
    expected = student_block(list(resident.transformer_blocks), (1, 3), init).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in student.state_dict().items())
    assert not student._forward_pre_hooks
    assert held(streamed) == []
    assert streamed.transformer_blocks[1]._forward_pre_hooks


@torch.no_grad()
def test_a_block_in_use_stays_so_when_it_was_held(family, streamed, make_batch):
    def copy_it(call):
        block = streamed.transformer_blocks[call.index]
        with still(block):
            copied = copy.deepcopy(block)
        assert torch.equal(copied.attn.to_q.weight, block.attn.to_q.weight)

    (first,) = observe(family, streamed, make_batch().inputs, copy_it)
    assert torch.equal(first, streamed(**make_batch().inputs)[0])


def test_a_quantised_model_is_refused(family, resident, tmp_path):
    resident.save_pretrained(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    state = load_file(path)
    name = "transformer_blocks.2.attn.to_q.weight"
    save_file(state | {name: state[name].to(torch.float8_e4m3fn)}, path)
    with pytest.raises(UsageError, match=rf"has {name} as F8_E4M3, .* that is not quantised"):
        load_streamed(family, tmp_path, CPU, torch.float32)


def test_a_file_that_is_cut_short_meanwhile_is_said(folder, family, make_batch, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "transformer")
    streamed = load_streamed(family, copied, CPU, torch.float32)
    for path in copied.glob("*.safetensors"):
        os.truncate(path, 10_000)
    with pytest.raises(UsageError, match="cut short"):
        streamed(**make_batch().inputs)


def test_a_folder_without_all_tensors_is_refused(family, folder, tmp_path):
    broken = tmp_path / "transformer"
    broken.mkdir()
    for file in folder.iterdir():
        (broken / file.name).symlink_to(file)
    index = broken / "diffusion_pytorch_model.safetensors.index.json"
    if not index.exists():
        (broken / "diffusion_pytorch_model.safetensors").unlink()
        expected = r"holds no diffusion_pytorch_model\.safetensors"
    else:
        content = json.loads(index.read_text())
        content["weight_map"].pop("transformer_blocks.0.attn.to_q.weight")
        index.unlink()
        index.write_text(json.dumps(content))
        expected = r"lacks transformer_blocks\.0\.attn\.to_q\.weight"
    with pytest.raises(UsageError, match=expected):
        load_streamed(family, broken, CPU, torch.float32)


def test_a_tensor_that_no_module_takes_is_told(family, folder, tmp_path, caplog):
    for file in folder.iterdir():
        shutil.copy(file, tmp_path)
    for path in sorted(tmp_path.glob("*.safetensors"))[:1]:
        save_file(load_file(path) | {"other.weight": torch.ones(1)}, path, {"format": "pt"})
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        content["weight_map"]["other.weight"] = path.name
        index.write_text(json.dumps(content))
    load_streamed(family, tmp_path, CPU, torch.float32)
    assert "other.weight were not used" in caplog.text


def test_batches_of_a_training_pass_each_block_together(family, resident, streamed, make_batch):
    modules = [DepthDistillation(family, teacher, {"transformer_blocks": [(1, 2)]}, DistillConfig())
               for teacher in (streamed, resident)]  # fmt: skip
    order = []
    for index, block in enumerate(streamed.transformer_blocks):
        block.register_forward_hook(lambda *_, index=index: order.append(index))
    batches = [make_batch(0), make_batch(1)]
    found, expected = (module.heldout(batches) for module in modules)
    assert found == expected
    assert order == [0, 0, 1, 1, 2, 2]
