"""The Python entry: `ppcl.run`, `ppcl.load`, `ppcl.teacher`; and `run=FOLDER`, which goes on in a finished run."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import INTERVALS, NUM_LAYERS, PLUG_NAMES, REPOSITORY, modified, ppcl, succeed
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import ppcl as package
from ppcl.paths import conf_dir
from ppcl.stages import STAGES

FREE = """
import sys
import ppcl
assert "run" in dir(ppcl)
print(*sorted({"torch", "diffusers", "hydra", "omegaconf", "rich"} & {*sys.modules}))
"""
PAIRS = {"transformer_blocks": [(1, 2), (3, 4)]}
SIZES = ["model.sampling.num_inference_steps=2", "trainer.num_threads=1", "trainer=cpu"]


def test_importing_it_loads_no_library() -> None:
    done = subprocess.run([sys.executable, "-c", FREE], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# ppcl.run and ppcl.load


@pytest.fixture
def finished(trained: Path, tmp_path: Path) -> Path:
    """A copy of a run with two students, to work in."""
    return shutil.copytree(trained, tmp_path / "runs" / "finished")


def test_run_returns_what_the_run_has_made(settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    given = {"paths.runs_dir": tmp_path, "name": "mine, all", "stages": ["plan"]}
    results = package.run([*settings, *as_list(given), INTERVALS])
    assert results.folder == tmp_path / "mine, all"
    assert results.plan.intervals == PAIRS
    assert results.config.name == "mine, all"
    assert results.config.model.family == "qwen_image"
    assert "blocks      6 -> 4" in capsys.readouterr().out
    assert (results.choice, results.plugs, results.export, results.finetuned, results.report) == (None,) * 5
    assert (results.scores, results.images) == ({}, {})
    assert f"2 intervals: {', '.join(PLUG_NAMES)}" in repr(results)
    package.run([*settings, *as_list(given), INTERVALS], quiet=True)
    assert capsys.readouterr() == ("", "")


def as_list(given: dict[str, object]) -> list[str]:
    from ppcl.command import as_overrides

    return as_overrides(given)


def test_a_mapping_is_the_same_as_a_list() -> None:
    nested = {
        "model": "auto",
        "seed": 7,
        "distill": {"lr": 1e-5, "losses": {"direction": 1.0}},
        "budget.params": None,
        "model.streaming": True,
        "stages": ["depth", "export"],
        "intervals.transformer_blocks": [[1, 2], (3, 4)],
        "generate.prompt": 'it\'s a "cat", sitting = [good] \\',
    }
    with initialize_config_dir(str(conf_dir().resolve()), version_base="1.3"):
        raw = compose("config", as_list(nested))
    assert raw.generate.prompt == nested["generate.prompt"]
    assert raw.intervals.transformer_blocks == [[1, 2], [3, 4]]
    assert (raw.seed, raw.distill.lr, raw.model.streaming, raw.budget.params) == (7, 1e-5, True, None)
    assert raw.stages == ["depth", "export"]


def test_run_works_within_an_application_of_hydra(settings: list[str], tmp_path: Path) -> None:
    """And leaves that one's state as it was."""
    command = [*settings, INTERVALS, f"paths.runs_dir={tmp_path}", "name=within", "stages=[plan]"]
    with initialize_config_dir(str(conf_dir().resolve()), version_base="1.3"):
        assert package.run(command, quiet=True).plan.intervals == PAIRS
        assert compose("config", ["seed=3"]).seed == 3
    assert package.run(command, quiet=True).plan.intervals == PAIRS


@pytest.mark.parametrize(
    "override", ["distill.steps=abc", "model=nonesuch", "stages=[distil]", "distill.learning_rate=1", "stages=[plan"]
)
def test_run_raises_what_the_command_line_says(settings: list[str], tmp_path: Path, override: str) -> None:
    command = [*settings, f"paths.runs_dir={tmp_path / 'runs'}", "name=bad", override]
    with pytest.raises(package.UsageError) as raised:
        package.run(command)
    assert ppcl(*command).err == f"ppcl: {raised.value}\n"
    assert not [*tmp_path.rglob("*.yaml")]


