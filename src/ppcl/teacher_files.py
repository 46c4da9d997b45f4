"""The files of a teacher: where they are, whether they fit together, and its identity for fingerprints."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ppcl.artifacts.contents import digests, joined
from ppcl.artifacts.files import parse_json, read_json, write_json
from ppcl.artifacts.headers import fingerprint
from ppcl.artifacts.model_files import (
    component_files,
    components_of,
    pickled_tensors,
    stored_tensors,
    variants_of,
    weight_files,
)
from ppcl.components import DEFAULT, check_component, denoisers_of
from ppcl.config import Config, ModelConfig
from ppcl.disk import check_space
from ppcl.errors import UsageError, root
from ppcl.families.base import Family
from ppcl.made_transformer import DONE, from_single_file, merge_lora, save
from ppcl.model_fit import check_fit, without_weights
from ppcl.paths import is_single_file
from ppcl.validation.model import check_not_quantised, model_folder

ENCODERS = ("vae", "text_encoder*", "tokenizer*")  # patterns of the components that encode pictures and prompts


class TeacherFiles:
    """The files of the configured teacher. A model on the Hub is downloaded when its files are first asked for.

    `results`: folders with what earlier commands have made, in which results of earlier versions may lie.
    `console`: shows how far the reading of large files is.
    """

    def __init__(self, config: Config, family: Family, results: Sequence[Path], console: Console) -> None:
        self.config, self.family, self.results, self.console = config, family, results, console

    @property
    def component(self) -> str:
        """The name of the pipeline's component that is pruned."""
        return self.config.model.component

    @property
    def in_place(self) -> bool:
        """Whether the transformer's files lie in a local folder as diffusers saves them: not on the Hub, nor made."""
        model = self.config.model
        return model_folder(model) is not None and not is_single_file(model.path) and model.lora is None

    def folder(self, needless: Iterable[str] = ()) -> Path:
        """Return the pipeline's folder. Of a Hub id it is the downloaded snapshot, without the `needless` components.

        Raises `UsageError` if the Hub cannot be reached, or does not have the model.
        """
        model, local = self.config.model, model_folder(self.config.model)
        if local is not None:
            return local
        from diffusers import DiffusionPipeline

        assert model.pipeline is not None, "checked in validation"
        with loading(model):
            found = DiffusionPipeline.download(
                model.pipeline, revision=model.revision, variant=model.variant, **dict.fromkeys(needless)
            )
        return Path(found)

    @cached_property
    def index(self) -> dict[str, Any]:
        """The content of the pipeline's `model_index.json`; `UsageError` if it lacks `model.component`."""
        from diffusers import DiffusionPipeline

        model = self.config.model
        with loading(model):
            found: dict[str, Any] = DiffusionPipeline.load_config(
                model_folder(model) or model.pipeline, revision=model.revision
            )
        check_component(model, found)
        return found

    @cached_property
    def _stored(self) -> Path:
        """The transformer's folder in the pipeline. Of a Hub id only that component is downloaded."""
        model = self.config.model
        if (local := model_folder(model)) is not None:
            return local / self.component
        if is_single_file(model.path):
            from huggingface_hub import hf_hub_download

            with loading(model):
                config = hf_hub_download(str(model.base), f"{self.component}/config.json", revision=model.revision)
            return Path(config).parent
        return self.folder(name for name in self.index if name != self.component) / self.component

    @cached_property
    def transformer(self) -> Path:
        """The folder of the transformer as diffusers saves it.

        The transformer of a single file, or with a LoRA merged in, is made first and kept in the cache. Raises
        `UsageError` if that cannot be made, or if the disk has too little space.
        """
        model = self.config.model
        if not is_single_file(model.path) and model.lora is None:
            return self._stored
        key = fingerprint({"identity": self.identity, "of": "transformer", "version": 1})
        folder = self._memory / f"made-{key}"
        if not (folder / DONE).is_file():
            self._make(folder)
        return folder / "transformer"

    def _make(self, folder: Path) -> None:
        """Make the transformer of a single file, or with a LoRA merged in, and save it in `folder`."""
        model, dtype = self.config.model, getattr(torch, self.config.model.dtype)
        size = sum(file.stat().st_size for file in self._weights())
        check_space(folder, size, "the teacher's weights", "name a larger disk as paths.cache_dir=")
        arch = read_json(self._stored / "config.json", "The transformer's config")
        check_not_quantised(model, arch)
        with loading(model):
            if is_single_file(model.path):
                facts, path = self.family.facts, Path(str(model.path))
                layout = facts.original if path.suffix == ".pt" else facts.single_file
                assert layout is not None, "checked in validation"
                made = from_single_file(self.transformer_class, layout, path, self._stored, dtype)
            else:
                self._check_fit(self._stored)
                made = self.transformer_class.from_pretrained(self._stored, variant=self._variant(), dtype=dtype)
        if model.lora is not None:
            import diffusers

            with loading(model, "model.lora with "):
                components = list(components_of(self.index))
                kind = getattr(diffusers, self.index["_class_name"])
                merge_lora(kind, components, made, self.component, Path(model.lora), self.family.facts)
        save(made, folder)

    def _variant(self) -> str | None:
        """The variant to load the transformer with; None if its folder has no files of it."""
        variant = self.config.model.variant
        return variant if variant is not None and variant in variants_of(self._stored) else None

    def _weights(self) -> list[Path]:
        """Return the files with the weights that the teacher is given by, without those of a LoRA."""
        model = self.config.model
        return [Path(str(model.path))] if is_single_file(model.path) else weight_files(self._stored, model.variant)

    @property
    def _memory(self) -> Path:
        return Path(self.config.paths.cache_dir) / "teachers"

    # Identities.

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The teacher's part of an artifact's fingerprint: config, dtype, and digest of the weights.

        Raises `UsageError` for files that cannot be read, and for weights that are not finite.
        """
        model = self.config.model
        identity: dict[str, Any] = {"family": model.family, "arch": model.arch, "dtype": model.dtype}
        if self.component != DEFAULT:
            identity["component"] = self.component
        if model.path is None:
            return identity | {"path": None, "revision": model.revision}
        if model.lora is not None:
            identity["lora"] = digests([Path(model.lora)], self._memory, self.console)[0]
        if others := self._others():
            identity["denoisers"] = others
        files = self._weights()
        digest = joined(digests(files, self._memory, self.console))
        former: dict[str, Any] = {"path": model.path, "revision": model.revision}
        if model_folder(model) is not None:
            former = {"weights": _former_digest(self._stored.glob("*.safetensors"))}
        known = self.component == DEFAULT and files[0].parent == self._stored
        if known and self._known_as(former, digest, files):
            return identity | former
        return identity | {"arch": arch_in(self._stored), "weights": digest}

    @cached_property
    def encoder_identity(self) -> dict[str, Any]:
        """The part of a cache's fingerprint for the VAE and text encoders: their digest, if the folder has any."""
        model = self.config.model
        identity: dict[str, Any] = {"family": model.family}
        if model.path is None:
            return identity | {"path": None, "revision": model.revision}
        folder = self.folder([self.component])
        parts = [part for kind in ENCODERS for part in sorted(folder.glob(kind)) if part.is_dir()]
        files = [file for part in parts for file in component_files(part, model.variant)]
        if not files:
            return identity
        each = digests(files, self._memory, self.console)
        names = (file.relative_to(folder).as_posix() for file in files)
        digest = joined(f"{name} {value}" for name, value in zip(names, each, strict=True))
        former: dict[str, Any] = {"path": model.pipeline, "revision": model.revision}
        if model_folder(model) is not None:
            former = {"encoders": _former_digest(file for part in parts for file in part.iterdir() if file.is_file())}
        if self._known_as(former, digest, files):
            return identity | former
        return identity | {"encoders": digest}

    def _others(self) -> dict[str, str]:
        """Return the digests of the pipeline's other denoisers, by name, since calls and pictures depend on them.

        Earlier versions knew no others. So beside `transformer` only those count that ppcl has pruned, in a folder.
        """
        local = model_folder(self.config.model)
        if self.component == DEFAULT and (local is None or self.family.name != "traced"):
            return {}
        found = {}
        for name in denoisers_of(self.index):
            folder = self.part(name)
            pruned = "ppcl" in read_json(folder / "config.json", "The transformer's config")
            if name != self.component and (pruned or self.component != DEFAULT):
                files = weight_files(folder, self.config.model.variant)
                found[name] = joined(digests(files, self._memory, self.console))
        return found

    def part(self, component: str) -> Path:
        """Return the folder of a component as it was given; of a model on the Hub it alone is downloaded."""
        return self.folder([name for name in components_of(self.index) if name != component]) / component

    def _known_as(self, former: dict[str, Any], digest: str, files: Iterable[Path]) -> bool:
        """Whether results name the files with this digest of their whole content by a `former` identity.

        Earlier versions identified weights by the first and last MiB of each file, or by a Hub id alone. Such a name
        stays that of the first files that have it, if there are results of that name which are newer than the files.
        It never becomes the name of others. Teachers that are shipped with ppcl keep theirs.
        """
        if digest in _SHIPPED:
            return _SHIPPED[digest] in former.values()
        if former.get("weights") == _NOTHING:
            return False
        record = self._memory / f"former-{hashlib.sha256(json.dumps(former).encode()).hexdigest()[:16]}.json"
        with suppress(UsageError):  # there is none, or it is damaged and made again
            return bool(read_json(record, "A teacher's record").get("digest") == digest)
        changed = max(file.stat().st_mtime for file in files)
        if not any(_names(content, former) for content in self._records(changed)):
            return False
        with suppress(OSError):  # a cache that cannot be written to
            write_json(record, {"digest": digest, "former": former})
        return True

    def _records(self, since: float) -> Iterator[Any]:
        """Yield the content of every JSON record among the results that was written at the time `since` or later."""
        cache = Path(self.config.paths.cache_dir)
        kinds = ("*/*.json", "images/*/*/manifest.json")
        paths = [path for folder in self.results for kind in kinds for path in folder.glob(kind)]
        paths += [path for kind in _SHARED for path in cache.glob(kind)]
        for path in paths:
            try:
                if path.stat().st_mtime >= since:
                    yield parse_json(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):  # whoever reads it as a result says so
                continue

    # Whether they fit together.

    def check(self) -> None:
        """Raise `UsageError` if the transformer's files are missing, damaged, quantised, or not of its config.

        Reads no weights, only the names and shapes of tensors.
        """
        if self.config.model.path is None:
            return
        if model_folder(self.config.model) is None:
            self._check_settings()
        self._check_fit(self.transformer)

    def _check_settings(self) -> None:
        """Raise `UsageError` if a model on the Hub has another number of blocks than the settings say."""
        model, arch = self.config.model, arch_in(self._stored)
        for key in self.family.stacks.values():
            if model.arch.get(key) != arch.get(key):
                raise UsageError(
                    f"model.path={model.path} has {key}={arch.get(key)}, and the settings of model={model.name} say "
                    f"{model.arch.get(key)}: add model.arch.{key}={arch.get(key)}."
                )

    def _check_fit(self, folder: Path) -> None:
        variant = self.config.model.variant
        files = weight_files(folder, variant)
        arch = read_json(folder / "config.json", "The transformer's config")
        check_not_quantised(self.config.model, arch)
        if files[0].suffix == ".bin":
            shapes = {name: tuple(value.shape) for name, value in pickled_tensors(files[0]).items()}
        else:
            shapes = {name: stored.shape for name, stored in stored_tensors(folder, variant).items()}
        check_fit(without_weights(self.transformer_class, folder), shapes, folder, self.family.stacks)

    @property
    def transformer_class(self) -> Any:
        """The class of the transformer: the stock one, or that of models pruned in width.

        Without weights, where only `model.arch` is given, it is the stock one.
        """
        if self.config.model.path is None:
            return self.family.transformer_class
        name = read_json(self._stored / "config.json", "The transformer's config").get("_class_name")
        if name in self.family.facts.pruned_models:
            import ppcl

            return getattr(ppcl, name)
        return self.family.transformer_class


