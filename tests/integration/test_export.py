"""The exported folder is a stock diffusers pipeline that draws what the plugged teacher draws."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import NUM_LAYERS

from ppcl.surgery.plugboard import plug

PROMPTS = ["a red circle", "two squares", "a blue cross left of a circle"]
ARGUMENTS = {"height": 32, "width": 32, "num_inference_steps": 2, "true_cfg_scale": 3.0, "output_type": "np"}

# What a user of the export runs: one import beside diffusers, or one flag. Everything else would be a helping hand.
WAYS = {
    "import": ("import ppcl", {}),
    "remote code": ("sys.modules['ppcl'] = None  # as where it is not installed", {"trust_remote_code": True}),
}
LOADER = """
import json, sys
{first}
from diffusers import DiffusionPipeline

folder, prompts, arguments, target = sys.argv[1], *map(json.loads, sys.argv[2:4]), sys.argv[4]
pipeline = DiffusionPipeline.from_pretrained(folder, **{flags})
pipeline.set_progress_bar_config(disable=True)
import numpy, torch
images = pipeline(
    prompts, negative_prompt=[""] * len(prompts),
    generator=[torch.Generator().manual_seed(n) for n in range(len(prompts))], **arguments,
).images
numpy.save(target, images)
transformer = pipeline.transformer
print(json.dumps({{
    "class": type(transformer).__module__ + "." + type(transformer).__qualname__,
    "pipeline": type(pipeline).__name__,
    "blocks": len(transformer.transformer_blocks),
    "config": dict(transformer.config),
    "params": sum(p.numel() for p in transformer.parameters()),
    "extra_modules": sorted(name for name in sys.modules if name.startswith("ppcl.")),
    "vae": type(pipeline.vae).__module__,
}}, default=str))
"""


def draw(pipeline) -> np.ndarray:
    generators = [torch.Generator().manual_seed(number) for number in range(len(PROMPTS))]
    return pipeline(PROMPTS, negative_prompt=[""] * len(PROMPTS), generator=generators, **ARGUMENTS).images


@pytest.fixture(scope="module", params=list(WAYS))
def loaded(
    request: pytest.FixtureRequest, chain: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict, np.ndarray]:
    """What a fresh process finds in the export, and draws with it."""
    target = tmp_path_factory.mktemp("drawn") / "images.npy"
    arguments = [str(chain / "export"), json.dumps(PROMPTS), json.dumps(ARGUMENTS), str(target)]
    first, flags = WAYS[request.param]
    # Started elsewhere, so that no file of the repository helps, nor code that an earlier process kept.
    done = subprocess.run(
        [sys.executable, "-c", LOADER.format(first=first, flags=flags), *arguments],
        cwd=target.parent,
        env=os.environ | {"HF_MODULES_CACHE": str(target.parent / "modules")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) | {"way": request.param}, np.load(target)


def test_stock_classes_load_it(loaded: tuple[dict, np.ndarray]) -> None:
    facts, _ = loaded
    assert facts["pipeline"] == "QwenImagePipeline"
    assert facts["class"] == "diffusers.models.transformers.transformer_qwenimage.QwenImageTransformer2DModel"
    # The vae is the one component that is ours; nothing of the pruning code takes part.
    light = re.compile(
        r"ppcl\.(_diffusers|models(\.\w+)?|families(\.(registry|facts|dit|flux|qwen_image|qwen_image_edit))?)"
    )
    assert all(light.fullmatch(name) for name in facts["extra_modules"])
    if facts["way"] == "remote code":
        assert facts["extra_modules"] == []
        assert facts["vae"].startswith("diffusers_modules.")


def test_code_lies_beside_what_is_ours(chain: Path) -> None:
    """The vae's source, word for word; the transformer is stock and needs none."""
    import ppcl.models.autoencoder_pixel_unshuffle as source

    export = chain / "export"
    index = json.loads((export / "model_index.json").read_text())
    assert index["vae"] == ["autoencoder_pixel_unshuffle", "AutoencoderPixelUnshuffle"]
    assert index["transformer"] == ["diffusers", "QwenImageTransformer2DModel"]
    config = json.loads((export / "vae" / "config.json").read_text())
    assert config["auto_map"] == {"AutoModel": "autoencoder_pixel_unshuffle.AutoencoderPixelUnshuffle"}
    assert [str(path.relative_to(export)) for path in export.rglob("*.py")] == ["vae/autoencoder_pixel_unshuffle.py"]
    copied = export / "vae" / "autoencoder_pixel_unshuffle.py"
    assert copied.read_bytes() == Path(source.__file__).read_bytes()


def test_config_says_what_is_left(chain: Path, loaded: tuple[dict, np.ndarray]) -> None:
    facts, _ = loaded
    plan = json.loads((chain / "plan" / "plan.json").read_text())
    pairs = plan["intervals"]["transformer_blocks"]
    kept = [n for n in range(NUM_LAYERS) if not any(u < n <= v for u, v in pairs)]
    assert facts["blocks"] == facts["config"]["num_layers"] == len(kept) == plan["parameters"]["student_layers"]
    assert facts["params"] == plan["parameters"]["student"]
    config = json.loads((chain / "export" / "transformer" / "config.json").read_text())
    assert config["num_layers"] == len(kept)
    for found in (config, facts["config"]):
        assert found["ppcl"]["kept_layers"] == {"transformer_blocks": kept}
        assert found["ppcl"]["removed_intervals"] == {"transformer_blocks": pairs}
        assert found["ppcl"]["method"] == "ppcl"


def test_pictures_are_those_of_the_plugged_teacher(teacher: Path, chain: Path, loaded: tuple[dict, np.ndarray]) -> None:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(teacher)
    pipeline.set_progress_bar_config(disable=True)
    whole = draw(pipeline)
    plug(pipeline, chain / "plugs")
    pruned = draw(pipeline)
    _, exported = loaded
    assert exported.dtype == pruned.dtype == np.float32
    assert np.array_equal(exported, pruned)
    assert not np.array_equal(exported, whole)


def test_card_tells_how_to_load_it(chain: Path) -> None:
    card = (chain / "export" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: diffusers\n")
    assert "import ppcl" in card  # the embedded vae needs it


def test_nothing_of_this_machine_is_in_it(chain: Path, teacher: Path) -> None:
    """The teacher is a local folder, which diffusers and transformers note in what they save."""
    texts = {path: path.read_text() for path in (chain / "export").rglob("*") if path.suffix in (".json", ".md", ".py")}
    assert len(texts) > 6
    home = [str(path) for path in (teacher.parent, chain.parent, Path.home(), Path.cwd())]
    assert [path for path, text in texts.items() if any(place in text for place in home)] == []
    assert (
        json.loads((chain / "export" / "transformer" / "config.json").read_text())["ppcl"]["base_model"] == teacher.name
    )
