"""The choices of `recovery`: what each trains in every family, what it leaves alone, and what is refused."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from commands import assert_same_tensors, digests, launch, ppcl, ppcl_process, succeed
from safetensors.torch import load_file
from test_stops import ONE, stopped

from ppcl.command import prepare
from ppcl.families.registry import builders

# By builder: its number of layers, and the intervals.
FAMILIES = {
    "tiny_qwen_image": (5, ["intervals.transformer_blocks=[[1,2]]"]),
    "tiny_flux": (3, ["intervals.transformer_blocks=[[1,2]]", "intervals.single_transformer_blocks=[[3,5]]"]),
    "tiny_dit": (5, ["intervals.transformer_blocks=[[1,2]]"]),
}
RECOVERIES = ("nonsequential", "sequential", "output_kd", "masked_kd", "hierarchical", "flow_matching")
WITH_STUDENTS = RECOVERIES[:2]
SHORT = ["finetune.steps=2", "finetune.batch_size=4", "distill.steps=2", "watch.heldout=0", "watch.pictures=0"]


def build(builder: str, folder: Path, settings: list[str]) -> list[str]:
    """Write an untrained model to `folder`, and return `settings` with those of its runs there."""
    layers, intervals = FAMILIES[builder]
    import_module(builders()[builder]).build_pipeline(0, layers).save_pretrained(folder / "teacher")
    paths = [f"model.path={folder / 'teacher'}", f"paths.runs_dir={folder}", "model.sampling.max_sequence_length=16"]
    return [*settings, *paths, *intervals, *SHORT]


@pytest.fixture(scope="module", params=FAMILIES)
def command(request: pytest.FixtureRequest, settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return build(request.param, tmp_path_factory.mktemp(request.param), settings)


@pytest.fixture(scope="module")
def qwen(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return build("tiny_qwen_image", tmp_path_factory.mktemp("qwen"), settings)


def folder_of(command: list[str], name: str) -> Path:
    return Path(next(a for a in command if a.startswith("paths.runs_dir=")).partition("=")[2]) / name


def finetuned(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "finetuned" / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("recovery", RECOVERIES)
def test_every_recovery_trains_every_family(command: list[str], recovery: str) -> None:
    stages = "stages=[depth,finetune]" if recovery in WITH_STUDENTS else "stages=[finetune]"
    said = succeed(*command, f"name={recovery}", f"recovery={recovery}", stages).out
    assert "held-out velocity error" in said
    run = folder_of(command, recovery)
    made_from = json.loads((run / "finetuned" / "ppcl.json").read_text())["made_from"]
    assert ("removed" in made_from) == (recovery not in WITH_STUDENTS)
    assert bool(list(run.glob("plugs/*.json"))) == (recovery in WITH_STUDENTS)


def test_nothing_before_the_first_removed_block_moves(command: list[str]) -> None:
    """Block 1 of the interval [1, 2] is the last that stays. FLUX has a later stack, which is trained."""
    succeed(*command, "name=frozen", "recovery=hierarchical", "stages=[finetune]")
    found = finetuned(folder_of(command, "frozen"))
    (weights,) = (folder_of(command, "teacher") / "transformer").glob("*.safetensors")
    teacher = load_file(weights)
    later = ("transformer_blocks.2.", "single_transformer_blocks.", "norm_out.", "proj_out")
    frozen = {name for name in found if not name.startswith(later) and not name.startswith("transformer_blocks.3.")}
    assert any(name.startswith("transformer_blocks.1.") for name in frozen)
    assert any(not name.startswith("transformer_blocks.") for name in frozen) or "class_labels" not in teacher
    assert_same_tensors({name: found[name] for name in frozen}, {name: teacher[name] for name in frozen})
    succeed(*command, "name=untuned", "distill=none", "stages=[export]", "export.variant=removed")
    (weights,) = (folder_of(command, "untuned") / "export" / "transformer").glob("*.safetensors")
    before = load_file(weights)
    trained = found.keys() - frozen
    moved = [name for name in trained if not torch.equal(found[name], before[name])]
    assert len(moved) > 0.5 * len(trained)


def test_a_killed_training_ends_with_the_same_bits(qwen: list[str]) -> None:
    """The weight of the features falls with the step, so it goes on from where it was."""
    train = [*qwen, "recovery=masked_kd", "finetune.feature_weight=10", "finetune.steps=6", "stages=[finetune]"]
    succeed(*train, "name=whole")
    stopped(ppcl_process("SIGTERM", "itself", *train, "name=cut", python=ONE), 143, "SIGTERM")
    assert "resuming from" in succeed(*train, "name=cut").out
    assert_same_tensors(finetuned(folder_of(qwen, "cut")), finetuned(folder_of(qwen, "whole")))
    succeed(*train, "name=constant", "finetune.feature_decay=false")
    constant, whole = finetuned(folder_of(qwen, "constant")), finetuned(folder_of(qwen, "whole"))
    assert any(not torch.equal(value, whole[name]) for name, value in constant.items())


@pytest.mark.parametrize("recovery", ["masked_kd", "hierarchical"])
def test_two_ranks_with_shards_train_what_one_does(qwen: list[str], recovery: str) -> None:
    train = [*qwen, f"recovery={recovery}", "finetune.lr=1e-4", "stages=[finetune]"]
    succeed(*train, f"name={recovery}-one")
    launch(2, *train, f"name={recovery}-two", "strategy=fsdp")
    one, two = (finetuned(folder_of(qwen, f"{recovery}-{name}")) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=2e-4, msg=name)  # two steps of AdamW


def test_a_divided_step_is_the_whole_step(qwen: list[str]) -> None:
    train = [*qwen, "recovery=hierarchical", "finetune.lr=1e-4", "stages=[finetune]"]
    succeed(*train, "name=undivided")
    succeed(*train, "name=divided", "finetune.accumulate=2")
    one, two = (finetuned(folder_of(qwen, name)) for name in ("undivided", "divided"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=2e-4, msg=name)


def test_a_lora_is_trained_on_masked_features(qwen: list[str]) -> None:
    said = succeed(*qwen, "name=lora", "recovery=masked_kd", "finetune.lora_rank=2", "stages=[finetune]").out
    assert "held-out velocity error" in said


def test_the_default_sets_nothing(qwen: list[str]) -> None:
    plain = prepare([*qwen, "name=plain"]).config
    assert prepare([*qwen, "name=plain", "recovery=nonsequential"]).config == plain
    assert (plain.distill.mode, plain.finetune.feature_loss, plain.finetune.trains) == ("parallel", "relative", "all")
    assert prepare([*qwen, "distill=none", "recovery=nonsequential"]).config.distill.mode == "none"


def test_the_command_line_wins(qwen: list[str]) -> None:
    config = prepare([*qwen, "recovery=masked_kd", "finetune.lr=0.5", "finetune.flow_weight=0"]).config.finetune
    assert (config.lr, config.flow_weight, config.output_weight) == (0.5, 0, 0.9)
    config = prepare([*qwen, "recovery=hierarchical", "finetune.relative_update=0.01"]).config.finetune
    assert (config.lr, config.relative_update) == (None, 0.01)


def test_large_models_have_the_published_rates() -> None:
    large = ["model=qwen_image", "stages=[plan]"]
    masked = prepare([*large, "recovery=masked_kd"]).config.finetune
    assert (masked.lr, masked.min_lr_ratio, masked.ema_decay, masked.optimizer) == (2e-4, 0.5, 0.9999, "adamw")
    frozen = prepare([*large, "recovery=hierarchical"]).config.finetune
    assert (frozen.lr, frozen.min_lr_ratio, frozen.warmup_steps, frozen.weight_decay) == (1e-4, 1.0, 0, 1e-4)


def test_a_recorded_run_takes_another_recovery_and_back(qwen: list[str]) -> None:
    succeed(*qwen, "name=recorded", "recovery=masked_kd", "stages=[plan]")
    run = folder_of(qwen, "recorded")
    assert prepare([f"run={run}"]).config.finetune.feature_loss == "masked"
    other = prepare([f"run={run}", "recovery=hierarchical"]).config
    assert (other.finetune.feature_loss, other.finetune.trains, other.finetune.ema_decay) == (
        "summed",
        "after_first_removed",
        0.0,
    )
    back = prepare([f"run={run}", "recovery=nonsequential"]).config
    assert (back.distill.mode, back.finetune.feature_loss, back.finetune.ema_decay) == ("parallel", "relative", 0.0)


@pytest.mark.parametrize(("first", "then"), [("output_kd", "nonsequential"), ("nonsequential", "output_kd")])
def test_a_run_that_was_tuned_without_students_is_not_tuned_with_them(qwen: list[str], first: str, then: str) -> None:
    """Nor the other way round, and no students are trained before that is said."""
    stages = {"output_kd": "stages=[finetune]", "nonsequential": "stages=[depth,finetune]"}
    succeed(*qwen, f"name={first}-first", f"recovery={first}", stages[first])
    run = folder_of(qwen, f"{first}-first")
    before = digests(run)
    for stage in {stages[then], "stages=[finetune]"}:
        outcome = ppcl(f"run={run}", f"recovery={then}", "trainer.accelerator=cpu", stage)
        assert outcome.code == 2
        assert re.search(r"made with(out)? students, and distill.mode=(none|parallel) trains (none|some):", outcome.err)
    assert digests(run) == before


def test_another_recovery_has_the_rates_of_the_recorded_recipe(qwen: list[str]) -> None:
    succeed(*qwen, "name=of_paper", "recipe=paper", "recovery=output_kd", "stages=[plan]")
    continued = prepare([f"run={folder_of(qwen, 'of_paper')}", "recovery=flow_matching"]).config.finetune
    fresh = prepare([*qwen, "recipe=paper", "recovery=flow_matching"]).config.finetune
    assert (continued.lr, continued.muon_lr) == (fresh.lr, fresh.muon_lr) != (None, None)
    assert continued.relative_update is None


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["recovery=masked"], "recovery=masked is unknown; conf/recovery has flow_matching, hierarchical"),
        (["recovery=output_kd", "stages=[depth]"], "'stages=[depth]' cannot run with distill.mode=none"),
        (["recovery=masked_kd", "finetune.feature_weight=0"], "finetune.feature_decay=true has no effect"),
        (["recovery=hierarchical", "finetune.feature_weight=0"], "finetune.feature_loss=summed has no effect"),
        (["finetune.mask_sigmas=3"], "finetune.mask_sigmas=3 has no effect with finetune.feature_loss=relative"),
        (["recovery=hierarchical", "finetune.lora_rank=4"], "does not go with finetune.lora_rank=4"),
        (["recovery=masked_kd", "finetune.recorded=true"], "finetune.recorded=true writes velocities alone"),
        (["recovery=hierarchical", "finetune.optimizer_states=8bit"], "finetune.beta1 and finetune.beta2 of at most"),
        (["recovery=hierarchical", "intervals.transformer_blocks=[]"], "needs a removed block, and no interval"),
        (["finetune.feature_loss=mask"], "finetune.feature_loss=mask"),
        (["finetune.trains=head"], "finetune.trains=head"),
    ],
)
def test_what_does_not_go_together_is_refused(qwen: list[str], overrides: list[str], sentence: str) -> None:
    outcome = ppcl(*qwen, "name=refused", "stages=[finetune]", *overrides)
    assert outcome.code == 2
    assert sentence in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


def test_projectors_alone_leave_nothing_to_begin_after(qwen: list[str]) -> None:
    width = ["width.source=given", "width.transformer_blocks.ffn=[3]", "width.steps=0", "width.num_batches=2"]
    given = [*qwen, *width, "name=projectors", "recovery=hierarchical", "budget.params=0.97"]
    succeed(*given, "stages=[width,plan]")
    choice = folder_of(qwen, "projectors") / "plan" / "choice.json"
    assert json.loads(choice.read_text())["plugged"] == ["transformer_blocks.3.ffn"]
    outcome = ppcl(*given, "stages=[finetune]")
    assert outcome.code == 2
    assert "no removed block to begin after" in outcome.err