def test_explain_tells_what_a_command_needs_and_makes_nothing(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command = [*settings, INTERVALS, f"paths.runs_dir={tmp_path / 'runs'}", "name=mine", "stages=[depth]"]
    package.explain(command)
    assert "estimates" in capsys.readouterr().out
    with pytest.raises(package.UsageError, match="explain=true makes no run"):
        package.run([*command, "explain=true"])
    assert not [*tmp_path.rglob("*.yaml")]


def test_run_takes_no_single_string() -> None:
    with pytest.raises(package.UsageError, match="give a list of overrides"):
        package.run("stages=[plan]")


def test_a_finished_run_is_loaded(chain: Path) -> None:
    results = package.load(chain)
    assert next(iter(results.scores)) == "teacher"
    assert results.scores["ppcl-depth"].num_layers < NUM_LAYERS
    assert results.export == chain / "export"
    assert results.report == chain / "report" / "report.html"
    assert all(len(paths) > 1 for paths in results.images.values())
    said = repr(results)
    assert all(word in said for word in ("plan", "plugs", "export", "scores", "teacher", str(chain)))


def test_what_detection_has_measured(chain: Path, trained: Path) -> None:
    results = package.load(chain)
    found = results.detection
    (stack,) = found["cka"]
    assert found["cka"][stack]["mean"][1][1] == pytest.approx(1)
    assert found["cka"][stack]["mean"][2][1] is None
    assert len(found["similarity"]["image"]) == NUM_LAYERS
    assert results.residuals.keys() >= {f"{stack}.{block}.image" for block in range(NUM_LAYERS)}
    assert all(value >= 0 for value in results.residuals.values())
    assert package.load(trained).detection is None
    assert package.load(trained).residuals == {}  # of its own cache


def test_pipelines_of_a_run(chain: Path) -> None:
    results = package.load(str(chain))
    exported = results.pipeline()
    depth = results.pipeline("ppcl-depth")
    assert len(results.pipeline("teacher").transformer.transformer_blocks) == NUM_LAYERS
    assert exported.transformer.config.num_layers == depth.transformer.config.num_layers < NUM_LAYERS
    pictures = [draw(pipeline, results.sampling()) for pipeline in (exported, depth, package.load(chain / "export"))]
    for other in pictures[1:]:
        np.testing.assert_allclose(other, pictures[0], atol=1e-5)
    with pytest.raises(package.UsageError, match="'student' is no variant; there are teacher, removed"):
        results.pipeline("student")


def draw(pipeline: object, sampling: dict[str, object]) -> np.ndarray:
    noise = torch.Generator().manual_seed(1)
    return pipeline("a red circle", generator=noise, output_type="np", **sampling).images  # type: ignore[operator]


def test_the_board_of_a_run(chain: Path) -> None:
    results = package.load(chain)
    board = results.board()
    whole = draw(board.pipeline, results.sampling())
    assert np.array_equal(whole, draw(results.pipeline("ppcl-depth"), results.sampling()))
    board()
    assert np.array_equal(
        draw(board.pipeline, results.sampling()), draw(results.pipeline("teacher"), results.sampling())
    )


def test_a_run_without_a_pruned_model_says_so(settings: list[str], tmp_path: Path) -> None:
    command = [*settings, INTERVALS, f"paths.runs_dir={tmp_path}", "name=counted", "stages=[plan]"]
    results = package.run(command, quiet=True)
    for ask in (results.pipeline, results.board):
        with pytest.raises(package.UsageError, match=r"stages=\[depth\]"):
            ask()


def test_a_folder_that_is_neither_is_refused(tmp_path: Path, trained: Path) -> None:
    with pytest.raises(package.UsageError, match=f"{tmp_path} is neither the folder of a run, which has a config.yaml"):
        package.load(tmp_path)
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(package.UsageError, match="is not YAML"):
        package.load(tmp_path)
    (tmp_path / "config.yaml").write_text("a: 1")
    with pytest.raises(package.UsageError, match="is not the record of a run"):
        package.load(tmp_path)
    with pytest.raises(package.UsageError, match="dtype= is for the folder of a pipeline"):
        package.load(trained, dtype=torch.float32)


def test_an_export_pruned_in_width_is_loaded_in_its_dtype(settings: list[str], tmp_path: Path) -> None:
    width = ["width.source=given", "width.transformer_blocks.ffn=[0]", "width.steps=1", "width.num_batches=1"]
    given = [*settings, *width, INTERVALS, f"paths.runs_dir={tmp_path}", "name=width", "distill.steps=1"]
    results = package.run([*given, "model.dtype=bfloat16", "stages=[depth,width,export]"], quiet=True)
    assert results.export == tmp_path / "width" / "export"
    pipeline = package.load(results.export)
    assert type(pipeline.transformer).__name__ == "PrunedQwenImageTransformer2DModel"
    assert pipeline.transformer.dtype == torch.bfloat16
    assert package.load(results.export, dtype=torch.float32).transformer.dtype == torch.float32


# run=FOLDER


def test_a_finished_run_draws_again_and_again(finished: Path) -> None:
    plugs = modified(finished / "plugs")
    record = OmegaConf.load(finished / "config.yaml")
    for prompt in ("a red circle", "a blue square, a red circle"):
        succeed(f"run={finished}", "stages=[generate]", f'generate.prompt="{prompt}"', "generate.variants=[ppcl-depth]")
        after = OmegaConf.load(finished / "config.yaml")
        assert after == record  # drawing changes nothing of what the run is
        shutil.rmtree(finished / "images")
    assert modified(finished / "plugs") == plugs


def test_what_a_command_says_wins_over_the_record(finished: Path) -> None:
    """Values, also those that are the default; and group choices."""
    before = OmegaConf.load(finished / "config.yaml")
    assert (before.model.sampling.num_inference_steps, before.distill.relative_update) == (2, 0.1)
    given = ["model.sampling.num_inference_steps=50", "quantize=int8", "method=ppcl_lp_a", "seed=42"]
    results = package.run([f"run={finished}", *given, "stages=[plan]"], quiet=True)
    config = results.config
    assert (config.model.sampling.num_inference_steps, config.model.sampling.height) == (50, 32)
    assert (config.quantize.scheme, config.method.name) == ("int8", "ppcl_lp_a")
    assert (config.distill.relative_update, config.intervals.transformer_blocks) == (0.1, [[1, 2], [3, 4]])
    few = package.run([f"run={finished}", "sampling=few_step", "stages=[plan]"], quiet=True).config.model.sampling
    assert (few.num_inference_steps, few.true_cfg_scale, few.height) == (8, 1.0, 32)


def test_what_is_asked_once_is_not_asked_again(finished: Path) -> None:
    given = ["generate.num_images=3", "lora.source=sum", "stages=[plan]"]
    package.run([f"run={finished}", *given], quiet=True)
    config = package.run([f"run={finished}"], quiet=True).config
    assert (config.generate.num_images, config.lora.source, config.stages) == (1, "first", ["plan"])


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["run=/nonesuch"], "run=/nonesuch is not the folder of a run"),
        (["run={runs}"], "it holds those of a sweep: name one, such as {runs}/finished"),
        (["run={run}", "name=other"], "name=other has no effect: drop one of them"),
        (["run={run}", "paths.runs_dir=other"], "paths.base_run={run}"),
        (["run={run}", "experiment=demo"], "experiment=demo is a whole one"),
        (["run={run}", "stages=[export]", "export.variant=nonsense"], "export.variant=nonsense"),
    ],
)
def test_what_does_not_go_with_a_run_is_refused(finished: Path, arguments: list[str], fragment: str) -> None:
    before = modified(finished)
    places = {"run": finished, "runs": finished.parent}
    outcome = ppcl(*(argument.format(**places) for argument in arguments))
    assert outcome.code == 2
    assert fragment.format(**places) in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert modified(finished) == before
    assert not Path("/nonesuch").exists()


