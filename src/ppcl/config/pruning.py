"""The keys of what is pruned: `probe`, `method`, `intervals`, `width` and `budget`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ppcl.config.bounds import MOST_RATE, MOST_WEIGHT
from ppcl.options import option


@dataclass
class ProbeConfig:
    """The linear probes of stage 1.1 (Eq. 1-2): one residual linear map per block and stream, by ridge regression.

    `num_batches`: batches that the probes are fitted to. Of stored data they have the samples that training sees.
    `num_heldout_batches`: further batches, of held-out samples, on which their residuals are measured.
    `ridge`: ridge penalty of the normal equations.
    `bias`: whether a probe has a bias.
    `init`: what training starts from: the `closed_form` solution, or `zero`, for which `train_steps` must be above 0.
    `train_steps`: steps of gradient descent after that; 0 for none. `lr`: their learning rate.
    """

    num_batches: int = option(16, least=1)
    num_heldout_batches: int = option(4, least=1)
    batch_size: int = option(32, least=1)
    ridge: float = option(1e-6, least=0, most=1000)
    bias: bool = True
    init: str = option("closed_form", choices=("closed_form", "zero"))
    train_steps: int = option(0, least=0)
    lr: float = option(1e-4, above=0, most=MOST_RATE)


@dataclass
class MethodConfig:
    """How `stages=[detect]` finds the intervals (stage 1.2, Eq. 3-5).

    `name`: the method's name in plans and reports.
    `rule`: the name of a module of `ppcl.methods`. `ppcl --help` lists the choices of `method`, one for each, and the
        README says what each ranks by.
    `stream`: the stream whose CKA decides: `image`, `text`, or the `mean` of both.
    `debiased`: whether to use the debiased estimate of CKA.
    `start`, `end`: the first and the last block that an interval may contain. `end` None: the last block of the stack.
    `min_length`: the fewest blocks in an interval.
    `min_cka`: acceptance threshold. An interval [u, v] with cka(u, v) below it is left out.
    `threshold`: for `lp_a`, the CKA below which an interval ends.
    `extend`: for `lp_b` only, the numbers of the intervals (from 0) whose end moves from v to v + 1. None: all of them.
    `num_remove`, `params`: for methods that remove blocks until a size is reached, that size. One of the two is given.
        `num_remove`: the number of blocks to remove. `params`: up to 1 the share of the teacher's parameters that may
        be left, above 1 their number.
    `num_samples`, `num_timesteps`: calibration samples, and the number of noise levels at which each is used.
        They are taken in parts that fit into memory. `batch_size`: the samples in a batch of them.
    `settings`: keys that only the rule itself declares.
    """

    name: str = "ppcl"
    rule: str = "lp"
    stream: str = option("mean", choices=("image", "text", "mean"))
    debiased: bool = False
    start: int = option(0, least=0)
    end: int | None = option(None, least=1)
    min_length: int = option(2, least=2)
    min_cka: float = option(0.0, least=-1, most=1)
    threshold: float = option(0.98, above=0, most=1)
    extend: list[int] | None = option(None, least=0)
    num_remove: int | None = option(None, least=1)
    params: float | None = option(None, above=0, most=1e15, before=None)
    num_samples: int = option(16, least=1)
    num_timesteps: int = option(8, least=1)
    batch_size: int = option(16, least=1)
    settings: dict[str, Any] = option(factory=dict, before={})


@dataclass
class IntervalsConfig:
    """The intervals [u, v] of adjacent blocks. Block u becomes a student that replaces blocks u to v.

    `source`: `detect` takes the intervals given here, or without any those that `stages=[detect]` finds in this run.
        `plan` reads them from `path`, the JSON file of a pruning plan.
    `family`: the model family that the intervals belong to. Any other is refused. None: no check.
    `names`: the intervals of all block stacks, each written `STACK.U-V`, such as `transformer_blocks.3-5` or
        `encoder.blocks.5-7`. Files, logs and `distill.intervals` use the same names.
    `transformer_blocks`, `single_transformer_blocks`: the intervals of that stack as pairs [u, v], in place of `names`.
    `remark`, `as_printed`: a note, and the intervals as the paper prints them. They are only copied into the plan.
    """

    source: str = option("detect", choices=("detect", "plan"))
    path: str | None = None
    family: str | None = None
    names: list[str] | None = None
    transformer_blocks: list[list[int]] | None = None
    single_transformer_blocks: list[list[int]] | None = None
    remark: str | None = None
    as_printed: Any = None


@dataclass
class WidthSet:
    """The blocks of one stack that are pruned in width, by their index in the teacher.

    `text`: blocks whose text stream is replaced by linear projectors.
    `ffn`: blocks whose FFNs are replaced by linear projectors.
    """

    text: list[int] = field(default_factory=list)
    ffn: list[int] = field(default_factory=list)


@dataclass
class WidthConfig:
    """Width pruning (stage 2, Eq. 8-12): which text streams and FFNs become linear projectors, and their training.

    `source`: where the width sets, that is the blocks to prune, come from. `none`: there are none. `given`: the keys
        below. `plan`: the file `path`, the JSON of a pruning plan. `auto`: `stages=[width]` selects them.
    `family`: the model family that given sets belong to. Any other is refused. None: no check.
    `names`: the given sets of all block stacks, each entry written `STACK.N.text` or `STACK.N.ffn`.
    `transformer_blocks`, `single_transformer_blocks`: the given sets of that stack, in place of `names`.
    `text_threshold`: `auto` selects text streams whose output has at least this CKA with the output of their reference,
        which is the nearest earlier block with an intact text stream. Deeper blocks are selected first.
    `num_text`: the most text streams per stack that `auto` selects. None: no limit.
    `num_ffn`: the most FFNs that `auto` selects, over all stacks. It takes those that a linear map fits best.
    `text_output`: `last` gives each run of adjacent text-pruned blocks one output projector, which reads the text of
        the run's reference (the authors' code). `each` gives every block its own, which reads the text of the block
        before it (the paper).
    `keep_text_query`: whether a text-pruned block keeps its text query projection, though no output depends on it.
    `ridge`: ridge penalty of the least squares that initialise the projectors.
    `num_batches`: batches of calibration data for these least squares.
    `steps`: training steps after that; 0 leaves the projectors as least squares made them.
    `lr`: learning rate. None if `relative_update` sets the rates.
    `relative_update`: as in `distill`. None: that of `distill`. All other training settings are those of `distill`.
    `linear_weight`: weight of the alignment loss of Eq. 12, which is added to the loss of Eq. 11.
    """

    source: str = option("none", choices=("none", "given", "plan", "auto"))
    path: str | None = None
    family: str | None = None
    names: list[str] | None = None
    transformer_blocks: WidthSet = field(default_factory=WidthSet)
    single_transformer_blocks: WidthSet = field(default_factory=WidthSet)
    text_threshold: float = option(0.999, above=0, most=1)
    num_text: int | None = option(None, least=0)
    num_ffn: int = option(3, least=0)
    text_output: str = option("last", choices=("last", "each"))
    keep_text_query: bool = False
    ridge: float = option(1e-6, least=0, most=1000)
    num_batches: int = option(16, least=1)
    steps: int = option(2000, least=0)
    lr: float | None = option(1e-5, above=0, most=MOST_RATE)
    relative_update: float | None = option(None, above=0, most=MOST_RATE, before=None)
    linear_weight: float = option(1.0, least=0, most=MOST_WEIGHT)


@dataclass
class BudgetConfig:
    """A limit on the cost of the pruned model, for `stages=[plan]`. At most one of the first three keys may be set.

    With all of them None there is no limit, and every trained student and projector is plugged in.

    `params`: up to 1 the share of the teacher's parameters that may be left, above 1 their number.
    `memory_gb`: peak memory of one forward of the transformer in GB, weights and activations.
    `latency_ratio`: duration of one denoising step, relative to the teacher's.
    `cost`: how much quality a plug (a student or projector) is taken to cost. `velocity`: the error of the model's
        output that it adds on held-out data. `loss`: its own held-out distillation loss.
    `num_batches`: held-out batches to measure that error on.
    `rescored`: with the cost `velocity`, how many sets of plugs are measured to choose by the error that they have
        together, at most. 0: the sum of what each adds alone decides.
    """

    params: float | None = option(None, above=0, most=1e15)
    memory_gb: float | None = option(None, above=0, most=1e6)
    latency_ratio: float | None = option(None, above=0, most=1)
    cost: str = option("velocity", choices=("velocity", "loss"))
    num_batches: int = option(4, least=1)
    rescored: int = option(40, least=0, before=0)
