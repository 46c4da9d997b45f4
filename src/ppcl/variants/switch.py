"""Switches a run's pipeline from one variant to another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ppcl.context import Run
from ppcl.surgery.noise_levels import ByNoiseLevel
from ppcl.surgery.plugboard import Plugboard, load_student
from ppcl.variants.plugs import Plugs
from ppcl.variants.variants import Variant, finetuned_folder, quantized_folder


class Switch:
    """Callable that turns the run's pipeline into a variant. Call `restore` at the end to get the teacher back."""

    def __init__(self, run: Run, plugs: Plugs) -> None:
        self.run = run
        self.teacher = transformer = run.teacher.pipeline.transformer
        students = {name: load_student(run.family, transformer, plug) for name, plug in plugs.students.items()}
        intervals = run.intervals if run.has_intervals else {}  # a teacher can be drawn without any
        self.board = Plugboard(run.family, transformer, intervals, students, plugs.projectors, run.layout)
        self._finetuned: Any = None
        self._quantized: Any = None
        self.teacher_size = sum(parameter.numel() for parameter in transformer.parameters())

    def __call__(self, variant: Variant, teacher_above: float | None = None) -> nn.Module:
        """Put `variant` into the pipeline as its transformer, and return that.

        `teacher_above`: the noise level above which the teacher runs in the variant's place. None: it never does.
        """
        self.board.arrange(students=variant.students, removed=variant.removed, projectors=variant.projectors)
        own = self.quantized if variant.quantized else self.finetuned if variant.finetuned else None
        model = self.teacher if own is None else own
        if teacher_above is not None and variant.name != "teacher":
            pruned = self.board.standalone() if own is None else own
            self.board()  # the teacher's own transformer has the teacher's blocks again
            model = ByNoiseLevel(self.run.family, self.teacher, pruned, teacher_above)
        self.run.teacher.pipeline.transformer = model
        return model

    @property
    def finetuned(self) -> Any:
        """The fine-tuned transformer, loaded on first use."""
        if self._finetuned is None:
            self._finetuned = self._load(finetuned_folder(self.run))
        return self._finetuned

    @property
    def quantized(self) -> Any:
        """The quantised transformer, loaded on first use."""
        if self._quantized is None:
            self._quantized = self._load(quantized_folder(self.run))
        return self._quantized

    def _load(self, folder: Path) -> Any:
        """Return the transformer in `folder`. Its class depends on the plugs that are currently in the board."""
        model_class: Any = type(self.board.standalone())
        model = model_class.from_pretrained(folder / "transformer", dtype=self.run.teacher.dtype)
        return model.to(self.run.device).eval().requires_grad_(False)

    def restore(self) -> None:
        """Turn the pipeline back into the teacher's."""
        self.board()
        self.run.teacher.pipeline.transformer = self.teacher