# Records in the cache that name a teacher.
_SHARED = ("probes/*/probes.json", "boundaries/*/boundaries.json", "images/*/manifest.json", "data/*/cache.json")
# Digests of weights and encoders of the teachers that are shipped, and what earlier versions called them.
_SHIPPED = {
    "1386586588b06fe31200ebed48e9c181": "62da4881a42eed1d",
    "2da44be5f6e10ed474e32e2f8817724f": "b48f3784244050d1",
    "562a8dd2142cadc8ed706153f219a5ee": "b1af0affb143662a",
    "60c19205b4156ba63d17bd87dfc7cbba": "5c4087f37e83297d",
    "852782df64e998a33eede312bbc38ac9": "8207be164f78b0cd",
    "a2763350ffb0173207ea3fdd66441433": "e3636ca6bdd497dd",
    "acde805e5f2c7a6e84c2b3d8fd566599": "0ab2324f936cd114",
    "b8717a9ad52168d208adafb3b7751548": "0fb3e0318851681b",
    "bbd5cf5efa1c68342d57fb0bf9267126": "3882af16e258c16a",
    "fa4b014504e5d00b1eaabaa341612a67": "c51bacc2cff3e462",
}
_NOTHING = hashlib.sha256().hexdigest()[:16]  # the former digest of a folder without safetensors files


