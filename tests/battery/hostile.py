"""Files that would run code, or take all memory, if they were believed: each is refused in a sentence or left out."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from tests.battery.chain import Chain
from tests.forks import Ended, run_forked


class Touch:
    """Makes the file `path` where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return os.mknod, (str(self.path),)


def _copy(chain: Chain, stage: str, folder: Path) -> Path:
    """Return a copy of the folders as they were before `stage`."""
    return Path(shutil.copytree(chain.before[stage], folder / "place"))


def _with_teacher(chain: Chain, folder: Path, stage: str = "probe") -> tuple[Path, list[str]]:
    """Return a copy of the teacher, and the settings of a command that runs a stage with it."""
    teacher = Path(shutil.copytree(chain.folder / "teacher", folder / "teacher"))
    command = [s for s in chain.command(stage, _copy(chain, stage, folder)) if not s.startswith("model.path=")]
    return teacher, [*command, f"model.path={teacher}", "name=other"]


def _with_shards(chain: Chain, folder: Path) -> tuple[Path, list[str]]:
    """Return an empty folder for shards, and the settings of a command that caches them. It works in that folder."""
    shards, place = folder / "shards", folder / "place"
    shards.mkdir()
    command = [s for s in chain.command("cache", place) if not s.startswith("data.path=")]
    return shards, [*command, f"data.path={shards}"]


