"""What the PPCL authors published becomes ours with the same outputs; their layouts are written out here anew."""

import json
import pickle

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from safetensors.torch import load_file, save_file
from torch import nn

import ppcl
from ppcl.artifacts.headers import Header
from ppcl.artifacts.plan import plug_name
from ppcl.artifacts.plugs import Plug, Projector
from ppcl.errors import UsageError
from ppcl.families.qwen_image.published import lost, to_residual
from ppcl.families.qwen_image.published_training import check_ehs_same, read_training
from ppcl.families.qwen_image.transformer_qwen_image_pruned import PrunedQwenImageTransformer2DModel
from ppcl.surgery.plugboard import Plugboard, load_student

STACK = "transformer_blocks"
HEADS, HEAD_DIM = 2, 32
WIDTH = HEADS * HEAD_DIM
ARCH = {
    "patch_size": 2,
    "in_channels": 48,
    "out_channels": 12,
    "num_layers": 9,
    "attention_head_dim": HEAD_DIM,
    "num_attention_heads": HEADS,
    "joint_attention_dim": WIDTH,
    "guidance_embeds": False,
    "axes_dims_rope": [8, 12, 12],
}
TEXT = [2, 3, 5, 7, 8]  # runs of two, of one, and one to the end
TWELVE = {"single_stream_index": TEXT}
TEN = {"single_stream_index": TEXT, "ffn_proj_index": [0, 1, 3, 8], "ehs_proj_index": [3, 5, 8]}
DEPTH = {"single_stream_index": [], "ffn_proj_index": [], "ehs_proj_index": []}


# Their layouts: key names and arithmetic, from the stock block's parts.


class TheirBlock(QwenImageTransformerBlock):
    """A block of theirs: what `text`, `ffn` and `output` say is linear, `plain` for a txt_proj that adds nothing."""

    def __init__(self, text, ffn, output, plain):
        super().__init__(WIDTH, HEADS, HEAD_DIM)
        self.text, self.ffn, self.output, self.plain = text, ffn, output, plain
        if text:
            del self.txt_mod, self.txt_norm1, self.txt_norm2, self.txt_mlp
            self.txt_proj = nn.Linear(WIDTH, WIDTH)
        if output:
            self.ehs_proj = nn.Linear(WIDTH, WIDTH)
        for stream in ("img",) if text else ("img", "txt"):
            if ffn:
                delattr(self, f"{stream}_norm2")
                delattr(self, f"{stream}_mlp")
                getattr(self, f"{stream}_mod")[1] = nn.Linear(WIDTH, 3 * WIDTH)
                setattr(self, f"{stream}_ffn_proj", nn.Linear(WIDTH, WIDTH))

    def scaled(self, stream, half, x, temb):
        chosen = getattr(self, f"{stream}_mod")(temb)[:, None].split(WIDTH, dim=-1)[3 * half : 3 * half + 3]
        shift, scale, gate = chosen
        return getattr(self, f"{stream}_norm{half + 1}")(x) * (1 + scale) + shift, gate

    def after_attention(self, stream, x, temb):
        if self.ffn:
            return x + getattr(self, f"{stream}_ffn_proj")(x)
        modulated, gate = self.scaled(stream, 1, x, temb)
        return x + gate * getattr(self, f"{stream}_mlp")(modulated)

    def forward(self, image, text, z, temb, rope):
        """`z` is what the QKV of the last block with a text stream was given."""
        modulated, gate = self.scaled("img", 0, image, temb)
        if self.text:
            given = self.txt_proj(z) if self.plain else self.txt_proj(z) + z
        else:
            given, text_gate = self.scaled("txt", 0, text, temb)
            z = given
        attended, text_attended = self.attn(modulated, encoder_hidden_states=given, image_rotary_emb=rope)
        image = self.after_attention("img", image + gate * attended, temb)
        if not self.text:
            text = self.after_attention("txt", text + text_gate * text_attended, temb)
        elif self.output:
            text = self.ehs_proj(text) + text
        return image, text, z


