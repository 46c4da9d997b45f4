"""Switches a run's pipeline from one variant to another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils import swap_tensors
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ppcl.artifacts.files import read_json
from ppcl.artifacts.folders import check_model
from ppcl.artifacts.plugs import Plug
from ppcl.context import Run
from ppcl.families.base import Family
from ppcl.surgery.noise_levels import ByNoiseLevel
from ppcl.surgery.plugboard import Plugboard, load_student
from ppcl.surgery.share import skeleton
from ppcl.variants.plugs import Plugs
from ppcl.variants.variants import Variant, finetuned_folder, quantized_folder


class Students(Mapping[str, nn.Module]):
    """The student blocks of `plugs`, by name. Each is built when it is first asked for."""

    def __init__(self, family: Family, transformer: nn.Module, plugs: Mapping[str, Plug]) -> None:
        self.family, self.transformer, self.plugs = family, transformer, plugs
        self.built: dict[str, nn.Module] = {}

    def __getitem__(self, name: str) -> nn.Module:
        if name not in self.built:
            self.built[name] = load_student(self.family, self.transformer, self.plugs[name])
        return self.built[name]

    def __contains__(self, name: object) -> bool:
        return name in self.plugs

    def __iter__(self) -> Iterator[str]:
        return iter(self.plugs)

    def __len__(self) -> int:
        return len(self.plugs)


class Resident:
    """Keeps the parameters of one model on a device, and all others in host memory.

    Parameters that go back to host memory get their former tensors there, which may be mapped from files.

    `to_device`: copies a tensor to the device.
    """

    def __init__(self, to_device: Callable[[Tensor], Tensor]) -> None:
        self.to_device = to_device
        self._in_host: dict[nn.Parameter, Tensor] = {}

    def __call__(self, model: nn.Module, others: Iterable[nn.Module] = ()) -> None:
        """Move the parameters of `model` to the device, and all those of `others` that it does not share off it."""
        used = {*model.parameters()}
        for parameter in chain.from_iterable(other.parameters() for other in others):
            if parameter not in used:
                _fill(parameter, self._in_host.pop(parameter) if parameter in self._in_host else parameter.data.cpu())
        for parameter in used:
            before = parameter.data
            here = self.to_device(before)
            if here is not before:
                self._in_host[parameter] = before
                _fill(parameter, here)
        for buffers in (module._buffers for module in model.modules()):
            buffers.update({name: None if value is None else self.to_device(value) for name, value in buffers.items()})


def _fill(parameter: nn.Parameter, value: Tensor) -> None:
    """Make `parameter` hold the tensor `value`, which may be on another device."""
    if is_traceable_wrapper_subclass(value):  # a quantised tensor consists of others, which assigning leaves behind
        swap_tensors(parameter, nn.Parameter(value, requires_grad=parameter.requires_grad))
    else:
        parameter.data = value


class Switch:
    """Callable that turns the run's pipeline into a variant. Call `restore` at the end to get the teacher back.

    `alone`: whether only the variant's own weights are on the device. Switching then copies weights, which takes time.
    `board` is the plugboard of the present variant. Variants with a file of their own (fine-tuned, quantised) have one
    without weights.
    """

    def __init__(self, run: Run, plugs: Plugs, *, alone: bool = False) -> None:
        self.run = run
        self.teacher = transformer = run.teacher.transformer
        self.plugs = plugs
        self.students = Students(run.family, transformer, plugs.students)
        self.board = self._teacher_board = self._board(transformer, self.students)
        self.teacher_size = sum(parameter.numel() for parameter in transformer.parameters())
        self._blocks = list(run.family.blocks(transformer).values())  # all of them, whatever is plugged in
        self._own: dict[Path, Any] = {}
        moves = alone and run.device.type != "cpu" and run.config.generate.offload == "none"
        self._resident = Resident(lambda tensor: tensor.to(run.device)) if moves else None

    def _board(self, transformer: nn.Module, students: Mapping[str, nn.Module]) -> Plugboard:
        run = self.run
        intervals = run.intervals if run.has_intervals else {}  # a teacher can be drawn without any
        return Plugboard(run.family, transformer, intervals, students, self.plugs.projectors, run.layout)

    def __call__(self, variant: Variant, teacher_above: float | None = None) -> nn.Module:
        """Put `variant` into the pipeline as its transformer, and return that.

        `teacher_above`: the noise level above which the teacher runs in the variant's place. None: it never does.
        """
        self._teacher_board()
        own = self._folder(variant)
        self.board = self._teacher_board if own is None else self._skeleton_board
        self.board.arrange(students=variant.students, removed=variant.removed, projectors=variant.projectors)
        model = self.teacher if own is None else self._load(own)
        if teacher_above is not None and variant.name != "teacher":
            pruned = self.board.standalone() if own is None else model
            self._teacher_board()  # the teacher's own transformer has the teacher's blocks again
            model = ByNoiseLevel(self.run.family, self.teacher, pruned, teacher_above)
        if self._resident is not None:
            self._resident(model, [self.teacher, *self._blocks, *self.students.built.values(), *self._own.values()])
        self.run.teacher.transformer = model
        return model

    def standalone(self, variant: Variant) -> Any:
        """Put `variant` into the pipeline, and return it as a model of its own, to save. It may share weights."""
        model = self(variant)
        return self.board.standalone() if self._folder(variant) is None else model

    def _folder(self, variant: Variant) -> Path | None:
        """Return the folder with the variant's own weights; None if it consists of the teacher and plugs."""
        if variant.quantized:
            return quantized_folder(self.run)
        return finetuned_folder(self.run) if variant.finetuned else None

    @cached_property
    def _skeleton_board(self) -> Plugboard:
        """The board of a teacher and students without weights."""
        empty = skeleton(self.teacher)
        blocks = self.run.family.blocks(empty)
        students = {name: blocks[plug.stack, plug.interval[0]] for name, plug in self.plugs.students.items()}
        return self._board(empty, students)

    def _load(self, folder: Path) -> Any:
        """Return the transformer in `folder`, loaded on first use. Its class depends on the present arrangement."""
        if folder not in self._own:
            stage = "quantize" if folder == quantized_folder(self.run) else "finetune"
            check_model(folder, read_json(folder / "ppcl.json", "The record", stage), stage)
            model_class: Any = type(self.board.standalone())
            model = model_class.from_pretrained(folder / self.run.teacher.component, dtype=self.run.teacher.dtype)
            if self._resident is None:
                model = model.to(next(self.teacher.parameters()).device)
            self._own[folder] = model.eval().requires_grad_(False)
        return self._own[folder]

    def restore(self) -> None:
        """Turn the pipeline back into the teacher's."""
        self.board = self._teacher_board()
        self.run.teacher.transformer = self.teacher
