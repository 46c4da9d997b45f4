"""Pins what users' stored artifacts depend on: fingerprints, names, layouts of files, and losses of a seed.

The expected values are literals in `pins.json`, one section a test. No module of ppcl is imported, only its command
line and its public names are used, so that these tests stay as they are when modules are moved.

    pytest tests/integration/test_pins.py                              # compare
    PPCL_RENEW_PINS=1 pytest tests/integration/test_pins.py            # write all sections anew
    PPCL_RENEW_PINS=projectors pytest tests/integration/test_pins.py   # only these, separated by commas

Every renewed line is a change that users notice: review the diff of `pins.json`. Fingerprints are equal on every
machine, as the teacher's weights are integers over 1024 here, drawn by a generator that never changes. What depends
on paths, on versions of libraries or on bytes that they write is masked as `<varies>`.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import INTERVALS, NUM_LAYERS, PLUG_NAMES, ppcl, succeed
from diffusers import DiffusionPipeline
from PIL import Image

import ppcl as package

PINS = Path(__file__).with_name("pins.json")
RENEW = os.environ.get("PPCL_RENEW_PINS", "")
STACK, WIDTH = "transformer_blocks", 64
VARIES = "<varies>"
# By key at any depth of `made_from`: digests of files that libraries write, their versions, absolute paths.
VARYING = {"encoders", "versions", "cache", "lora", "published", "file", "_diffusers_version"}
CHANGED = 1_700_000_000_000_000_000  # the modification time of every file that a header names by it
CLASSES = [
    "AutoencoderPixelUnshuffle",
    "PictureProcessor",
    "PrunedDiTTransformer2DModel",
    "PrunedFluxTransformer2DModel",
    "PrunedQwenImageTransformer2DModel",
]
FUNCTIONS = ["plug", "remap_lora", "place_residuals", "import_published"]

# Comparing, and writing anew.


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Every leaf of nested dicts by its path."""
    if not isinstance(value, Mapping) or not value:
        return {path: value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= flat(item, f"{path}.{key}" if path else str(key))
    return found


def differences(expected: Any, found: Any) -> list[str]:
    """A line for every leaf that was added, removed or changed; numbers of losses within 1e-4."""
    before, after = flat(expected), flat(found)
    lines = []
    for key in sorted({*before, *after}):
        if key not in after:
            lines.append(f"{key}: {before[key]!r} is gone")
        elif key not in before:
            lines.append(f"{key}: {after[key]!r} is new")
        elif isinstance(before[key], list) and isinstance(after[key], list) and before[key] != after[key]:
            gone, new = (
                [x for x in a if x not in b] for a, b in ((before[key], after[key]), (after[key], before[key]))
            )
            lines.append(f"{key}: without {gone}, with {new}" if gone or new else f"{key}: in another order")
        elif before[key] != after[key]:
            if isinstance(before[key], float) and after[key] == pytest.approx(before[key], rel=1e-4, abs=1e-6):
                continue
            lines.append(f"{key}: {before[key]!r} became {after[key]!r}")
    return lines


def check(section: str, found: dict[str, Any]) -> None:
    """Compare a section of `pins.json`, of values by artifact; or write it anew where that is asked for."""
    found = json.loads(json.dumps(found, sort_keys=True))
    pins = json.loads(PINS.read_text(encoding="utf-8")) if PINS.exists() else {}
    if renews(section):
        pins[section] = found
        PINS.write_text(laid_out(pins) + "\n", encoding="utf-8")
        return
    lines, expected = [], pins.get(section, {})
    for name in sorted({*expected, *found}):
        if name not in found:
            lines.append(f"{name} is no longer made")
        elif name not in expected:
            lines.append(f"{name} is new")
        else:
            lines += [f"{name} changed: {line}" for line in differences(expected[name], found[name])]
    advice = f"If all of this is intended: PPCL_RENEW_PINS={section} pytest {Path(__file__).name}"
    assert not lines, f"{section}: users' artifacts would be affected.\n" + "\n".join([*lines, advice])


def laid_out(value: Any, indent: int = 0) -> str:
    """JSON with sorted keys, in which what fits on a line stands on one."""
    short = json.dumps(value, sort_keys=True)
    if (indent and len(short) + indent <= 110) or not isinstance(value, dict | list):
        return short
    inner, margin = indent + 1, " " * (indent + 1)
    if isinstance(value, dict):
        items = [f"{margin}{json.dumps(key)}: {laid_out(item, inner)}" for key, item in sorted(value.items())]
        return "{\n" + ",\n".join(items) + "\n" + " " * indent + "}"
    return "[\n" + ",\n".join(margin + laid_out(item, inner) for item in value) + "\n" + " " * indent + "]"


def renews(section: str) -> bool:
    """Whether this session writes a section anew."""
    return RENEW in ("1", "all") or section in RENEW.split(",")


def pinned(section: str) -> dict[str, Any]:
    """The expected values of a section."""
    return json.loads(PINS.read_text(encoding="utf-8"))[section]


def fingerprint_of(header: Mapping[str, Any]) -> str:
    """The hash of a header, written down here once more."""
    content = {key: header[key] for key in ("format", "version", "made_from")}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


# Inputs that are the same bytes everywhere.


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """The format in plain Python, so that no version of a library has a say in the bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name, value in sorted(tensors.items()):
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [start, start + value.nbytes]}
        start += value.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    body = b"".join(value.astype("<f4").tobytes() for _, value in sorted(tensors.items()))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    os.utime(path, ns=(CHANGED, CHANGED))


def read_safetensors(path: Path) -> dict[str, Any]:
    """The header of a safetensors file."""
    with path.open("rb") as handle:
        return json.loads(handle.read(int.from_bytes(handle.read(8), "little")))


def numbers(shape: tuple[int, ...] | list[int], seed: int) -> np.ndarray:
    """Integers over 1024, of a generator that numpy keeps as it is."""
    return (np.random.RandomState(seed).randint(-128, 129, size=tuple(shape)) / 1024).astype(np.float32)


@pytest.fixture(scope="module")
def exact(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher of the other tests with integers for weights, over 1024: the same bytes on every machine."""
    folder = tmp_path_factory.mktemp("exact") / "pipeline"
    shutil.copytree(teacher, folder)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    shapes = {key: entry["shape"] for key, entry in sorted(read_safetensors(weights).items()) if key[0] != "_"}
    tensors = {
        key: np.ones(shape, np.float32) if "norm" in key and len(shape) == 1 and "weight" in key else numbers(shape, n)
        for n, (key, shape) in enumerate(shapes.items())
    }
    write_safetensors(weights, tensors, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA on every block of the teacher, by the names that diffusers gives."""
    path = tmp_path_factory.mktemp("lora") / "style.safetensors"
    shapes = {"lora_A": (2, WIDTH), "lora_B": (WIDTH, 2)}
    names = [(i, kind) for i in range(NUM_LAYERS) for kind in shapes]
    tensors = {f"transformer.{STACK}.{i}.attn.to_q.{kind}.weight": numbers(shapes[kind], i) for i, kind in names}
    write_safetensors(path, tensors, {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def published(exact: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A published model, pruned in depth alone, and a training checkpoint of its authors."""
    folder = tmp_path_factory.mktemp("published")
    model = folder / "model"
    shutil.copytree(exact, model)
    weights = model / "transformer" / "diffusion_pytorch_model.safetensors"
    header = {key: entry["shape"] for key, entry in read_safetensors(weights).items() if key[0] != "_"}
    kept = {key: shape for key, shape in header.items() if not key.startswith((f"{STACK}.4.", f"{STACK}.5."))}
    tensors = {key: numbers(shape, number) for number, (key, shape) in enumerate(sorted(kept.items()))}
    write_safetensors(weights, tensors, {"format": "pt"})
    config = model / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": 4}))

    blocks = {key.removeprefix(f"{STACK}."): shape for key, shape in header.items() if key.startswith(STACK)}
    students = {key: torch.zeros(shape) for key, shape in blocks.items() if key.startswith(("0.", "1."))}
    lists = {"attn_proj_list": 2, "ehs_proj_list": 2, "ffn_proj_list": 8, "block_proj_list": 4}
    shapes = {"weight": (WIDTH, WIDTH), "bias": (WIDTH,)}
    content = {
        name: {f"{number}.{part}": torch.zeros(shape) for number in range(count) for part, shape in shapes.items()}
        for name, count in lists.items()
    }
    torch.save(content | {"transformer_distill_blocks": students}, folder / "training.bin")
    return model, folder / "training.bin"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures with captions: as a shard, and as a folder with a table."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = ["image,prompt_en"]
    with tarfile.open(folder / "00000.tar", "w") as archive:
        for number in range(12):
            buffer = io.BytesIO()
            Image.new("RGB", (32, 32), (20 * number, 255 - 20 * number, 60)).save(buffer, format="PNG")
            caption = "a red circle" if number % 2 else "a blue square"
            (folder / f"{number}.png").write_bytes(buffer.getvalue())
            rows.append(f"{number}.png,{caption}")
            for suffix, content in (("png", buffer.getvalue()), ("txt", caption.encode())):
                entry = tarfile.TarInfo(f"{number:04d}.{suffix}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    for path in (folder / "00000.tar", folder / "metadata.csv"):
        os.utime(path, ns=(CHANGED, CHANGED))
    return folder


# One run of every kind.


@contextmanager
def kept_checkpoints(runs: Path, kept: Path) -> Iterator[None]:
    """Copies every checkpoint before a stage that ends well removes it: when it gives an artifact its name."""
    seen: dict[Path, int] = {}

    def copying(rename: Any) -> Any:
        def copy(source: Any, target: Any, **keywords: Any) -> None:
            for path in runs.rglob("last.ckpt"):
                if seen.get(path) != path.stat().st_mtime_ns:
                    seen[path] = path.stat().st_mtime_ns
                    folder = kept / path.parent.relative_to(runs)
                    shutil.rmtree(folder, ignore_errors=True)
                    shutil.copytree(path.parent, folder)
            rename(source, target, **keywords)

        return copy

    with pytest.MonkeyPatch.context() as patch:
        for name in ("replace", "rename"):
            patch.setattr(os, name, copying(getattr(os, name)))
        yield


@pytest.fixture(scope="module")
def common(exact: Path) -> list[str]:
    """What the commands have in common: smallest sizes, every number that a header holds given here or in `conf`."""
    return [
        "model=auto",
        "recipe=paper",
        f"model.path={exact}",
        "model.sampling.num_inference_steps=1",
        "probe.num_batches=1",
        "probe.num_heldout_batches=1",
        "probe.batch_size=8",
        "method.min_cka=0",
        "method.num_samples=2",
        "method.num_timesteps=2",
        "method.batch_size=2",
        "distill=tiny",
        "distill.steps=3",
        "distill.batch_size=8",
        "distill.warmup_steps=1",  # so that a few steps change something
        "distill.checkpoint_every=1",
        "width.steps=3",
        "width.lr=0.02",
        "width.num_batches=2",
        "finetune=tiny",
        "finetune.steps=3",
        "finetune.batch_size=4",
        "finetune.warmup_steps=1",
        "finetune.checkpoint_every=1",
        "budget.num_batches=1",
        "benchmark.prompts_per_category=1",
        "benchmark.latency_repeats=1",
        "generate.batch_size=6",
        "trainer=cpu",
        "trainer.num_threads=1",
        "trainer.progress=false",
        "logger=csv",
    ]


@pytest.fixture(scope="module")
def place(
    common: list[str],
    lora: Path,
    published: tuple[Path, Path],
    pictures: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder `runs` in which every stage has left what it leaves, and `kept` with the checkpoints of trainings."""
    place = tmp_path_factory.mktemp("pins")
    runs, kept = place / "runs", place / "kept"
    shapes = [*common, f"paths.runs_dir={runs / 'shapes'}"]
    given = [*shapes, INTERVALS]
    base = f"paths.base_run={runs / 'shapes' / 'depth'}"
    succeed(*shapes, "name=detected", "stages=[probe,detect]")
    with kept_checkpoints(runs, kept):
        succeed(
            *given,
            "name=depth",
            "stages=[plan,depth,finetune,export,quantize,remap_lora,generate,evaluate,report]",
            "finetune.optimizer=adamw",
            "export.variant=ppcl-depth",
            "export.single_file=true",
            "quantize=int8",
            "quantize.variant=ppcl-depth",
            f"lora.path={lora}",
            "generate.variants=[teacher,removed,ppcl-depth,ppcl-mixed,ppcl-finetuned,ppcl-quantized]",
        )
        # A budget that takes both students: what is chosen must not hang on measurements.
        # Muon rounds to bfloat16, so that large steps would enlarge what differs between processors.
        muon = ["finetune.optimizer=muon", "finetune.muon_lr=0.001"]
        succeed(*given, "name=muon", base, "stages=[plan,finetune]", "budget.params=0.75", *muon)
        succeed(
            *given,
            "name=lora",
            base,
            "stages=[finetune,quantize,generate]",
            f"generate.loras=[{lora}]",
            "generate.prompt='a red circle'",
            "generate.name=prompts",
            "generate.variants=[ppcl-depth]",
            "finetune.lora_rank=2",
            "finetune.optimizer=adamw",
            "quantize=int8",
            "quantize.rounding=least_squares",
            "quantize.variant=ppcl-depth",
            "quantize.num_batches=1",
            "quantize.batch_size=4",
        )
        succeed(*given, "name=sequential", "stages=[depth]", "distill.mode=sequential")
        replayed = ["distill.from_boundaries=true", "distill.replay=2", "distill.batch_size=4"]
        succeed(*given, "name=bounded", "stages=[boundaries,depth]", *replayed)
        shutil.copytree(runs / "shapes" / "depth" / "plugs", runs / "shapes" / "width" / "plugs")
        succeed(
            *given,
            "name=width",
            "stages=[depth,width,plan,finetune,export,generate,evaluate]",
            "width.source=given",
            f"width.{STACK}.text=[3,5]",
            f"width.{STACK}.ffn=[1,5]",
            "budget.params=0.43",  # which takes everything
            "finetune.steps=1",
            "finetune.feature_weight=0",
            "export.variant=ppcl-width",
            "generate.variants=[teacher,ppcl-width,ppcl-planned,ppcl-finetuned]",
        )
        pretrain = [a for a in shapes if not a.startswith("model")]
        settings = [f"pretrain.num_layers={NUM_LAYERS}", "pretrain.steps=3", "pretrain.batch_size=4"]
        settings.append("pretrain.warmup_steps=1")
        succeed(*pretrain, *settings, "pretrain.checkpoint_every=1", "name=pretrained", "stages=[pretrain]")
    for kind, path in (("webdataset", pictures), ("folder", pictures / "metadata.csv")):
        data = [f"data={kind}", f"data.path={path}", "data.held_out=0.3", "data.captions=[prompt_en]"]
        stages = "stages=[cache,probe,depth]" if kind == "webdataset" else "stages=[cache]"
        sizes = ["distill.steps=1", "distill.batch_size=2", "probe.batch_size=2"]
        succeed(*common, INTERVALS, f"paths.runs_dir={runs / kind}", *data, *sizes, stages, "name=cached")
    model, training = published
    sets = ["width.source=given", f"width.{STACK}.text=[5]", f"width.{STACK}.ffn=[1,3]"]
    groups = "published.ehs_same=[[0,2],[3,5]]"
    succeed(*given, "name=imported_model", "stages=[import_published]", f"published.path={model}")
    succeed(*given, *sets, groups, "name=imported_plugs", "stages=[import_published]", f"published.path={training}")
    return place


def relative(path: Path, root: Path) -> str:
    """A path below `root` with what varies from run to run left out."""
    return without_hashes(path.relative_to(root).as_posix())


def is_memory(path: Path) -> bool:
    """Whether a file only saves the reading of a teacher's files: it is there or not by when those were written."""
    return path.parent.name == "teachers"


def without_hashes(text: str) -> str:
    """A text with every fingerprint in it masked."""
    return re.sub(r"(?<![0-9a-f])[0-9a-f]{16}(?![0-9a-f])", "<16 hex>", text)


# What is pinned.


def without_varying(value: Any) -> Any:
    """A header with what is not the same everywhere masked."""
    if isinstance(value, dict):
        return {key: VARIES if key in VARYING and item else without_varying(item) for key, item in value.items()}
    return [without_varying(item) for item in value] if isinstance(value, list) else value


def headers(place: Path) -> dict[str, dict[str, Any]]:
    """Every header of an artifact or a checkpoint, by its file."""
    found: dict[str, dict[str, Any]] = {}
    for root in (place / "runs", place / "kept"):
        for path in sorted(root.rglob("*.json")):
            if (root, path.name) == (place / "kept", "checkpoint.json") or root == place / "runs":
                content = json.loads(path.read_text(encoding="utf-8"))
                if isinstance(content, dict) and {"format", "made_from"} <= content.keys():
                    name = relative(path, root)
                    assert name not in found, name
                    found[name] = {key: content.get(key) for key in ("format", "version", "fingerprint", "made_from")}
    return found


@pytest.fixture(scope="module")
def all_headers(place: Path) -> dict[str, dict[str, Any]]:
    return headers(place)


@pytest.fixture(scope="module")
def of_projectors(all_headers: dict[str, dict[str, Any]]) -> set[str]:
    """Headers of trained projectors, and of what is made from them."""
    found = {name for name, header in all_headers.items() if header["format"] == "ppcl.projector"}
    found = {name for name in found if "distill" in all_headers[name]["made_from"]}
    while True:
        theirs = [all_headers[name]["fingerprint"] for name in found]
        made = {n for n, header in all_headers.items() if any(f in json.dumps(header["made_from"]) for f in theirs)}
        if made <= found:
            return found
        found |= made


def pins_of(all_headers: dict[str, dict[str, Any]], names: set[str]) -> dict[str, Any]:
    """Headers to compare: with their fingerprint, where nothing in them varies."""
    varying = {
        name for name, header in all_headers.items() if header["made_from"] != without_varying(header["made_from"])
    }
    while True:
        theirs = [all_headers[name]["fingerprint"] for name in varying]
        made = {n for n, header in all_headers.items() if any(f in json.dumps(header["made_from"]) for f in theirs)}
        if made <= varying:
            break
        varying |= made
    moving = {all_headers[name]["fingerprint"] for name in varying}
    found = {}
    for name in sorted(names):
        header = all_headers[name]
        text = json.dumps(without_varying(header["made_from"]))
        for value in moving:
            text = text.replace(value, VARIES)
        shown = VARIES if name in varying else header["fingerprint"]
        # In an export's record ppcl's version has taken the place of the format's.
        version = header["version"] if isinstance(header["version"], int) else VARIES
        found[name] = header | {"fingerprint": shown, "version": version, "made_from": json.loads(text)}
    return found


def test_a_fingerprint_is_the_hash_of_its_header(all_headers: dict[str, dict[str, Any]]) -> None:
    """Which is written down here once more; the version of an export's format is overwritten by ppcl's."""
    for name, header in all_headers.items():
        version = header["version"] if isinstance(header["version"], int) else 1
        assert header["fingerprint"] == fingerprint_of(header | {"version": version}), name


def test_every_format_is_there(all_headers: dict[str, dict[str, Any]], place: Path) -> None:
    formats = {header["format"] for header in all_headers.values()}
    assert formats == {
        f"ppcl.{name}"
        for name in (
            *("boundaries", "cache", "costs", "depth", "export", "finetuned", "images", "imported", "lora", "plan"),
            *("plug", "probes", "projector", "quantized", "scores", "teacher", "width"),
        )
    }


def test_fingerprints(all_headers: dict[str, dict[str, Any]], of_projectors: set[str]) -> None:
    check("fingerprints", pins_of(all_headers, all_headers.keys() - of_projectors))


def test_fingerprints_of_projectors(all_headers: dict[str, dict[str, Any]], of_projectors: set[str]) -> None:
    """Apart from the others, to be renewed alone: also of what is made from projectors."""
    check("projectors", pins_of(all_headers, of_projectors))


def test_single_file(place: Path) -> None:
    """A single file has what it is made from in its metadata."""
    run = place / "runs" / "shapes" / "depth"
    metadata = read_safetensors(run / "export.safetensors")["__metadata__"]
    ours = {key: value for key, value in metadata.items() if key.startswith("ppcl.") and key != "ppcl.version"}
    export = json.loads((run / "export" / "ppcl.json").read_text(encoding="utf-8"))["fingerprint"]
    made_from = {"export": export, "dtype": "bfloat16"}
    assert ours["ppcl.fingerprint"] == fingerprint_of(
        {"format": "ppcl.single_file", "version": 1, "made_from": made_from}
    )
    check("single_file", {"keys": sorted(metadata), "ppcl": ours})


# The demo, on the teacher that is shipped.


def read_refusals(header: dict[str, Any], write: Any, command: list[str]) -> dict[str, Any]:
    """The header that a stage wants, found key by key from why it refuses another."""
    made_from: dict[str, Any] = {}
    for _ in range(20):
        write(header | {"fingerprint": "0" * 16, "made_from": made_from})
        error = ppcl(*command).err.strip()
        found = re.search(r" was made with (?:nothing|(\w+)=unset, now (.*)): [a-z].*", error)
        assert found, error
        if found[1] is None:
            complete = header | {"made_from": made_from}
            return complete | {"fingerprint": fingerprint_of(complete)}
        made_from[found[1]] = ast.literal_eval(found[2])
    raise AssertionError(error)


def test_demo(tmp_path: Path) -> None:
    """The demo's stages take what they left before: records by their pinned fingerprints, so that nothing is made.

    Probes and plan by detection are the demo's own; plug and tuned model are of one given interval.
    """
    command = ["experiment=demo", "recipe=paper", f"paths.runs_dir={tmp_path}", "trainer.progress=false"]
    command += ["distill.steps=400", "finetune.steps=400"]  # as it was when these were pinned
    given = [*command, f"intervals.{STACK}=[[3,5]]", "width=none", "budget.params=null", "generate.variants=[teacher]"]
    run, name = tmp_path / "demo", f"{STACK}.3-5"
    layers = {"family": "qwen_image", "num_layers": {STACK: 20}, "intervals": {}, "scores": {}, "width": {}}
    counts = {"parameters": dict.fromkeys(("teacher_layers", "student_layers", "teacher", "student"), 1)}
    place = {"stack": STACK, "interval": [3, 5], "losses": {}}

    def writer(path: Path, body: dict[str, Any]) -> Any:
        def write(header: dict[str, Any]) -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(header | body))

        return write

    steps = {
        "plan": ("ppcl.plan", writer(run / "plan" / "plan.json", layers | counts), [*command, "stages=[detect]"]),
        "plug": ("ppcl.plug", writer(run / "plugs" / f"{name}.json", place), [*given, "stages=[depth]"]),
        "finetuned": ("ppcl.finetuned", writer(run / "finetuned" / "ppcl.json", {}), [*given, "stages=[finetune]"]),
    }
    found = {}
    for kind, (form, write, stage) in steps.items():
        if renews("demo"):
            found[kind] = read_refusals({"format": form, "version": 1}, write, stage)
        else:
            found[kind] = pinned("demo")[kind]
        assert found[kind]["fingerprint"] == fingerprint_of(found[kind]), kind
        if kind == "plug":  # a record counts only with its tensors
            tensors = {"norm": np.ones(1, np.float32)}
            write_safetensors(
                run / "plugs" / f"{name}.safetensors", tensors, {"fingerprint": found[kind]["fingerprint"]}
            )
        if kind == "finetuned":
            weights = run / "finetuned" / "transformer" / "model.safetensors"
            write_safetensors(weights, {"norm": np.ones(1, np.float32)}, {})
        write(found[kind])
        outcome = ppcl(*stage)
        assert outcome.code == 0, f"the demo's {kind} changed: {outcome.err}; renew with PPCL_RENEW_PINS=demo"
        assert "reused" in outcome.out, kind

    probes: dict[str, Any] = {
        "format": "ppcl.probes",
        "version": 2,
        "made_from": found["plan"]["made_from"]["detection"],
    }
    found["probes"] = probes = probes | {"fingerprint": fingerprint_of(probes)}
    writer(tmp_path / "cache" / "probes" / probes["fingerprint"] / "probes.json", {"residuals": {}})(probes)
    assert "reused" in succeed(*command, "stages=[probe]").out
    check("demo", found)


# Layouts.


def without_numbers(entries: Mapping[str, str]) -> dict[str, Any]:
    """Tensors by name, those of one name but for a number in one line."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for name, kind in entries.items():
        indices = re.findall(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", name)
        pattern = re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name)
        grouped.setdefault((pattern, kind), []).append(".".join(indices))
    found: dict[str, Any] = {}
    for (pattern, kind), indices in sorted(grouped.items()):
        shown = f"{kind} of {' '.join(indices)}" if any(indices) else kind
        found[pattern] = f"{found[pattern]}; {shown}" if pattern in found else shown
    return found


def test_tensors(place: Path) -> None:
    """Names, shapes and dtypes in every safetensors file; a file like an earlier one is named by that one."""
    found: dict[str, Any] = {}
    seen: dict[str, str] = {}
    for path in sorted((place / "runs").rglob("*.safetensors")):
        name = relative(path, place / "runs")
        if re.search(r"/(vae|text_encoder)/", name):
            continue
        if name.startswith(("shapes/cache/probes", "webdataset/cache/probes")) and ".0." not in path.name:
            continue  # one block's stand for all
        header = read_safetensors(path)
        metadata = header.pop("__metadata__", {})
        shapes = {key: f"{entry['dtype']} {entry['shape']}" for key, entry in header.items()}
        if name.startswith(("webdataset/cache/data", "folder/cache/data")):
            # Twelve samples of two prompts, in an order that is not ours to pin.
            shapes = {key: kind for key, kind in shapes.items() if key.startswith("000.") or key.count(".") == 0}
        layout = {"metadata": sorted(metadata), "tensors": without_numbers(shapes)}
        first = seen.setdefault(json.dumps(layout, sort_keys=True), name)
        found[name] = layout if first == name else {"as": first}
    check("tensors", found)


def structure(value: Any) -> Any:
    """The keys of nested values, with what kind each leaf is; the items of a list or by number are taken together."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, Mapping):
        if value and all(isinstance(key, int) for key in value):
            return {"by number": together([structure(item) for item in value.values()])}
        return {str(key): structure(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [together([structure(item) for item in value])]
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__


def together(kinds: list[Any]) -> Any:
    """One structure for all items of a list."""
    if all(isinstance(kind, dict) for kind in kinds):
        keys = sorted({key for kind in kinds for key in kind})
        return {key: together([kind[key] for kind in kinds if key in kind]) for key in keys}
    if all(isinstance(kind, list) for kind in kinds):
        return [together([item for kind in kinds for item in kind if item != {}])]
    return " or ".join(sorted({json.dumps(kind, sort_keys=True).strip('"') for kind in kinds}))


def test_checkpoints(place: Path) -> None:
    """What `last.ckpt` holds, so that a training that was killed before an upgrade resumes after it."""
    found = {}
    wanted = {"depth/plugs": "depth", "width/plugs": "width", "depth/finetune": "finetune", "pretrained": "pretrain"}
    for path in sorted((place / "kept").rglob("last.ckpt")):
        name = relative(path, place / "kept")
        kind = next((kind for start, kind in wanted.items() if name.startswith(f"shapes/{start}")), None)
        if kind is None:
            continue
        content = torch.load(path, weights_only=True)
        tensors = {key: structure(value) for key, value in content.pop("state_dict").items()}
        states = content.pop("optimizer_states")
        optimizers = [
            {
                "state": sorted({key for state in optimizer["state"].values() for key in state}),
                "groups": [[sorted(group), len(group["params"])] for group in optimizer["param_groups"]],
            }
            for optimizer in states
        ]
        found[kind] = {
            "path": name,
            "keys": sorted(content),
            "state_dict": without_numbers(tensors),
            "optimizers": optimizers,
            "loader": structure(content["loops"]["fit_loop"]["state_dict"]),
            "callbacks": sorted(content["callbacks"]),
            "hyper_parameters": structure(content.get("hyper_parameters", {})),
        }
    assert found.keys() == set(wanted.values())
    check("checkpoints", found)


def test_files(place: Path) -> None:
    """Every file that the stages leave, by its folder."""
    folders: dict[str, list[str]] = {}
    for path in sorted((place / "runs").rglob("*")):
        if path.is_file() and not is_memory(path):
            name = Path(relative(path, place / "runs"))
            folders.setdefault(name.parent.as_posix(), []).append(name.name)
    check("files", {folder: {"files": sorted(names)} for folder, names in folders.items()})


def test_json_files(place: Path) -> None:
    """The keys of every JSON of ours, and of a plan, costs and the like one level deeper."""
    found = {}
    for path in sorted((place / "runs").rglob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        name = relative(path, place / "runs")
        if is_memory(path) or re.search(r"/(vae|text_encoder|tokenizer|scheduler|transformer)/|model_index", name):
            continue  # diffusers', and below
        found[name] = {"keys": sorted(content)}
        if path.name in ("plan.json", "width.json", "costs.json", "choice.json"):
            found[name]["within"] = {k: structure(v) for k, v in sorted(content.items()) if k != "made_from"}
    check("json_files", found)


def test_exported_configs(place: Path, exact: Path) -> None:
    """Classes of components, and what a transformer's config says of its origin."""
    found = {}
    for path in sorted((place / "runs").rglob("transformer/config.json")):
        folder = path.parents[1]
        text = without_hashes(path.read_text(encoding="utf-8").replace(str(exact), "<teacher>"))
        config = json.loads(text)
        for key in ("_diffusers_version", "_name_or_path"):
            config.pop(key, None)
        config.get("ppcl", {}).pop("version", None)
        name = relative(folder, place / "runs")
        found[name] = {"transformer": config}
        if (folder / "model_index.json").exists():
            index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
            components = {key: value for key, value in index.items() if isinstance(value, list)}
            found[name]["model_index"] = components | {"_class_name": index["_class_name"]}
    check("exported_configs", found)


def test_pictures(place: Path) -> None:
    """What is written into every picture."""
    folder = place / "runs" / "shapes" / "depth" / "images" / "shapes"
    with Image.open(folder / "ppcl-depth" / "00000.png") as picture:
        content = json.loads(picture.info["ppcl"])
    (line, *_) = (folder / "ppcl-depth" / "prompts.jsonl").read_text().splitlines()
    check("pictures", {"chunk": {"keys": sorted(content)}, "prompts.jsonl": {"keys": sorted(json.loads(line))}})


# Numbers.


def test_losses(place: Path) -> None:
    """Losses of a seed after a few steps, to four digits: data, initial values, and the arithmetic of each training."""
    runs = place / "runs" / "shapes"
    found: dict[str, Any] = {}
    for run in ("depth", "sequential", "bounded", "width"):
        for path in sorted((runs / run / "plugs").glob("*.json")):
            if run != "width" or path.stem not in PLUG_NAMES:
                losses = json.loads(path.read_text(encoding="utf-8"))["losses"]
                assert losses
                found[f"{run}/{path.stem}"] = losses
    for run, stage in (("depth", "finetune"), ("muon", "finetune"), ("lora", "finetune"), ("pretrained", "pretrain")):
        path = runs / run / "logs" / stage / "version_0" / "metrics.csv"
        with path.open(newline="", encoding="utf-8") as handle:
            last = list(csv.DictReader(handle))[-1]
        watched = ("lr", "muon_lr", "adam_lr", "relative_update", "gradient_norm", "samples_per_second", "memory_gb")
        losses = {key: value for key, value in last.items() if key.partition("/")[0] == stage}
        found[f"{run}/{stage}"] = {k: float(v) for k, v in losses.items() if k.rpartition("/")[2] not in watched}
        assert found[f"{run}/{stage}"]
    check("losses", found)


def test_default_recipe(common: list[str], tmp_path: Path) -> None:
    """Headers and losses of plugs by `recipe=standard`; all else here is by `recipe=paper`."""
    command = [a for a in common if not a.startswith(("recipe=", "width.lr=", "distill.warmup_steps="))]
    command += [INTERVALS, f"paths.runs_dir={tmp_path}", "name=standard", "stages=[depth,width]"]
    # Muon rounds to bfloat16. The first steps of a long warm-up are small, as above.
    command += [
        "distill.relative_update=0.05",
        "width.relative_update=0.05",
        "distill.warmup_steps=100",
        "width.source=given",
        f"width.{STACK}.ffn=[0]",
    ]
    succeed(*command)
    found = {}
    for path in sorted((tmp_path / "standard" / "plugs").glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        assert content["fingerprint"] == fingerprint_of(content)
        kept = {key: content[key] for key in ("format", "version", "fingerprint", "made_from", "losses")}
        found[path.stem] = without_varying(kept)
    assert len(found) == 3
    check("default_recipe", found)


# Names that users write.


def test_help_and_variants(tmp_path: Path) -> None:
    """Stages and groups as the help lists them, and variants as the refusal of an unknown one does."""
    text = succeed("--help").out
    stages = re.findall(r"^  ([a-z_]+)  ", text.partition("Stages, run in this order")[2].partition("Groups")[0], re.M)
    groups = re.findall(r"^([a-z]+): ", text.partition("Groups (group=choice)")[2], re.M)
    refused = ppcl(f"paths.runs_dir={tmp_path}", "model=tiny_qwen_image", "stages=[plan]", "generate.variants=[none]")
    variants = re.search(r"generate\.variants=none is not one of (.*)\.$", refused.err.strip())
    assert variants, refused.err
    names = {"stages": stages, "groups": sorted(groups), "variants": variants[1].split(", ")}
    check("names", {key: {"names": value} for key, value in names.items()})


def test_public_names(place: Path, exact: Path) -> None:
    """What scripts import from ppcl, taking what the runs left."""
    assert all(callable(getattr(package, name)) for name in FUNCTIONS)
    assert [getattr(package, name).__name__ for name in CLASSES] == CLASSES
    runs = place / "runs" / "shapes"
    pipeline = DiffusionPipeline.from_pretrained(exact)
    board = package.plug(pipeline, runs / "width" / "plugs")
    board(*PLUG_NAMES)
    assert len(pipeline.transformer.transformer_blocks) == 4
    exported = package.PrunedQwenImageTransformer2DModel.from_pretrained(runs / "width" / "export" / "transformer")
    assert type(exported).__name__ == "PrunedQwenImageTransformer2DModel"
    package.place_residuals(exported)
