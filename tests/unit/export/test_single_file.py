"""Single files of real diffusers models: diffusers' own reader makes the same model of them, bit for bit."""

from __future__ import annotations

import json
import struct
import threading
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel
from safetensors.torch import load_file

from ppcl.artifacts.files import read_json
from ppcl.errors import UsageError
from ppcl.export.single_file import (
    ZERO_CONDITION_MARKER,
    layout_of,
    modelspec,
    parts_of,
    read_metadata,
    write_single_file,
)
from ppcl.families.flux.transformer_flux_pruned import PrunedFluxTransformer2DModel
from ppcl.families.qwen_image.transformer_qwen_image_pruned import PrunedQwenImageTransformer2DModel

QWEN = {
    "patch_size": 2,
    "in_channels": 48,
    "out_channels": 12,
    "num_layers": 11,  # block 10 must not come before block 2
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 64,
    "axes_dims_rope": (8, 12, 12),
}
FLUX = {
    "in_channels": 48,
    "num_layers": 2,
    "num_single_layers": 11,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 40,
    "pooled_projection_dim": 24,
    "guidance_embeds": True,
    "axes_dims_rope": (8, 12, 12),
}
PROVENANCE = {
    "version": "0.1.0",
    "variant": "ppcl-depth",
    "kept_layers": {"transformer_blocks": [0, 1, 3]},
    "removed_intervals": {"transformer_blocks": [[1, 2]]},
}


