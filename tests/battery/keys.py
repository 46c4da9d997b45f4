"""Tries every numeric key of the configuration at -1, 0, a huge value and NaN.

Each trial composes and checks a command as `ppcl` does, and loads no model. It must end in acceptance, or in one
sentence that names the key. `python -m tests.battery.keys` lists what is accepted, to be looked through: every accepted
value has to make sense.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser

from ppcl.command import compose
from ppcl.config import Config
from ppcl.errors import UsageError
from ppcl.options import declared
from ppcl.sentences import in_words
from ppcl.validation import parse
from tests.battery.chain import Chain

STAGES = "stages=[probe,detect,depth,width,plan,finetune,export,generate,evaluate,report]"
DRAWN = "generate.variants=[teacher,removed]"
# The command that a key is tried in, where another one uses it. `{}` is the whole value.
COMMANDS = {
    "": [STAGES, "width=auto", "model=tiny_qwen_image", DRAWN],
    "budget": [STAGES, "width=auto", DRAWN],
    "pretrain": ["stages=[pretrain]"],
    "quantize": ["stages=[quantize]", "quantize=int4", "quantize.rounding=least_squares", "width=none"],
    "intervals": ["stages=[plan]", "model=flux_dev"],
    "width.transformer_blocks": ["stages=[plan]", "width.source=given", "intervals.names=[transformer_blocks.3-4]"],
    "width.single_transformer_blocks": ["stages=[plan]", "model=flux_dev", "width.source=given"],
    "method.num_remove": [STAGES, "method=cka_sensitivity", "method.num_remove=2", DRAWN],
    "method.params": [STAGES, "method=shortgpt", "width=auto", DRAWN],
    "method.extend": [STAGES, "method=ppcl_lp_b", "width=auto", DRAWN],
    "finetune.muon_lr": ["stages=[depth,finetune]", "recipe=paper", "finetune.optimizer=muon"],
    "distill.lr": ["stages=[depth]", "recipe=paper"],
    "width.lr": ["stages=[width]", "recipe=paper", "width=auto"],
    "finetune.lr": ["stages=[finetune]", "recipe=paper"],
    "model.arch": ["stages=[plan]", "model=qwen_image"],
}
# Keys of open groups, which the configuration does not declare, and numbers that are declared as anything.
FURTHER = (
    ("distill.groups", "{}"),
    ("distill.losses.direction", "{}"),
    ("+distill.losses.magnitude", "{}"),
    ("+model.sampling.scheduler.shift", "{}"),
    ("+benchmark.settings.images_per_prompt", "{}"),
    ("model.arch.num_layers", "{}"),
)
_FORMS = {"list[int]": "[{}]", "list[list[int]]": "[[{},{}]]", "dict[str, float]": "{{direction:{}}}"}
VALUES = ("-1", "0", "1000000000000", "1e30", "nan", "inf")


@dataclass(frozen=True)
class Trial:
    """An override, and what came of it: the sentence that refused it, the name of another error, or neither."""

    override: str
    sentence: str | None = None
    error: str | None = None

    @property
    def accepted(self) -> bool:
        return self.sentence is None and self.error is None

    @property
    def named(self) -> bool:
        """Whether the sentence is one line that names the key, or a group that it belongs to."""
        key = self.override.lstrip("+").partition("=")[0]
        return self.sentence is not None and "\n" not in self.sentence and key in self.sentence


def numeric_keys() -> Iterator[tuple[str, str]]:
    """Yield each numeric key as it is typed, and a form for its value."""
    for item in declared(Config(name="run", stages=["plan"])):
        if item.numeric:
            yield item.name, _form(item.name)
    yield from FURTHER


def _form(key: str) -> str:
    group: Any = Config(name="run", stages=["plan"])
    *parents, name = key.split(".")
    for parent in parents:
        group = getattr(group, parent)
    annotation = str(type(group).__dataclass_fields__[name].type).removesuffix(" | None")
    return _FORMS.get(annotation, "{}")


class Battery:
    """Tries overrides in the composed commands, each of which is composed once."""

    def __init__(self) -> None:
        self._composed: dict[str, Any] = {}

    def _command(self, key: str) -> Any:
        key = key.lstrip("+")
        parts = key.split(".")
        names = [".".join(parts[:length]) for length in range(len(parts), -1, -1)]
        name = next(name for name in names if name in COMMANDS)
        if name not in self._composed:
            self._composed[name], _ = compose(COMMANDS[name])
        return self._composed[name].copy()

    def __call__(self, override: str) -> Trial:
        """Return what comes of an override such as `distill.lr=-1`."""
        raw = self._command(override.partition("=")[0])
        try:
            with in_words():
                # As Hydra applies what is typed, without composing all groups again.
                ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides([override]), raw)
                parse(raw)
        except UsageError as error:
            return Trial(override, sentence=str(error))
        except Exception as error:
            return Trial(override, error=f"{type(error).__name__}: {error}")
        return Trial(override)


def overrides() -> list[str]:
    """Return all overrides that are tried."""
    return [f"{key}={form.format(value, value)}" for key, form in numeric_keys() for value in VALUES]


def run(_chain: Chain, _folder: Path) -> tuple[Counter[str], list[str]]:
    """Return how many trials ended in which way, and what went wrong."""
    battery = Battery()
    trials = [battery(override) for override in overrides()]
    kinds = Counter("accepted" if t.accepted else "tracebacks" if t.error else "sentences" for t in trials)
    figures = Counter({"keys": len([*numeric_keys()]), "trials": len(trials), "accepted": kinds["accepted"]})
    figures.update({"sentences": kinds["sentences"], "tracebacks": kinds["tracebacks"]})
    bad = [trial for trial in trials if not (trial.accepted or trial.named)]
    return figures, [f"{trial.override}: {trial.error or trial.sentence}" for trial in bad]


if __name__ == "__main__":
    battery = Battery()
    print(*(override for override in overrides() if battery(override).accepted), sep="\n")