def test_a_job_of_a_sweep_goes_on_and_a_run_is_swept(settings: list[str], tmp_path: Path) -> None:
    command = [*settings, INTERVALS, f"paths.runs_dir={tmp_path}", "name=sweep", "stages=[plan]"]
    succeed("--multirun", *command, "seed=1,2")
    first, second = (tmp_path / "sweep" / f"seed={seed}" for seed in (1, 2))
    results = package.run([f"run={second}", "method=ppcl_lp_a"], quiet=True)
    assert results.folder == second
    assert (results.config.seed, results.config.method.name) == (2, "ppcl_lp_a")
    assert package.load(first).config.method.name == "ppcl"
    succeed("--multirun", f"run={first},{second}", "budget.num_batches=3")
    for job, seed in ((first, 1), (second, 2)):
        config = package.load(job).config
        assert (config.seed, config.budget.num_batches) == (seed, 3)
    assert not list(first.glob("*/config.yaml"))


# Teachers


@pytest.mark.parametrize("name", ["tiny_qwen_image", "tiny_flux"])
def test_a_shipped_teacher_draws(name: str) -> None:
    pipeline = package.teacher(name)
    assert draw(pipeline, package.sampling(name) | {"num_inference_steps": 1}).shape == (1, 32, 32, 3)
    many = pipeline(["a red circle"] * 2, output_type="np", **package.sampling(name, 2) | {"num_inference_steps": 1})
    assert many.images.shape == (2, 32, 32, 3)