def saved(model: Any, folder: Path, shard: str = "200KB") -> Path:
    """A folder as the export leaves it, in several shards, with nothing left at its initial zeros and ones."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(generator=generator)
    model.register_to_config(ppcl=PROVENANCE)
    model.save_pretrained(folder, max_shard_size=shard)
    assert (folder / "diffusion_pytorch_model.safetensors.index.json").exists()
    return folder


def assert_equal_states(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert value.dtype == right[key].dtype, key
        assert torch.equal(value, right[key]), key


def diffusers_names(state: dict[str, torch.Tensor], width: int) -> dict[str, torch.Tensor]:
    """The way back from a FLUX file of `width`, written from the file's side; diffusers' own takes only 3072."""
    found: dict[str, torch.Tensor] = {}
    outer = {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
    }
    for layer, number in (("in_layer", 1), ("out_layer", 2)):
        for short, name in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance")):
            outer[f"{short}_in.{layer}"] = f"time_text_embed.{name}_embedder.linear_{number}"
    streams = {
        "img": (("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "to_out.0", "norm1", "ff"),
        "txt": (
            ("add_q_proj", "add_k_proj", "add_v_proj"),
            ("norm_added_q", "norm_added_k"),
            "to_add_out",
            "norm1_context",
            "ff_context",
        ),
    }
    for key, value in state.items():
        module, _, parameter = key.rpartition(".")
        kind, *rest = module.split(".")
        if kind == "double_blocks":
            index, part, *inner = rest
            block = f"transformer_blocks.{index}."
            projections, norms, out, modulation, feed_forward = streams[part[:3]]
            if inner == ["qkv"]:
                rows = value.split(width)
                found |= {f"{block}attn.{p}.{parameter}": row for p, row in zip(projections, rows, strict=True)}
            elif inner[0] == "norm":
                found[f"{block}attn.{norms[inner[1] == 'key_norm']}.weight"] = value
            elif part.endswith("mlp"):
                found[f"{block}{feed_forward}.net.{'0.proj' if inner == ['0'] else 2}.{parameter}"] = value
            else:
                found[f"{block}{modulation + '.linear' if inner == ['lin'] else 'attn.' + out}.{parameter}"] = value
        elif kind == "single_blocks":
            index, part, *inner = rest
            block = f"single_transformer_blocks.{index}."
            if part == "linear1":
                names = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
                rows = value.split([width, width, width, 4 * width])
                found |= {f"{block}{name}.{parameter}": row for name, row in zip(names, rows, strict=True)}
            elif part == "norm":
                found[f"{block}attn.norm_{inner[0][0]}.weight"] = value
            else:
                found[f"{block}{'proj_out' if part == 'linear2' else 'norm.linear'}.{parameter}"] = value
        elif module.endswith("adaLN_modulation.1"):
            shift, scale = value.chunk(2)
            found[f"{outer[module]}.{parameter}"] = torch.cat([scale, shift])
        else:
            found[f"{outer[module]}.{parameter}"] = value
    return found


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(QwenImageTransformer2DModel(**QWEN), tmp_path_factory.mktemp("qwen") / "transformer")


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(FluxTransformer2DModel(**FLUX), tmp_path_factory.mktemp("flux") / "transformer")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_diffusers_reads_a_qwen_image_file_back(qwen: Path, tmp_path: Path, dtype: str) -> None:
    target = tmp_path / "single.safetensors"
    size = write_single_file(qwen, target, "qwen_image", dtype, {})
    assert size == target.stat().st_size
    expected = QwenImageTransformer2DModel.from_pretrained(qwen).to(getattr(torch, dtype)).state_dict()
    read = QwenImageTransformer2DModel.from_single_file(
        str(target), config=str(qwen), dtype=getattr(torch, dtype), local_files_only=True
    )
    assert read.config.num_layers == 11
    assert_equal_states(read.state_dict(), expected)
    # ComfyUI tells the model by this name, without a prefix, and counts blocks from the names of keys.
    keys = list(load_file(target))
    assert "txt_norm.weight" in keys
    assert {int(key.split(".")[1]) for key in keys if key.startswith("transformer_blocks.")} == set(range(11))


def test_the_marker_of_2511_is_written_and_does_not_disturb_diffusers(tmp_path: Path) -> None:
    config = QWEN | {"num_layers": 2, "zero_cond_t": True}
    folder = saved(QwenImageTransformer2DModel(**config), tmp_path / "transformer")
    metadata = modelspec("qwen_image_edit_2509", read_json(folder / "config.json", "config"), {})
    assert metadata["modelspec.architecture"] == "Qwen-Image-Edit-2511"
    write_single_file(folder, tmp_path / "single.safetensors", "qwen_image_edit_2509", "float32", metadata)
    assert load_file(tmp_path / "single.safetensors")[ZERO_CONDITION_MARKER].shape == (0,)
    read = QwenImageTransformer2DModel.from_single_file(str(tmp_path / "single.safetensors"), config=str(folder))
    assert_equal_states(read.state_dict(), QwenImageTransformer2DModel.from_pretrained(folder).state_dict())


@pytest.mark.parametrize("guidance", [True, False])
def test_a_flux_file_has_the_original_names_and_every_value(tmp_path: Path, guidance: bool) -> None:
    folder = saved(FluxTransformer2DModel(**FLUX | {"guidance_embeds": guidance}), tmp_path / "transformer")
    write_single_file(folder, tmp_path / "single.safetensors", "flux", "float32", {})
    file = load_file(tmp_path / "single.safetensors")
    assert file["double_blocks.1.img_attn.qkv.weight"].shape == (192, 64)
    assert file["double_blocks.1.txt_attn.norm.key_norm.scale"].shape == (32,)
    assert file["single_blocks.10.linear1.weight"].shape == (64 * 7, 64)
    assert file["single_blocks.10.linear2.weight"].shape == (64, 64 * 5)
    assert file["final_layer.adaLN_modulation.1.bias"].shape == (128,)
    assert ("guidance_in.in_layer.weight" in file) == guidance
    expected = FluxTransformer2DModel.from_pretrained(folder).state_dict()
    assert_equal_states(diffusers_names(file, 64), expected)


def test_diffusers_reads_a_flux_file_of_full_width_back_and_memory_stays_low(tmp_path: Path) -> None:
    """Its reader knows FLUX of width 3072 alone: one block of each stack, 0.5B parameters."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            guidance_embeds=True,
        )
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    draws = torch.randn((1 << 20) - 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    for number, parameter in enumerate(model.parameters()):
        for piece in parameter.data.view(-1).split(len(draws)):  # drawing 0.5B numbers would take seconds
            piece.copy_(draws.roll(number)[: len(piece)])
    with TemporaryDirectory(dir=tmp_path) as name:  # pytest would keep these 2 GB
        folder, target = Path(name) / "transformer", Path(name) / "single.safetensors"
        model.save_pretrained(folder)
        with PeakMemory() as peak:
            size = write_single_file(folder, target, "flux", "bfloat16", {})
        read = FluxTransformer2DModel.from_single_file(
            str(target), config=str(folder), dtype=torch.bfloat16, local_files_only=True
        )
        assert_equal_states(read.state_dict(), model.state_dict())
    assert size > 9e8
    assert peak.growth < size / 3  # the largest joined tensor, and the parts it is joined from


class PeakMemory:
    """How much more memory of its own (no page of a mapped file) this process has at most, sampled in a thread."""

    def __enter__(self) -> PeakMemory:
        self.start = self.peak = self._now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def growth(self) -> int:
        return self.peak - self.start

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self.peak = max(self.peak, self._now())

    @staticmethod
    def _now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon:")))


def test_header_is_what_the_format_says(flux: Path, tmp_path: Path) -> None:
    target = tmp_path / "single.safetensors"
    write_single_file(flux, target, "flux", "bfloat16", {"modelspec.title": "a \u00fcber-model"})
    content = target.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    metadata = header.pop("__metadata__")
    assert metadata.pop("ppcl.crc32") == f"{zlib.crc32(content[8 + length :]):08x}"
    assert metadata == {"modelspec.title": "a \u00fcber-model"}
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}
    ends = [entry["data_offsets"] for entry in header.values()]
    assert [start for start, _ in ends] == [0, *(end for _, end in ends[:-1])]  # no holes
    assert 8 + length + ends[-1][1] == len(content)