class Theirs(nn.Module):
    """The stock model around `blocks`."""

    def __init__(self, blocks, stock=None):
        super().__init__()
        for name, child in (stock or QwenImageTransformer2DModel(**ARCH | {"num_layers": 0})).named_children():
            setattr(self, name, child)
        self.transformer_blocks = nn.ModuleList(blocks)

    @torch.no_grad()
    def forward(self, hidden_states, encoder_hidden_states, timestep, img_shapes, **_):
        image, text = self.img_in(hidden_states), self.txt_in(self.txt_norm(encoder_hidden_states))
        temb = self.time_text_embed(timestep, image)
        rope = self.pos_embed(img_shapes, max_txt_seq_len=text.shape[1], device=image.device)
        z = None
        for block in self.transformer_blocks:
            image, text, z = block(image, text, z, temb, rope)
        return self.proj_out(self.norm_out(image, temb))


@torch.no_grad()
def randomize(module, seed=0):
    """No norm all ones, no modulation near zero, projectors far from nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if ".norm_" in name:
            parameter.add_(0.3 * noise)
        elif "_mod." in name or "_proj." in name:
            parameter.copy_(0.1 * noise)
    return module


def published(config, seed=0, plain=False):
    torch.manual_seed(seed)
    text, ffn, output = (config.get(key, []) for key in ("single_stream_index", "ffn_proj_index", "ehs_proj_index"))
    blocks = [TheirBlock(i in text, i in ffn, i in output, plain) for i in range(ARCH["num_layers"])]
    model = randomize(Theirs(blocks).eval(), seed)
    if plain:
        for index in text:
            weight = blocks[index].txt_proj.weight
            diagonal = (0.3 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(index))).exp()
            weight.data += torch.diag(diagonal)
    return model


def save(folder, model, config, shards=1, changes=None):
    """As diffusers writes a model of theirs, whose class has the stock one's name; `changes` of keys in the file."""
    folder.mkdir(parents=True)
    full = {"_class_name": "QwenImageTransformer2DModel", "_diffusers_version": "0.35.1", "pooled_projection_dim": 768}
    (folder / "config.json").write_text(json.dumps(full | ARCH | config))
    state = model.state_dict() | (changes or {})
    keys = [key for key in sorted(state) if state[key] is not None]
    if shards == 1:
        save_file({key: state[key] for key in keys}, folder / "diffusion_pytorch_model.safetensors")
        return folder
    index = {}
    for number in range(shards):
        name = f"diffusion_pytorch_model-{number + 1:05}-of-{shards:05}.safetensors"
        save_file({key: state[key] for key in keys[number::shards]}, folder / name)
        index |= dict.fromkeys(keys[number::shards], name)
    content = {"metadata": {"total_size": 0}, "weight_map": index}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def inputs(make_batch):
    return make_batch(0, (7, 7)).inputs  # no padding: theirs looks at it, the stock model masks it


@torch.no_grad()
def output(model, inputs):
    return model(**inputs)[0]


# Published models.


@pytest.mark.parametrize("shards", [1, 3])
def test_a_model_pruned_in_depth_becomes_the_stock_class(tmp_path, inputs, shards):
    theirs = published(DEPTH)
    model = ppcl.import_published(save(tmp_path / "transformer", theirs, DEPTH, shards))
    assert type(model) is QwenImageTransformer2DModel
    assert not DEPTH.keys() & model.config.keys()
    assert torch.equal(output(model, inputs), theirs(**inputs))


@pytest.mark.parametrize("shards", [1, 3])
def test_a_10b_model_draws_the_same_bits(tmp_path, inputs, shards):
    theirs = published(TEN)
    model = ppcl.import_published(save(tmp_path / "transformer", theirs, TEN, shards))
    assert type(model) is PrunedQwenImageTransformer2DModel
    assert (list(model.config.pruned_text), list(model.config.pruned_ffn)) == (TEXT, TEN["ffn_proj_index"])
    assert model.config.text_output == "last"
    assert not any("to_add_out" in key and f".{i}." in key for key in model.state_dict() for i in TEXT)
    assert torch.equal(output(model, inputs), theirs(**inputs))


