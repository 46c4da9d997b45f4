"""The files of a teacher: where they are, whether they fit together, and its identity for fingerprints."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

from ppcl.artifacts.contents import digests, joined
from ppcl.artifacts.files import read_json, write_json
from ppcl.artifacts.model_files import component_files, pickled_tensors, stored_tensors, weight_files
from ppcl.config import Config, ModelConfig
from ppcl.errors import UsageError, root
from ppcl.families.base import Family
from ppcl.model_fit import check_fit, without_weights
from ppcl.paths import ASSETS
from ppcl.validation.model import check_not_quantised, model_folder

ENCODERS = ("vae", "text_encoder*", "tokenizer*")  # patterns of the components that encode pictures and prompts


class TeacherFiles:
    """The files of the configured teacher. A model on the Hub is downloaded when its files are first asked for.

    `results`: folders with what earlier commands have made, in which results of earlier versions may lie.
    `console`: shows how far the reading of large files is.
    """

    def __init__(self, config: Config, family: Family, results: Sequence[Path], console: Console) -> None:
        self.config, self.family, self.results, self.console = config, family, results, console

    def folder(self, needless: Iterable[str] = ()) -> Path:
        """Return the pipeline's folder. Of a Hub id it is the downloaded snapshot, without the `needless` components.

        Raises `UsageError` if the Hub cannot be reached, or does not have the model.
        """
        model, local = self.config.model, model_folder(self.config.model)
        if local is not None:
            return local
        from diffusers import DiffusionPipeline

        assert model.path is not None, "checked in validation"
        with loading(model):
            found = DiffusionPipeline.download(
                model.path, revision=model.revision, variant=model.variant, **dict.fromkeys(needless)
            )
        return Path(found)

    @property
    def index(self) -> dict[str, Any]:
        """The content of the pipeline's `model_index.json`."""
        from diffusers import DiffusionPipeline

        model = self.config.model
        with loading(model):
            found: dict[str, Any] = DiffusionPipeline.load_config(
                model_folder(model) or model.path, revision=model.revision
            )
        return found

    @cached_property
    def _transformer(self) -> Path:
        """The folder of the transformer. Of a Hub id no other component is downloaded."""
        if (local := model_folder(self.config.model)) is not None:
            return local / "transformer"
        return self.folder(name for name in self.index if name != "transformer") / "transformer"

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
        identity = {"family": model.family, "arch": model.arch, "dtype": model.dtype}
        if model.path is None:
            return identity | {"path": None, "revision": model.revision}
        folder = self._transformer
        files = weight_files(folder, model.variant)
        digest = joined(digests(files, self._memory, self.console))
        former: dict[str, Any] = {"path": model.path, "revision": model.revision}
        if model_folder(model) is not None:
            former = {"weights": _former_digest(folder.glob("*.safetensors"))}
        if self._known_as(former, digest, files):
            return identity | former
        return identity | {"arch": arch_in(folder), "weights": digest}

    @cached_property
    def encoder_identity(self) -> dict[str, Any]:
        """The part of a cache's fingerprint for the VAE and text encoders: their digest, if the folder has any."""
        model = self.config.model
        identity: dict[str, Any] = {"family": model.family}
        if model.path is None:
            return identity | {"path": None, "revision": model.revision}
        folder = self.folder(["transformer"])
        parts = [part for kind in ENCODERS for part in sorted(folder.glob(kind)) if part.is_dir()]
        files = [file for part in parts for file in component_files(part, model.variant)]
        if not files:
            return identity
        each = digests(files, self._memory, self.console)
        names = (file.relative_to(folder).as_posix() for file in files)
        digest = joined(f"{name} {value}" for name, value in zip(names, each, strict=True))
        former: dict[str, Any] = {"path": model.path, "revision": model.revision}
        if model_folder(model) is not None:
            former = {"encoders": _former_digest(file for part in parts for file in part.iterdir() if file.is_file())}
        if self._known_as(former, digest, files):
            return identity | former
        return identity | {"encoders": digest}

    def _known_as(self, former: dict[str, Any], digest: str, files: Iterable[Path]) -> bool:
        """Whether results name the files with this digest of their whole content by a `former` identity.

        Earlier versions identified weights by the first and last MiB of each file, or by a Hub id alone. Such a name
        stays that of the first files that have it, if there are results of that name which are newer than the files.
        It never becomes the name of others. Teachers that are shipped with ppcl keep theirs.
        """
        shipped = json.loads((ASSETS / "former_digests.json").read_text(encoding="utf-8"))
        if digest in shipped:
            return bool(shipped[digest] in former.values())
        if former.get("weights") == _NOTHING:
            return False
        record = self._memory / f"former-{hashlib.sha256(json.dumps(former).encode()).hexdigest()[:16]}.json"
        if record.is_file():
            return bool(read_json(record, "A teacher's record").get("digest") == digest)
        changed = max(file.stat().st_mtime for file in files)
        if not any(_names(content, former) for content in self._records(changed)):
            return False
        write_json(record, {"digest": digest, "former": former})
        return True

    def _records(self, since: float) -> Iterator[Any]:
        """Yield the content of every JSON record among the results that was written at the time `since` or later."""
        cache = Path(self.config.paths.cache_dir)
        paths = [path for folder in self.results for path in folder.glob("*/*.json")]
        paths += [path for kind in _SHARED for path in cache.glob(kind)]
        for path in paths:
            try:
                if path.stat().st_mtime >= since:
                    yield json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):  # whoever reads it as a result says so
                continue

    # Whether they fit together.

    def check(self) -> None:
        """Raise `UsageError` if the transformer's files are missing, damaged, quantised, or not of its config.

        Reads no weights, only the names and shapes of tensors.
        """
        if self.config.model.path is None:
            return
        variant, folder = self.config.model.variant, self._transformer
        files = weight_files(folder, variant)
        arch = read_json(folder / "config.json", "The transformer's config")
        check_not_quantised(self.config.model, arch)
        if files[0].suffix == ".bin":
            shapes = {name: tuple(value.shape) for name, value in pickled_tensors(files[0]).items()}
        else:
            shapes = {name: stored.shape for name, stored in stored_tensors(folder, variant).items()}
        check_fit(without_weights(self._class(arch), folder), shapes, folder, self.family.stacks)

    def _class(self, arch: Mapping[str, Any]) -> Any:
        """Return the class of the transformer: the stock one, or that of models pruned in width."""
        if arch.get("_class_name") in self.family.facts.pruned_models:
            import ppcl

            return getattr(ppcl, arch["_class_name"])
        return self.family.transformer_class


# Records in the cache that name a teacher.
_SHARED = ("probes/*/probes.json", "boundaries/*/boundaries.json", "images/*/ppcl.json", "data/*/cache.json")
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
