"""Makes a W&B dashboard for sweeps over pruning configurations: `ppcl dashboard ENTITY/PROJECT`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from ppcl.errors import UsageError

NAME = "Pruning: quality against size"
_X = "trainer/global_step"
# What a run has come to; `ppcl.report.compare` names these, and every W&B run of ours has them in its summary.
_SIZE, _DROP, _ERROR = "result/params_percent", "result/drop_percent", "result/velocity_error"
_SWEPT = (
    *("method.name", "budget.params", "budget.cost", "distill.relative_update", "distill.steps"),
    *("finetune.relative_update", "finetune.steps", "seed"),
)


def dashboard(entity: str, project: str) -> Any:
    """Return the definition of the dashboard, a `Workspace` of wandb-workspaces. It is not saved, and uses no network.

    Raises `UsageError` if wandb-workspaces is not installed.
    """
    if find_spec("wandb_workspaces") is None:
        raise UsageError("ppcl dashboard needs wandb-workspaces: pip install 'ppcl[dashboard]'.")
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as workspaces

    def against_size(title: str, key: str) -> Any:
        return panels.ScatterPlot(title=title, x=panels.SummaryMetric(_SIZE), y=panels.SummaryMetric(key))

    def curve(title: str, pattern: str) -> Any:
        return panels.LinePlot(title=title, x=_X, metric_regex=pattern, log_y=True)

    def media(title: str, *keys: str) -> Any:
        return panels.MediaBrowser(title=title, media_keys=list(keys))

    columns = [panels.ParallelCoordinatesPlotColumn(panels.Config(key)) for key in _SWEPT]
    columns += [panels.ParallelCoordinatesPlotColumn(panels.SummaryMetric(key)) for key in (_SIZE, _DROP, _ERROR)]
    sections = {
        "Which run is best": [
            against_size("drop of the score in %, against the size in % of the teacher", _DROP),
            against_size("velocity error, against the size in % of the teacher", _ERROR),
            panels.ParallelCoordinatesPlot(title="settings and what came out", columns=columns),
            panels.ParameterImportancePlot(with_respect_to=_DROP),
            panels.BarPlot(title="ms a denoising step", metrics=["result/latency_ms"]),
            panels.BarPlot(title="seconds of training", metrics=["result/training_seconds"]),
            panels.RunComparer(diff_only="split"),
        ],
        "Trainings": [
            curve("held-out loss of each stage", "(depth|width|finetune)/heldout"),
            curve("held-out loss of each student", "depth/.+/heldout"),
            curve("held-out loss of each projector", "width/.+/heldout"),
            curve("training loss", "(depth|width|finetune)/loss"),
            curve("gradient norm", ".*/gradient_norm"),
            curve("samples per second", ".*/samples_per_second"),
            media("samples while it trains", "depth/samples", "width/samples", "finetune/samples"),
        ],
        "Why these intervals": [
            media("similarity of all pairs of blocks", "detect/similarity"),
            media("residuals of the probes", "probe/residuals"),
            media("sizes and errors to choose from", "plan/frontier"),
            media("intervals", "detect/intervals"),
        ],
        "Pictures and scores": [
            media("teacher beside pruned models", "report/samples"),
            media("scores of all variants", "evaluate/scores"),
            media("report", "report/page"),
        ],
    }
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=[
            workspaces.Section(name=name, panels=found, is_open=place < 2)
            for place, (name, found) in enumerate(sections.items())
        ],
    )


def make_dashboard(arguments: Sequence[str]) -> str:
    """Save the dashboard to W&B, as `ppcl dashboard ENTITY/PROJECT` says, and return a line with its address.

    Raises `UsageError` for other arguments, and if W&B refuses.
    """
    entity, slash, project = arguments[0].partition("/") if len(arguments) == 1 else ("", "", "")
    if not (entity and slash and project) or "/" in project:
        raise UsageError(
            f"dashboard: {' '.join(arguments) or 'nothing'} is given: name your team or user at W&B and the project, "
            "as ppcl dashboard ENTITY/PROJECT."
        )
    made = dashboard(entity, project)
    import wandb

    try:
        saved = made.save()
    except (wandb.errors.Error, ValueError, OSError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        raise UsageError(f"dashboard: W&B does not take it for {entity}/{project}: {reason}.") from None
    return f"saved {NAME!r}: {saved.url}"