def test_a_12b_model_draws_the_same(tmp_path, inputs):
    """Its txt_proj is the whole map, and no block has an ehs_proj: W - I, and zeros."""
    theirs = published(TWELVE, plain=True)
    model = ppcl.import_published(save(tmp_path / "transformer", theirs, TWELVE))
    for index in (3, 5, 8):
        assert not any(value.any() for value in model.transformer_blocks[index].ehs_proj.parameters())
    torch.testing.assert_close(output(model, inputs), theirs(**inputs), rtol=0, atol=1e-5)
    residual = ppcl.import_published(tmp_path / "transformer", residual=True)
    assert (output(residual, inputs) - theirs(**inputs)).abs().max() > 0.01


@pytest.mark.parametrize(
    ("config", "text_output"),
    [
        ({"single_stream_index": TEXT, "ffn_proj_index": [], "ehs_proj_index": [3]}, "last"),
        ({"single_stream_index": [2, 3, 4, 7], "ffn_proj_index": [4], "ehs_proj_index": [2, 4]}, "each"),
        ({"single_stream_index": [], "ffn_proj_index": [1, 8], "ehs_proj_index": []}, "last"),
    ],
)
def test_output_projectors_may_stand_anywhere(tmp_path, inputs, config, text_output):
    theirs = published(config)
    model = ppcl.import_published(save(tmp_path / "transformer", theirs, config))
    assert model.config.text_output == text_output
    assert torch.equal(output(model, inputs), theirs(**inputs))


def test_text_queries_stay_on_request_and_change_nothing(tmp_path, inputs):
    theirs = published(TEN)
    folder = save(tmp_path / "transformer", theirs, TEN)
    kept, dropped = ppcl.import_published(folder, keep_text_query=True), ppcl.import_published(folder)
    assert torch.equal(output(kept, inputs), output(dropped, inputs))
    lost_keys = kept.state_dict().keys() - dropped.state_dict().keys()
    assert len(lost_keys) == 3 * len(TEXT)
    assert all(torch.equal(kept.state_dict()[key], theirs.state_dict()[key]) for key in lost_keys)


def test_a_pipelines_folder_and_dtypes(tmp_path, inputs):
    theirs = published(TEN)
    save(tmp_path / "transformer", theirs.bfloat16(), TEN)
    (tmp_path / "model_index.json").write_text("{}")
    assert ppcl.import_published(tmp_path).dtype == torch.bfloat16
    model = ppcl.import_published(str(tmp_path), dtype=torch.float32)
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert torch.equal(output(model, inputs), theirs.float()(**inputs))
    older = ppcl.import_published(tmp_path, torch_dtype=torch.float32)
    assert torch.equal(output(older, inputs), output(model, inputs))
    with pytest.raises(UsageError, match="two names of one argument"):
        ppcl.import_published(tmp_path, dtype=torch.float32, torch_dtype=torch.float32)


def test_what_is_imported_survives_saving(tmp_path, inputs):
    model = ppcl.import_published(save(tmp_path / "transformer", published(TEN), TEN))
    model.save_pretrained(tmp_path / "again")
    again = PrunedQwenImageTransformer2DModel.from_pretrained(tmp_path / "again")
    assert torch.equal(output(again, inputs), output(model, inputs))


def test_bfloat16_loses_nothing_that_matters():
    """x + (W - I) x is as near to W x as the rounding of W x itself, for maps that are near the identity."""
    generator = torch.Generator().manual_seed(0)
    size = 256
    weight = torch.diag((0.3 * torch.randn(size, generator=generator)).exp())
    weight = (weight + 0.1 / size**0.5 * torch.randn(size, size, generator=generator)).bfloat16()
    x = torch.randn(64, size, generator=generator).bfloat16()
    residual = to_residual(weight)
    assert residual.dtype == torch.bfloat16
    exact = x.double() @ weight.double().T
    errors = [((y.double() - exact).norm() / exact.norm()).item() for y in (x @ weight.T, x + x @ residual.T)]
    assert errors[1] < 1.25 * errors[0]
    assert lost(weight) < 2e-4
    near = weight.diagonal().float()
    inside = (near >= 0.5) & (near <= 2)
    assert torch.equal(residual.diagonal()[inside].float(), near[inside] - 1)