@pytest.mark.parametrize("function", [package.teacher, package.sampling])
def test_an_unknown_teacher_is_told_the_names(function: object) -> None:
    with pytest.raises(
        package.UsageError, match=r"'tiny' is no teacher that ppcl ships; there are tiny_dit, tiny_flux"
    ):
        function("tiny")  # type: ignore[operator]


# The command line


def test_without_arguments_it_helps_and_makes_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = ppcl()
    assert outcome.code == 0
    assert "Typical commands:" in outcome.out
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("distill.steps=ten", "distill.steps=ten: 'ten' is not a whole number; write one, such as distill.steps=6000."),
        ("distill.lr=low", "distill.lr=low: 'low' is not a number; write one, such as distill.lr=1e-05."),
        ("trainer.compile=x", "trainer.compile=x: 'x' is not true or false; write one, such as trainer.compile=false."),
        ("stages=plan", "stages=plan: 'plan' is not a list; write 'stages=[plan]'."),
        ("stages=[plan", "stages=[plan cannot be read: close its brackets and quotes, and write text in it in quotes"),
        ("generate.prompt=it's", 'needs quotes of its own inside those of the shell: "generate.prompt=\\"it\'s\\""'),
        ("plan", "plan is no override: write KEY=VALUE, such as experiment=try"),
        ("method=ppcl,ppcl_lp_a", "method=ppcl,ppcl_lp_a names several choices: name one, or add --multirun"),
        ("generate.prompt=a, b", "write 'generate.prompt=[a, b]' for a list, 'generate.prompt=\"a, b\"' for text"),
        ("intervals.transformer_blocks=[[1,b]]", "intervals.transformer_blocks=[[1,b]]: 'b' is not a whole number."),
    ],
)
def test_an_override_that_cannot_be_read_is_told_in_plain_words(override: str, expected: str) -> None:
    outcome = ppcl(override)
    assert outcome.code == 2
    assert outcome.err.startswith("ppcl: ")
    assert expected in outcome.err
    assert len(outcome.err.splitlines()) == 1


def test_make_lists_every_stage_with_its_words() -> None:
    done = subprocess.run(["make", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    for name, stage in STAGES.items():
        (line,) = (line for line in lines if line.startswith(f"  {name:<17} {stage.help.split()[0]} "))
        assert stage.help.startswith(line[20:])
    assert max(map(len, lines)) <= 100