def _shard(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def _png(width: int, height: int) -> bytes:
    """Return a grey PNG of any size, which takes a few bytes: its rows are cut short."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def shard_named_as_a_command(chain: Chain, folder: Path) -> Ended:
    shards, command = _with_shards(chain, folder)
    shutil.copy(chain.folder / "shards" / "0.tar", shards / f"pipe:touch {folder.name}-made; cat 0.tar")
    shutil.copy(chain.folder / "shards" / "0.tar", shards / f"pipe:touch {folder.name}-made; cat 0.tar .tar")
    return run_forked([*command[:-1], "data.path=."], folder, inside=shards)


def checkpoint_that_is_a_pickle(chain: Chain, folder: Path) -> Ended:
    place = _copy(chain, "depth", folder)
    command = chain.command("depth", place)
    for part in (0.6, 0.7, 0.8, 0.9):
        run_forked(command, folder, kill_after=part * chain.seconds["depth"])
        found = list(place.rglob("*.ckpt"))
        if found:
            torch.save({"state_dict": Touch(folder / "made"), "epoch": 0}, found[0])
            break
    return run_forked(command, folder)


def teacher_that_is_a_pickle(chain: Chain, folder: Path) -> Ended:
    teacher, command = _with_teacher(chain, folder)
    for file in (teacher / "transformer").glob("*.safetensors*"):
        file.unlink()
    torch.save({"proj_out.weight": Touch(folder / "made")}, teacher / "transformer" / "diffusion_pytorch_model.bin")
    return run_forked(command, folder)


def teacher_of_a_class_of_its_own(chain: Chain, folder: Path) -> Ended:
    teacher, command = _with_teacher(chain, folder)
    (teacher / "evil.py").write_text(f"open({str(folder / 'made')!r}, 'w')\nclass Evil: pass\n")
    index = json.loads((teacher / "model_index.json").read_text())
    (teacher / "model_index.json").write_text(json.dumps(index | {"_class_name": ["evil", "Evil"]}))
    return run_forked(command, folder)


def text_encoder_with_code(chain: Chain, folder: Path) -> Ended:
    teacher, command = _with_teacher(chain, folder, "cache")
    (teacher / "text_encoder" / "evil.py").write_text(f"open({str(folder / 'made')!r}, 'w')\nclass Evil: pass\n")
    path = teacher / "text_encoder" / "config.json"
    own = {"auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}, "model_type": "evil"}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    return run_forked(command, folder)


def header_of_many_gigabytes(chain: Chain, folder: Path) -> Ended:
    teacher, command = _with_teacher(chain, folder)
    (file,) = (teacher / "transformer").glob("*.safetensors")
    file.write_bytes(struct.pack("<Q", 1 << 60) + file.read_bytes()[8:])
    return run_forked(command, folder)


def plug_with_a_header_of_many_gigabytes(chain: Chain, folder: Path) -> Ended:
    place = _copy(chain, "export", folder)
    file = sorted(place.glob("runs/run/plugs/*.safetensors"))[0]
    file.write_bytes(struct.pack("<Q", 1 << 60) + file.read_bytes()[8:])
    return run_forked([*chain.command("export", place), "export.variant=ppcl-depth"], folder)


def plan_of_a_million_brackets(chain: Chain, folder: Path) -> Ended:
    place = _copy(chain, "depth", folder)
    (place / "runs" / "run" / "plan" / "plan.json").write_text("[" * 1_000_000)
    return run_forked(chain.command("depth", place), folder)


def teacher_of_a_million_brackets(chain: Chain, folder: Path) -> Ended:
    teacher, command = _with_teacher(chain, folder)
    whole = Path(shutil.copytree(teacher, folder / "whole"))
    for name in ("model_index.json", "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json"):
        (teacher / name).write_text("[" * 1_000_000)
        ended = run_forked(command, folder)
        if not ended.refused:
            return Ended(ended.code or 1, ended.out, f"{name}: {ended.err}")
        shutil.copy(whole / name, teacher / name)
    return ended


def prompts_of_a_million_brackets(chain: Chain, folder: Path) -> Ended:
    (folder / "prompts.jsonl").write_text("[" * 1_000_000)
    command = chain.command("generate", _copy(chain, "generate", folder))
    return run_forked([*command, f"generate.prompt_file={folder}/prompts.jsonl"], folder)


def settings_that_make_objects(chain: Chain, folder: Path) -> Ended:
    place = _copy(chain, "depth", folder)
    (place / "runs" / "run" / "config.yaml").write_text(
        f"name: !!python/object/apply:os.mknod ['{folder}/made']\nstages: [depth]\n"
    )
    return run_forked([f"run={place}/runs/run", "stages=[depth]"], folder)


def settings_that_name_a_target(chain: Chain, folder: Path) -> Ended:
    place = _copy(chain, "depth", folder)
    path = place / "runs" / "run" / "config.yaml"
    path.write_text(path.read_text() + f"_target_: os.mknod\n_args_: ['{folder}/made']\n")
    return run_forked([f"run={place}/runs/run", "stages=[depth]"], folder)


def lora_that_is_a_pickle(chain: Chain, folder: Path) -> Ended:
    place = _copy(chain, "generate", folder)
    torch.save({"transformer.proj_out.lora_A.weight": Touch(folder / "made")}, folder / "lora.bin")
    shutil.copy(folder / "lora.bin", folder / "lora.safetensors")
    return run_forked([*chain.command("generate", place), f"generate.loras=[{folder}/lora.safetensors]"], folder)


def picture_of_a_terapixel(chain: Chain, folder: Path) -> Ended:
    shards, command = _with_shards(chain, folder)
    members = {"a.png": _png(1_000_000, 1_000_000), "a.txt": b"a circle", "b.png": _png(1, 60_000), "b.txt": b"a cross"}
    shutil.copy(chain.folder / "shards" / "0.tar", shards / "0.tar")
    _shard(shards / "1.tar", members)
    return run_forked(command, folder)


def picture_that_is_a_program(chain: Chain, folder: Path) -> Ended:
    """A PostScript file, which Pillow gives to Ghostscript."""
    shards, command = _with_shards(chain, folder)
    shutil.copy(chain.folder / "shards" / "0.tar", shards / "0.tar")
    program = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n({folder}/made) (w) file closefile\n"
    _shard(shards / "1.tar", {"a.png": program.encode(), "a.txt": b"a circle"})
    return run_forked(command, folder)


def names_that_write_to_the_terminal(chain: Chain, folder: Path) -> Ended:
    shards, command = _with_shards(chain, folder)
    shutil.copy(chain.folder / "shards" / "0.tar", shards / "0.tar")
    _shard(
        shards / "1.tar", {"\x1b]0;owned\x07\x1b[31mred.png": b"no picture", "\x1b]0;owned\x07\x1b[31mred.txt": b"a"}
    )
    ended = run_forked(command, folder)
    if "\x1b]0;owned" in ended.out + ended.err:
        return Ended(1, ended.out, "Traceback: an escape sequence of a name reached the terminal")
    return ended


def member_outside_of_the_archive(chain: Chain, folder: Path) -> Ended:
    shards, command = _with_shards(chain, folder)
    shutil.copy(chain.folder / "shards" / "0.tar", shards / "0.tar")
    _shard(shards / "1.tar", {"../../made.png": _png(8, 8), "../../made.txt": b"a circle"})
    return run_forked(command, folder)


def unpickled_probes(chain: Chain, folder: Path) -> Ended:
    place = _copy(chain, "detect", folder)
    for file in place.rglob("probes/*/*.safetensors"):
        file.write_bytes(pickle.dumps(Touch(folder / "made")))
    return run_forked(chain.command("detect", place), folder)


TRIALS: list[Callable[[Chain, Path], Ended]] = [
    shard_named_as_a_command,
    checkpoint_that_is_a_pickle,
    teacher_that_is_a_pickle,
    teacher_of_a_class_of_its_own,
    text_encoder_with_code,
    header_of_many_gigabytes,
    plug_with_a_header_of_many_gigabytes,
    plan_of_a_million_brackets,
    teacher_of_a_million_brackets,
    prompts_of_a_million_brackets,
    settings_that_make_objects,
    settings_that_name_a_target,
    lora_that_is_a_pickle,
    picture_of_a_terapixel,
    picture_that_is_a_program,
    names_that_write_to_the_terminal,
    member_outside_of_the_archive,
    unpickled_probes,
]


def run(
    chain: Chain, folder: Path, trials: list[Callable[[Chain, Path], Ended]] = TRIALS
) -> tuple[Counter[str], list[str]]:
    """Return how many trials ended in which way, and what went wrong."""
    figures, faults = Counter[str](), list[str]()
    figures["code executed"] = figures["tracebacks"] = 0
    for trial in trials:
        place = folder / trial.__name__
        place.mkdir(parents=True)
        ended = trial(chain, place)
        figures["trials"] += 1
        made = [*folder.rglob("*made"), *folder.rglob("made*")]
        wrong = []
        if made:
            figures["code executed"] += 1
            wrong.append(f"{made[0]} was made")
            for path in made:
                path.unlink(missing_ok=True)
        if ended.code and not ended.refused:
            figures["tracebacks"] += 1
            wrong.append(f"it ended with {ended.code}: {ended.err.strip()[-600:]}")
        figures["left out" if ended.code == 0 else "sentences"] += not wrong
        faults += [f"{trial.__name__}: {why}" for why in wrong]
    return figures, faults