# Folders that are refused.


def refused(folder, message, **arguments):
    with pytest.raises(UsageError, match=message) as caught:
        ppcl.import_published(folder, **arguments)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "FluxTransformer2DModel"}, "holds a FluxTransformer2DModel"),
        ({"_class_name": "PrunedQwenImageTransformer2DModel"}, "holds a PrunedQwenImageTransformer2DModel"),
        ({"single_stream_index": [9]}, "single_stream_index names block 9; the transformer's blocks are 0 to 8"),
        ({"ffn_proj_index": [-1]}, "ffn_proj_index names block -1"),
        ({"ffn_proj_index": "2"}, "ffn_proj_index=2 is not a list"),
        ({"single_stream_index": [2.5]}, r"single_stream_index=\[2.5\]"),
        ({"ehs_proj_index": [4]}, "ehs_proj_index names block 4, which single_stream_index does not"),
        ({"single_stream_index": [0, 1], "ehs_proj_index": []}, "names block 0"),
        ({"num_attention_heads": 4}, r"\[64, 256\], its config asks for \[128, 256\]"),
        ({"num_layers": "9"}, "num_layers=9 is not a number"),
        ({"num_layers": 10}, r"lacks transformer_blocks.9\S+ \[.+\], which its config asks for"),
    ],
)
def test_configs_that_make_no_sense_are_refused(tmp_path, config, message):
    refused(save(tmp_path / "transformer", published(TEN), TEN | config), message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{STACK}.3.txt_proj.bias": None}, rf"lacks {STACK}.3.txt_proj.bias \[64\]"),
        ({f"{STACK}.8.ehs_proj.weight": None}, rf"lacks {STACK}.8.ehs_proj.weight \[64, 64\]"),
        ({f"{STACK}.1.img_mod.1.weight": torch.zeros(384, 64)}, r"1.img_mod.1.weight is \[384, 64\].+\[192, 64\]"),
        ({f"{STACK}.2.ehs_proj.bias": torch.zeros(64)}, f"holds {STACK}.2.ehs_proj.bias, for which"),
        ({"pos": torch.zeros(1)}, "holds pos, for which its config has no place"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, changes, message):
    refused(save(tmp_path / "transformer", published(TEN), TEN, changes=changes), message)


def test_folders_that_hold_no_model_are_refused(tmp_path):
    refused(tmp_path, "neither a pipeline's folder nor a transformer's")
    folder = save(tmp_path / "transformer", published(TEN), TEN, shards=2)
    second = folder / "diffusion_pytorch_model-00002-of-00002.safetensors"
    whole = second.read_bytes()
    second.write_bytes(whole[: len(whole) // 2])
    refused(folder, "truncated or not a safetensors file")
    second.unlink()
    refused(folder, "does not exist")
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"img_in.weight": "../elsewhere.safetensors"}}))
    refused(folder, "names no files beside it")
    index.unlink()
    refused(folder, "lacks ")
    first = folder / "diffusion_pytorch_model-00001-of-00002.safetensors"
    save_file(load_file(first), second)
    refused(folder, "twice")
    first.unlink()
    second.unlink()
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"")
    refused(folder, "holds no safetensors file")
    refused(folder / "diffusion_pytorch_model.bin", "import_published")


def test_how_txt_proj_is_read_matters_only_where_there_is_one(tmp_path):
    refused(save(tmp_path / "transformer", published(DEPTH), DEPTH), "published.residual=True", residual=True)


# Training checkpoints.

LAYERS = 13
INTERVALS = [(1, 2), (4, 6), (9, 10)]
GROUPS = [[0, 2], [3, 7], [8, 11]]  # each with a student in it; the first ends with one, no run ends the model
MEMBERS = [[1], [4, 7], [9, 11]]
WIDTH_FFN = [0, 4, 12]