def arch_in(folder: Path) -> dict[str, Any]:
    """Return the entries of a model's config that are its own, without those that diffusers adds."""
    config = read_json(folder / "config.json", "The transformer's config")
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _names(content: Any, former: Mapping[str, Any]) -> bool:
    """Whether a record names a model by all entries of `former`."""
    if not isinstance(content, dict):
        return False
    if former.items() <= content.items():
        return True
    return any(_names(value, former) for value in content.values())


def _former_digest(files: Iterable[Path]) -> str:
    """Return the digest of earlier versions: of each file's name, size, and first and last MiB."""
    digest = hashlib.sha256()
    for file in sorted(files):
        with file.open("rb") as handle:
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode())
            digest.update(handle.read(1 << 20))
            handle.seek(max(0, size - (1 << 20)))
            digest.update(handle.read())
    return digest.hexdigest()[:16]


@contextmanager
def loading(model: ModelConfig, what: str = "") -> Iterator[None]:
    """Turn whatever a library raises while it loads the pipeline of `model` into a `UsageError` with the reason.

    `what`: the part of the pipeline that is loaded, for the sentence, such as `the tokenizer of `.
    """
    try:
        yield
    except (UsageError, MemoryError, AssertionError):
        raise
    except Exception as error:  # tokenizers raise `Exception` itself
        if "out of memory" in str(error):
            raise
        remedy = "give a pipeline folder, or a hub id in reach"
        if re.search(r"gated|\b40[13]\b", str(error)):
            remedy = f"accept the licence at https://huggingface.co/{model.path}, and log in by hf auth login"
        elif what or not isinstance(error, OSError):
            remedy = "one of its files is damaged or missing, so fetch it again"
        raise UsageError(f"{what}model.path={model.path} could not be loaded ({root(error)}); {remedy}.") from None