def test_metadata_says_what_was_kept_of_what(qwen: Path, tmp_path: Path) -> None:
    facts = {"title": "T", "license": "apache-2.0", "resolution": "1328x1328", "base_model": "Qwen/Qwen-Image"}
    metadata = modelspec("qwen_image", read_json(qwen / "config.json", "config"), facts)
    write_single_file(qwen, tmp_path / "single.safetensors", "qwen_image", "bfloat16", metadata)
    found = read_metadata(tmp_path / "single.safetensors")
    assert found.items() >= metadata.items()
    assert found["modelspec.sai_model_spec"] == "1.0.0"
    assert found["modelspec.architecture"] == "Qwen-Image"
    assert found["modelspec.title"] == "T"
    assert found["modelspec.resolution"] == "1328x1328"
    assert found["modelspec.license"] == "apache-2.0"
    assert found["modelspec.date"].endswith("+00:00")
    assert json.loads(found["ppcl.kept_layers"]) == {"transformer_blocks": [0, 1, 3]}
    assert json.loads(found["ppcl.removed_intervals"]) == {"transformer_blocks": [[1, 2]]}
    assert found["ppcl.base_model"] == "Qwen/Qwen-Image"
    assert found["ppcl.version"] == "0.1.0"


def test_flux_without_guidance_is_schnell() -> None:
    assert modelspec("flux", {"ppcl": PROVENANCE}, {})["modelspec.architecture"] == "flux-1-schnell"
    dev = {"ppcl": PROVENANCE, "guidance_embeds": True}
    assert modelspec("flux", dev, {})["modelspec.architecture"] == "flux-1-dev"


@pytest.mark.parametrize(
    ("family", "model"),
    [
        ("qwen_image", lambda: PrunedQwenImageTransformer2DModel(**QWEN | {"num_layers": 3}, pruned_ffn=(1,))),
        ("flux", lambda: PrunedFluxTransformer2DModel(**FLUX | {"num_single_layers": 2}, pruned_text=(1,))),
    ],
)
def test_a_class_that_comfyui_does_not_know_is_refused(family: str, model: Any, tmp_path: Path) -> None:
    folder = saved(model(), tmp_path / "transformer")
    with pytest.raises(UsageError, match=r"export\.single_file=true: .*Pruned.*export\.single_file=false"):
        write_single_file(folder, tmp_path / "single.safetensors", family, "bfloat16", {})
    assert [path.name for path in tmp_path.iterdir()] == ["transformer"]


def test_a_name_without_a_place_is_refused() -> None:
    names = [f"transformer_blocks.0.attn.{name}.weight" for name in ("to_q", "to_k", "to_v", "to_add_out")]
    assert [part.key for part in parts_of(layout_of("flux"), names)] == [
        "double_blocks.0.img_attn.qkv.weight",
        "double_blocks.0.txt_attn.proj.weight",
    ]
    for wrong in ("transformer_blocks.0.txt_proj.weight", "transformer_blocks.0.attn.add_q_proj.weight"):
        with pytest.raises(UsageError, match=f"{wrong} has no place"):
            parts_of(layout_of("flux"), [*names, wrong])


def test_values_that_overflow_are_refused_and_leave_no_file(tmp_path: Path) -> None:
    model = QwenImageTransformer2DModel(**QWEN | {"num_layers": 1})
    folder = saved(model, tmp_path / "transformer", shard="100KB")
    model.proj_out.bias.data[3] = 1e6
    model.save_pretrained(folder, max_shard_size="100KB")
    with pytest.raises(UsageError, match=r"export\.single_file_dtype=float16: proj_out\.bias overflows"):
        write_single_file(folder, tmp_path / "single.safetensors", "qwen_image", "float16", {})
    assert [path.name for path in tmp_path.iterdir()] == ["transformer"]
    write_single_file(folder, tmp_path / "single.safetensors", "qwen_image", "bfloat16", {})