@pytest.fixture
def stock():
    torch.manual_seed(0)
    return randomize(QwenImageTransformer2DModel(**ARCH | {"num_layers": LAYERS}).eval())


class Trainee:
    """Their module lists, filled block by block as their training loop comes by."""

    def __init__(self):
        gone = {index for u, v in INTERVALS for index in range(u + 1, v + 1)}
        self.kept = [index for index in range(LAYERS) if index not in gone]
        torch.manual_seed(1)
        self.students = randomize(nn.ModuleList([TheirBlock(False, False, False, False) for _ in INTERVALS]), 1)
        self.attn, self.outputs, self.ffns = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self.text_in, self.text_out, self.image_ffn, self.text_ffn = {}, {}, {}, {}
        for index in self.kept:
            for group, members in enumerate(MEMBERS):
                if index in members:
                    self.text_in[index] = self.add(self.attn, 10 + index)
                    if index == members[-1]:
                        self.text_out[index] = self.add(self.outputs, 40 + group)
            self.text_ffn[index], self.image_ffn[index] = (
                self.add(self.ffns, 60 + index),
                self.add(self.ffns, 90 + index),
            )

    @staticmethod
    def add(modules, seed):
        linear = nn.Linear(WIDTH, WIDTH)
        generator = torch.Generator().manual_seed(seed)
        for parameter in linear.parameters():
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        modules.append(linear)
        return linear

    def lists(self):
        return {
            "attn_proj_list": self.attn.state_dict(),
            "ffn_proj_list": self.ffns.state_dict(),
            "block_proj_list": nn.ModuleList([nn.Linear(WIDTH, WIDTH)] * 2 * len(INTERVALS)).state_dict(),  # unused
            "ehs_proj_list": self.outputs.state_dict(),
            "transformer_distill_blocks": self.students.state_dict(),
        }

    def chained(self, stock, text, ffn):
        """The model that these parts make: students and projectors where they were trained to stand."""
        starts = [u for u, _ in INTERVALS]
        blocks = []
        for index in self.kept:
            source = self.students[starts.index(index)] if index in starts else stock.transformer_blocks[index]
            block = TheirBlock(index in text, index in ffn, index in text and index in self.text_out, False).eval()
            own = source.state_dict()
            found = {key: own[key][: len(value)] for key, value in block.state_dict().items() if key in own}
            for name, modules in (
                ("txt_proj", self.text_in),
                ("ehs_proj", self.text_out),
                ("img_ffn_proj", self.image_ffn),
                ("txt_ffn_proj", self.text_ffn),
            ):
                if hasattr(block, name):
                    found |= {f"{name}.{key}": value for key, value in modules[index].state_dict().items()}
            block.load_state_dict(found)
            blocks.append(block)
        return Theirs(blocks, stock).eval()


@pytest.fixture
def trainee():
    return Trainee()


@pytest.fixture
def arch():
    return ARCH | {"num_layers": LAYERS}


def plugged(family, stock, training):
    """Everything in a checkpoint, on a board of its teacher."""
    students = {}
    for pair, state in training.students.items():
        plug = Plug(Header("ppcl.plug", {}), STACK, state, {}, pair)
        students[plug.name] = load_student(family, stock, plug)
    bases = {u: plug_name(STACK, (u, v)) for u, v in training.students}
    found = [
        Projector(
            Header("ppcl.projector", {}), STACK, i.state_dict, {}, i.index, i.kind, bases.get(i.index), i.reference
        )
        for i in training.projectors
    ]
    return Plugboard(family, stock, {STACK: list(training.students)}, students, {i.name: i for i in found})


def write(path, content):
    torch.save(content, path)
    return path


@pytest.mark.parametrize("groups", [[], [0], [1, 2], [0, 1, 2]])
@pytest.mark.parametrize("ffn", [[], WIDTH_FFN])
def test_a_checkpoint_on_the_board_is_their_chain(tmp_path, family, inputs, stock, trainee, arch, groups, ffn):
    text = [index for group in groups for index in MEMBERS[group]]
    expected = trainee.chained(stock, text, ffn)(**inputs)
    path = write(tmp_path / "diffusion_pytorch_model.bin", trainee.lists())
    training = read_training(path, arch, INTERVALS, text, ffn, GROUPS if text else None)
    board = plugged(family, stock, training)
    assert not torch.equal(output(stock, inputs), expected)
    assert torch.equal(output(board.all().transformer, inputs), expected)
    assert torch.equal(output(board.standalone(), inputs), expected)


def test_students_alone_are_read_as_their_depth_training_writes_them(tmp_path, trainee, arch):
    state = {f"module.{key}": value for key, value in trainee.students.state_dict().items()}
    training = read_training(write(tmp_path / "depth.bin", state), arch, INTERVALS)
    for pair, student in zip(INTERVALS, trainee.students, strict=True):
        read = training.students[pair]
        assert read.keys() == student.state_dict().keys()
        assert all(torch.equal(read[key], value) for key, value in student.state_dict().items())
    with pytest.raises(UsageError, match="lacks ffn_proj_list"):
        read_training(tmp_path / "depth.bin", arch, INTERVALS, ffn=[0])


def test_parameters_that_are_slices_of_one_buffer_are_read(tmp_path, trainee, arch):
    """As ZeRO leaves them."""
    state = trainee.students.state_dict()
    buffer = torch.cat([value.flatten() for value in state.values()])
    views, start = {}, 0
    for key, value in state.items():
        views[key] = buffer[start : start + value.numel()].view(value.shape)
        start += value.numel()
    training = read_training(write(tmp_path / "depth.bin", views), arch, INTERVALS)
    for number, pair in enumerate(INTERVALS):
        Plug(Header("ppcl.plug", {}), STACK, training.students[pair], {}, pair).save(tmp_path)
        saved = Plug.load(tmp_path / f"{plug_name(STACK, pair)}.json").state_dict
        assert all(torch.equal(saved[key], state[f"{number}.{key}"]) for key in saved)


def test_without_output_projectors_the_text_passes(tmp_path, family, inputs, stock, trainee, arch):
    lists = trainee.lists()
    del lists["ehs_proj_list"]
    path = write(tmp_path / "checkpoint.bin", lists)
    trainee.text_out = {}
    expected = trainee.chained(stock, [4, 7], [])(**inputs)
    training = read_training(path, arch, INTERVALS, [4, 7], [], GROUPS)
    assert torch.equal(output(plugged(family, stock, training).all().transformer, inputs), expected)


# Checkpoints that are refused.


class Code:
    def __reduce__(self):
        return print, ("this runs",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"transformer_distill_blocks": {"0.a": torch.zeros(1)}, "code": Code()}, "could run code when unpickled"),
        ([torch.zeros(1)], "holds a list"),
        ({}, "lacks transformer_distill_blocks"),
        ({"attn_proj_list": {}, "other": {}}, "lacks transformer_distill_blocks: it has attn_proj_list, other"),
        ({"img_in.weight": torch.zeros(1)}, "not the state dict of a list of modules; it has img_in.weight"),
        ({"transformer_distill_blocks": torch.zeros(1), "step": 1}, "not the state dict of a list"),
        ({"0.a": torch.zeros(1), "2.a": torch.zeros(1)}, r"numbers its modules \[0, 2\]"),
    ],
)
def test_files_that_are_no_checkpoint_are_refused(tmp_path, arch, capsys, content, message):
    with pytest.raises(UsageError, match=message):
        read_training(write(tmp_path / "checkpoint.bin", content), arch, INTERVALS)
    assert "this runs" not in capsys.readouterr().out


def test_other_pickles_and_damaged_files_are_refused(tmp_path, trainee, arch, capsys):
    path = tmp_path / "checkpoint.bin"
    path.write_bytes(pickle.dumps(Code()))
    with pytest.raises(UsageError, match="other pickles can hold code and are not read"):
        read_training(path, arch, INTERVALS)
    whole = write(path, trainee.lists()).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match="cut short"):
        read_training(path, arch, INTERVALS)
    assert "this runs" not in capsys.readouterr().out


def without(key):
    def change(lists):
        name, _, inner = key.partition("/")
        del lists[name][inner]

    return change


def reshaped(key, *shape):
    def change(lists):
        name, _, inner = key.partition("/")
        lists[name][inner] = torch.zeros(shape)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            without("transformer_distill_blocks/1.attn.to_q.bias"),
            r"lacks transformer_distill_blocks.1.attn.to_q.bias \[64\]",
        ),
        (reshaped("transformer_distill_blocks/0.attn.to_q.bias", 32), r"0.attn.to_q.bias is \[32\].+\[64\]"),
        (reshaped("transformer_distill_blocks/0.extra", 32), "holds transformer_distill_blocks.0.extra"),
        (reshaped("attn_proj_list/1.weight", 64, 32), r"attn_proj_list.1.weight is \[64, 32\].+\[64, 64\]"),
        (reshaped("ehs_proj_list/1.bias", 8), r"ehs_proj_list.1.bias is \[8\]"),
        (without("ffn_proj_list/0.bias"), r"lacks ffn_proj_list.0.bias"),
        (reshaped("attn_proj_list/5.weight", 64, 64), r"attn_proj_list holds 6 modules.+has 5 kept blocks"),
        (reshaped("ehs_proj_list/3.weight", 64, 64), "ehs_proj_list holds 4 modules.+has 3 groups"),
        (reshaped("ffn_proj_list/18.weight", 64, 64), "ffn_proj_list holds 19 modules.+leaves 9 blocks"),
    ],
)
def test_modules_that_do_not_fit_are_named(tmp_path, trainee, arch, change, message):
    lists = trainee.lists()
    change(lists)
    path = write(tmp_path / "checkpoint.bin", lists)
    with pytest.raises(UsageError, match=message):
        read_training(path, arch, INTERVALS, [4, 7], WIDTH_FFN, GROUPS)


@pytest.mark.parametrize(
    ("intervals", "text", "groups", "message"),
    [
        (INTERVALS[:2], [], None, "holds 3 modules, but intervals= has 2"),
        (INTERVALS, [4, 7], None, "give published.ehs_same"),
        (INTERVALS, [], GROUPS, r"published.ehs_same=\[\[0,2\],\[3,7\],\[8,11\]\] is read only where width="),
        (INTERVALS, [4], GROUPS, r"\[4\] of the group \[3, 7\].+name all of \[4, 7\]"),
        (INTERVALS, [12], GROUPS, "text stream 12, which lies in no group"),
        (INTERVALS, [4, 7], GROUPS[1:], "attn_proj_list holds 5 modules, but.+has 4 kept blocks"),
    ],
)
def test_settings_that_do_not_fit_a_checkpoint_are_named(tmp_path, trainee, arch, intervals, text, groups, message):
    path = write(tmp_path / "checkpoint.bin", trainee.lists())
    with pytest.raises(UsageError, match=message):
        read_training(path, arch, intervals, text, [], groups)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([[3, 13]], "out of range; the model's blocks are 0 to 12"),
        ([[-1, 3]], "out of range"),
        ([[7, 7]], "not a pair"),
        ([[3, 7, 8]], "not a pair"),
        ([[3, 7], [7, 8]], "overlaps or precedes"),
        ([[7, 8], [0, 2]], "overlaps or precedes"),
        ([[2, 3]], r"cuts the interval \[1, 2\]"),
        ([[3, 5]], r"cuts the interval \[4, 6\]"),
        ([[5, 7]], r"cuts the interval \[4, 6\]"),
    ],
)
def test_groups_are_checked(groups, message):
    with pytest.raises(UsageError, match=message):
        check_ehs_same(groups, LAYERS, INTERVALS)


def test_a_group_may_start_with_a_student():
    check_ehs_same([[4, 7], [9, 12]], LAYERS, INTERVALS)
