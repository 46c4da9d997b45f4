"""Every YAML under conf/ composes and passes the checks; mistakes are told in one sentence."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file

from ppcl.artifacts.costs import Unit
from ppcl.command import check_choices, continued
from ppcl.command import compose as compose_command
from ppcl.errors import UsageError
from ppcl.families.qwen_image.tiny import build_pipeline
from ppcl.families.registry import get_family
from ppcl.layers import Layout
from ppcl.schema import register_schema
from ppcl.stages import STAGES
from ppcl.surgery.count import count_parameters
from ppcl.validation import parse
from ppcl.validation.model import model_folder, num_layers
from ppcl.validation.prompts import read_prompts
from ppcl.validation.pruning import resolve_intervals, resolve_width
from ppcl.validation.strategy import resolve_precision
from ppcl.variants.planner import choose

CONF = Path(__file__).parents[2] / "conf"
FILES = sorted(str(path.relative_to(CONF).with_suffix("")) for path in CONF.rglob("*.yaml"))
LAYERS = 8
DETECT = ["plan", "probe", "detect"]
DETECTING = ["stages=[detect]"]


@pytest.fixture(scope="module", autouse=True)
def hydra():
    register_schema()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        yield


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "pipeline"
    build_pipeline(0, num_layers=LAYERS).save_pretrained(folder)
    return folder


@pytest.fixture
def auto(pipeline_folder):
    """Overrides that select the saved pipeline."""
    return ["model=auto", f"model.path={pipeline_folder}"]


def parsed(*overrides):
    return parse(compose("config", list(overrides)))


def write_plan(path, **changes):
    plan = {"family": "qwen_image", "num_layers": {"transformer_blocks": LAYERS}}
    plan |= {"intervals": {"transformer_blocks": [[0, 1], [3, 5]]}}
    path.write_text(json.dumps(plan | changes))
    return path


def model_of(family):
    """The config of a model of that family which counts without weights."""
    for path in sorted((CONF / "model").glob("*.yaml")):
        content = yaml.safe_load(path.read_text())
        if content.get("family") == family and content.get("arch"):
            return path.stem
    raise AssertionError(f"no model under conf/ counts {family} without weights")


def started(monkeypatch, count):
    """As one of `count` processes of torchrun."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(count))


# Every file


@pytest.mark.parametrize("file", FILES)
def test_every_yaml_composes_and_parses(file, auto, tmp_path, monkeypatch):
    """Chosen on its own, over the defaults, with the model it needs."""
    group, _, choice = file.rpartition("/")
    if group == "strategy" and choice != "single":
        started(monkeypatch, 2)
    content = yaml.safe_load((CONF / file).with_suffix(".yaml").read_text()) or {}  # a choice may set nothing
    overrides = auto if group not in ("model", "experiment") else []
    if group == "intervals" and content.get("family"):
        overrides = [f"model={model_of(content['family'])}"]
    if choice == "from_plan":
        overrides = [*overrides, f"{group}.path={write_plan(tmp_path / 'plan.json')}"]
    if group == "width" and content.get("family"):
        overrides = [f"model={model_of(content['family'])}", f"intervals={choice}"]
    if file == "method/indices":
        overrides = [*overrides, "method.settings.keep=[0,2]"]
    if file == "model/auto":
        overrides = auto[1:]
    if file == "experiment/prune":
        overrides = [auto[1], "data.path=/pictures"]
    if "path" in content and group == "data":
        overrides = [*overrides, "data.path=/pictures"]
    if "init" in content.get("pretrain", {}) and group == "experiment":  # by an earlier experiment, not run here
        overrides = [*overrides, "pretrain.init=embedded:tiny_qwen_image"]
    if group and group != "hydra/help":
        overrides = [f"{group}={choice}", *overrides]
    raw = compose("config", overrides, return_hydra_config=group == "hydra/help")
    if group == "hydra/help":
        assert raw.hydra.help.app_name == content["app_name"]
        assert all(f"{stage:9} " in raw.hydra.help.template for stage in STAGES)
        return
    config = parse(raw)
    # What the file says is what the run sees: no default or other group silently wins.
    sections = dict.fromkeys(("", "experiment", "sweep"), config) | {"sampling": config.model.sampling}
    if group in ("recipe", "recovery"):  # they set keys of other groups
        sections[group] = config
        found = {(part, key): getattr(getattr(config, part), key) for part in content for key in content[part]}
        if group == "recipe":
            losses = {name: weight for name, weight in content["distill"].pop("losses").items() if weight}
            assert found.pop(("distill", "losses")) == losses
        for (part, key), value in found.items():
            assert value == content[part][key] or "${" in str(content[part][key])
    section = sections[group] if group in sections else getattr(config, group)
    resolved = {"model/auto": {"family", "path"}, "benchmark/auto": {"name"}}
    found_in_the_folder = resolved.get(file, {"path"} if group == "data" else set())
    for key, value in content.items():
        if key not in {"defaults", *found_in_the_folder} and not isinstance(value, dict) and "${" not in str(value):
            assert getattr(section, key) == value, key
    assert set(config.stages) <= set(STAGES)


def test_the_demo_distils_small_and_goes_all_the_way(auto):
    config = parsed("experiment=demo", *auto)
    assert config.name == "demo"
    assert config.stages[-1] == "report"
    assert config.distill.batch_size == yaml.safe_load((CONF / "distill/tiny.yaml").read_text())["batch_size"]
    assert config.trainer.accelerator == "cpu"
    assert config.distill.beta2 == 0.95  # what tiny.yaml does not change it takes from the paper


def test_the_embedded_teacher_is_a_folder_of_the_package(auto):
    config = parsed("model=tiny_qwen_image")
    assert (model_folder(config.model) / "model_index.json").is_file()
    assert num_layers(config) == {"transformer_blocks": 20}


def test_auto_reads_family_and_depth_from_the_folder(auto):
    config = parsed(*auto)
    assert config.model.family == "qwen_image"
    assert num_layers(config) == {"transformer_blocks": LAYERS}
    assert resolve_intervals(config) is None
    given = parsed(*auto, "intervals.transformer_blocks=[[0,1],[2,7]]")
    assert resolve_intervals(given) == {"transformer_blocks": [(0, 1), (2, 7)]}


def test_the_cache_follows_the_runs(auto):
    assert parsed(*auto, "paths.runs_dir=/elsewhere").paths.cache_dir == "/elsewhere/cache"


def test_a_plan_file_gives_its_intervals(auto, tmp_path):
    path = write_plan(tmp_path / "plan.json")
    config = parsed(*auto, "intervals=from_plan", f"intervals.path={path}")
    assert resolve_intervals(config) == {"transformer_blocks": [(0, 1), (3, 5)]}


FLUX_SETS = {
    "intervals": {"transformer_blocks": [[3, 4], [9, 11]], "single_transformer_blocks": [[5, 7]]},
    "width": {"transformer_blocks": {"text": [15, 12], "ffn": [2]}, "single_transformer_blocks": {"ffn": [20]}},
}
FLUX_NAMES = """
intervals: {names: [transformer_blocks.9-11, single_transformer_blocks.5-7, transformer_blocks.3-4]}
width:
  names:
    - transformer_blocks.15.text
    - transformer_blocks.12.text
    - transformer_blocks.2.ffn
    - single_transformer_blocks.20.ffn
"""


def test_names_give_what_a_key_per_stack_gives():
    """On the command line and in YAML."""
    given = ["model=flux_dev", "width.source=given"]
    keys = parse(OmegaConf.merge(compose("config", given), FLUX_SETS))
    read = yaml.safe_load(FLUX_NAMES)
    lines = [f"{group}.names=[{','.join(content['names'])}]" for group, content in read.items()]
    for named in (
        parsed(*given, *lines),
        parse(OmegaConf.merge(compose("config", given), OmegaConf.create(FLUX_NAMES))),
    ):
        assert (
            resolve_intervals(named)
            == resolve_intervals(keys)
            == {
                "transformer_blocks": [(3, 4), (9, 11)],
                "single_transformer_blocks": [(5, 7)],
            }
        )
        assert (
            resolve_width(named)
            == resolve_width(keys)
            == {
                "transformer_blocks": {"text": [12, 15], "ffn": [2]},
                "single_transformer_blocks": {"text": [], "ffn": [20]},
            }
        )


def test_an_edit_model_is_given_pictures(tmp_path):
    prompts, picture = tmp_path / "prompts.txt", tmp_path / "cat.png"
    prompts.write_text("make it a dog\n")
    Image.new("RGB", (8, 8)).save(picture)
    command = ["stages=[plan]", "intervals.transformer_blocks=[[0,1]]", f"generate.prompt_file={prompts}"]
    one, two = (f"generate.images=[{','.join([str(picture)] * count)}]" for count in (1, 2))
    assert parsed("model=qwen_image_edit", *command, one).generate.images == [str(picture)]
    assert parsed("model=qwen_image_edit_2509", *command, two).generate.images == [str(picture)] * 2
    assert "is given one picture" in refused(["model=qwen_image_edit", *command])
    assert "is given one picture" in refused(["model=qwen_image_edit", *command, two])
    assert "is given one to 3 pictures" in refused(["model=qwen_image_edit_2509", *command])
    assert "is given no picture" in refused(["model=qwen_image", *command, one])
    assert "needs generate.prompt" in refused(["model=qwen_image_edit", *command[:2], one])
    spoilt = [f"generate.images=[{prompts}]", *command]
    assert f"generate.images={prompts} is no picture" in refused(["model=qwen_image_edit", *spoilt])


def test_only_an_edit_model_takes_the_size_of_a_given_picture():
    command, sides = ["stages=[plan]", "intervals.transformer_blocks=[[0,1]]"], ("height", "width")
    for model in ("qwen_image_edit", "qwen_image_edit_2511"):
        sampling = parsed(f"model={model}", *command).model.sampling
        assert (sampling.height, sampling.width, sampling.size) == (None, None, (1024, 1024))
    given = [f"model.sampling.{side}=512" for side in sides]
    assert parsed("model=qwen_image_edit", *command, *given).model.sampling.size == (512, 512)
    for side in sides:
        assert "is given none" in refused(["model=qwen_image", *command, f"model.sampling.{side}=null"])
        assert "set both or none" in refused(["model=qwen_image_edit", *command, f"model.sampling.{side}=512"])


def test_a_prompt_file_is_read_line_by_line(auto, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\r\n\n  zwei Würfel  \n", encoding="utf-8")
    config = parsed(*auto, f"generate.prompt_file={path}", "stages=[generate]")
    prompts = read_prompts(Path(config.generate.prompt_file))
    assert [prompt.text for prompt in prompts] == ["a red circle", "zwei Würfel"]


@pytest.mark.parametrize(
    ("layout", "changes", "said"),
    [
        ("geneval", [], "generate.layout=geneval needs generate.prompt_file=evaluation_metadata.jsonl"),
        ("geneval", ["plain.txt"], "it is {path}"),
        ("geneval", ["untagged.jsonl"], 'whose lines have a "prompt" and a "tag"'),
        ("geneval", ["list.jsonl"], 'line 1 is no JSON object with a text as "prompt"'),
        ("dpg", ["plain.txt"], "generate.layout=dpg needs generate.prompt_file=FOLDER"),
        ("dpg", ["folder", "generate.num_images=5"], "generate.num_images=5 is more than the 4 pictures of a prompt"),
        ("dpg", ["folder", "model.sampling.width=64"], "generate.layout=dpg is for square pictures"),
        ("coco", [], "generate.layout=coco is not one of geneval, dpg"),
    ],
)
def test_a_layout_needs_the_prompts_of_its_scorer(auto, tmp_path, layout, changes, said):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "1.txt").write_text("a red circle")
    for name, line in (("plain.txt", "a"), ("untagged.jsonl", '{"prompt": "a"}'), ("list.jsonl", '["a"]')):
        (tmp_path / name).write_text(line)
    file = [f"generate.prompt_file={tmp_path / name}" for name in changes[:1]]
    sentence = refused([*auto, "stages=[generate]", f"generate.layout={layout}", *file, *changes[1:]])
    assert said.format(path=tmp_path / "plain.txt") in sentence


# The paper's numbers


@pytest.mark.parametrize(
    ("model", "billions"),
    [
        ("qwen_image", 20.430),
        ("qwen_image_edit", 20.430),
        ("qwen_image_edit_2509", 20.430),
        ("qwen_image_edit_2511", 20.430),
        ("flux_dev", 11.901),
        ("flux_lite", 8.163),
        ("wan_22", 14.288),
        ("ltx_2", 18.876),
        ("flux_2_dev", 32.223),
        ("hunyuan_image", 17.411),
        ("qwen_image_21", 7.115),
        ("z_image", 6.155),
        ("dit_xl", 0.750),  # the published 0.675 share one embedding, which diffusers repeats in every block
    ],
)
def test_every_family_is_as_large_as_published(model, billions):
    config = parsed(f"model={model}")
    counts = count_parameters(get_family(config.model.family), config.model.arch, {})
    assert counts["teacher"] / 1e9 == pytest.approx(billions, abs=5e-4)


@pytest.mark.parametrize(
    ("choice", "removed", "student"),
    [
        ("qwen_image_paper", 25, 11_934_618_688),
        ("qwen_image_baseline", 25, 11_934_618_688),
        ("qwen_image_lp_a", 25, 11_934_618_688),
        ("qwen_image_lp_b", 23, 12_614_281_280),
    ],
)
def test_the_papers_interval_sets_remove_what_it_says(choice, removed, student):
    config = parsed("model=qwen_image", f"intervals={choice}")
    intervals = resolve_intervals(config)
    assert sum(v - u for u, v in intervals["transformer_blocks"]) == removed
    counts = count_parameters(get_family("qwen_image"), config.model.arch, intervals)
    assert counts["teacher"] == 20_430_401_088
    assert counts["student"] == student
    assert (counts["teacher_layers"], counts["student_layers"]) == (60, 60 - removed)


@pytest.mark.parametrize(
    ("model", "choice", "removed", "student"),
    [
        ("flux_dev", "flux_dev_paper", {"transformer_blocks": 10, "single_transformer_blocks": 14}, 6.52),
        ("flux_lite", "flux_lite", {"single_transformer_blocks": 12}, 6.46),
    ],
)
def test_flux_sets_leave_what_they_say(model, choice, removed, student):
    config = parsed(f"model={model}", f"intervals={choice}")
    intervals = resolve_intervals(config)
    assert {stack: sum(v - u for u, v in pairs) for stack, pairs in intervals.items() if pairs} == removed
    counts = count_parameters(get_family("flux"), config.model.arch, intervals)
    assert counts["student"] / 1e9 == pytest.approx(student, abs=5e-3)


def test_the_planner_finds_an_8b_flux_within_the_papers_sets():
    """At the least cost, which is here the number of blocks removed; on real weights it is measured."""
    config = parsed("model=flux_dev", "intervals=flux_dev_paper")
    family, arch, intervals = get_family("flux"), config.model.arch, resolve_intervals(config)
    whole = count_parameters(family, arch, {})["teacher"]
    units, sizes = [], {}
    for stack, pairs in intervals.items():
        for u, v in pairs:
            if (stack, v - u) not in sizes:
                sizes[stack, v - u] = whole - count_parameters(family, arch, {stack: [(u, v)]})["student"]
            saved, cost = {"params": sizes[stack, v - u]}, {"velocity": float(v - u)}
            units.append(Unit(f"{stack}.{u}-{v}", [], saved, cost))
    chosen = choose(units, "params", whole - 8e9, "velocity")
    assert 0 < len(chosen) < len(units)
    left = {stack: [p for p in pairs if f"{stack}.{p[0]}-{p[1]}" in chosen] for stack, pairs in intervals.items()}
    assert 7.7e9 < count_parameters(family, arch, left)["student"] <= 8e9


def test_the_papers_headline_sizes():
    config = parsed("model=qwen_image", "intervals=qwen_image_paper")
    counts = count_parameters(get_family("qwen_image"), config.model.arch, resolve_intervals(config))
    assert (round(counts["teacher"] / 1e9, 3), round(counts["student"] / 1e9, 3)) == (20.430, 11.935)
    block = (counts["teacher"] - counts["student"]) / 25
    assert block == pytest.approx(36 * 3072**2, rel=1e-3)  # a dual block is 36 D^2 but for biases and norms


def test_the_papers_width_sets_leave_what_it_says():
    config = parsed("model=qwen_image", "intervals=qwen_image_paper", "width=qwen_image_paper")
    layout = Layout(config.width.text_output, config.width.keep_text_query)
    sets = resolve_intervals(config), resolve_width(config)
    counts = count_parameters(get_family("qwen_image"), config.model.arch, *sets, layout)
    assert (round(counts["depth"] / 1e9, 3), round(counts["student"] / 1e9, 3)) == (11.935, 10.528)
    assert counts["teacher"] > counts["depth"] > counts["text"] > counts["ffn"] == counts["student"]


# Mistakes


def refused(overrides):
    """The sentence that a mistake is answered with."""
    with pytest.raises(UsageError) as caught:
        parsed(*overrides)
    sentence = str(caught.value)
    assert len(sentence.splitlines()) == 1
    assert sentence.endswith(".")
    return sentence


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        (["intervals.transformer_blocks=[[0,2],[2,4]]"], ["intervals.transformer_blocks", "[2, 4] overlaps", "[0, 2]"]),
        (["intervals.transformer_blocks=[[3,4],[0,1]]"], ["intervals.transformer_blocks", "[0, 1]", "precedes [3, 4]"]),
        (["intervals.transformer_blocks=[[4,2]]"], ["intervals.transformer_blocks", "[4, 2] is reversed"]),
        (["intervals.transformer_blocks=[[4,4]]"], ["intervals.transformer_blocks", "[4, 4]", "empty"]),
        (
            ["intervals.transformer_blocks=[[5,8]]"],
            ["intervals.transformer_blocks", "[5, 8] is out of range", "0 to 7"],
        ),
        (["intervals.transformer_blocks=[[-1,2]]"], ["intervals.transformer_blocks", "[-1, 2] is out of range"]),
        (["intervals.transformer_blocks=[[1,2,3]]"], ["intervals.transformer_blocks", "[1, 2, 3] is not a pair"]),
        (["intervals.single_transformer_blocks=[[1,2]]"], ["intervals", "no block stack single_transformer_blocks"]),
        (["intervals.transformer_blocks=[[1,2]]", "stages=[detect]"], ["intervals", "stages=[detect]"]),
        (["intervals.source=somewhere"], ["intervals.source=somewhere", "detect, plan"]),
        (["intervals=from_plan"], ["intervals=from_plan", "intervals.path"]),
        (["intervals=from_plan", "intervals.path=/no/plan.json"], ["/no/plan.json does not exist"]),
        (["intervals.path=/some/plan.json"], ["intervals.path=/some/plan.json", "intervals=from_plan"]),
        (["intervals=qwen_image_paper"], ["intervals.transformer_blocks", "[8, 10] is out of range"]),
        (["stages=[]"], ["stages=[]"]),
        (["stages=[probe,distil]"], ["stages=distil", "depth"]),
        (["method.rule=lp_c"], ["method.rule=lp_c", "lp_a"]),
        (["method.stream=audio"], ["method.stream=audio"]),
        (["method.min_length=1"], ["method.min_length=1", "at least 2"]),
        (["method.extend=[0]"], ["method.extend=[0]", "lp_b"]),
        (["method=cka_sensitivity", "method.num_remove=null"], ["method.num_remove", "method.params"]),
        (["method=shortgpt", "method.num_remove=2"], ["method.num_remove=2", "method.params=0.7", "=null"]),
        (["method.params=0.7"], ["method.params=0.7", "method.rule=lp"]),
        ([*DETECTING, "method=shortgpt", "method.params=0.01"], ["method.params=0.01", "cannot be reached"]),
        ([*DETECTING, "method=llm_streamline", "method.params=0.01"], ["method.params=0.01", "one window"]),
        ([*DETECTING, "method=shortgpt", "method.params=1"], ["method.params=1", "removes nothing"]),
        ([*DETECTING, "method=indices"], ["method.settings.keep"]),
        ([*DETECTING, "method=indices", "method.settings.remove=[0]"], ["block 0", "has to stay"]),
        ([*DETECTING, "method=indices", "method.settings.remove=[8]"], ["8 is no block", "0 to 7"]),
        (["distill.mode=serial"], ["distill.mode=serial", "sequential"]),
        (["distill.mode=sequential", "distill.intervals=[0-1]"], ["distill.intervals=['0-1']", "distill.mode"]),
        (["distill.init=last"], ["distill.init=last", "middle"]),
        (["distill.steps=0"], ["distill.steps=0", "at least 1"]),
        (["distill.lr=-0.1"], ["distill.lr=-0.1"]),
        (["probe.ridge=-1"], ["probe.ridge=-1"]),
        (["probe.init=random"], ["probe.init=random", "closed_form"]),
        (["data.train_seed=5", "data.eval_seed=5"], ["data.train_seed", "eval_seed", "(5, 1, 5)"]),
        (["data.calibration_seed=2"], ["calibration_seed", "(0, 2, 2)"]),
        (["data.timesteps=cosine"], ["data.timesteps=cosine", "logit_normal"]),
        (["generate.variants=[student]"], ["generate.variants=student", "ppcl-depth"]),
        (["generate.plug_fraction=1"], ["generate.plug_fraction=1"]),
        (["generate.prompt_file=/no/such.txt"], ["generate.prompt_file=/no/such.txt"]),
        (["generate.prompt= "], ["generate.prompt is empty"]),
        (["generate.num_images=0"], ["generate.num_images=0", "at least 1"]),
        (["generate.loras=[/no/lora.safetensors]"], ["generate.loras: /no/lora.safetensors does not exist"]),
        (["generate.loras=[lora.bin]"], ["generate.loras=lora.bin", "can hold code"]),
        (["generate.controlnet=/some"], ["generate.controlnet=/some", "generate.control_image"]),
        (["generate.controlnet=/c", "generate.control_image=/no.png"], ["generate.control_image=/no.png"]),
        (["generate.control_image=/no.png"], ["generate.control_image=/no.png", "generate.controlnet"]),
        (["generate.offload=disk"], ["generate.offload=disk", "group"]),
        (["generate.offload=group", "stages=[depth,generate]"], ["generate.offload=group", "stages=[generate]"]),
        (["generate.offload=group", "stages=[generate]"], ["generate.offload=group", "one variant"]),
        (["logger.kind=tensorboard"], ["logger.kind=tensorboard", "csv"]),
        (["model.dtype=float8"], ["model.dtype=float8", "bfloat16"]),
        (["stages=[pretrain]"], ["stages=[pretrain]", "model=auto"]),
        (["stages=[pretrain,plan]"], ["stages=['pretrain', 'plan']", "'stages=[pretrain]' alone"]),
        (["model.family=flux9"], ["model.family=flux9"]),
    ],
    ids=lambda value: " ".join(value) if "=" in str(value[0]) else "",
)
def test_a_mistake_is_one_sentence_with_key_and_value(auto, overrides, fragments):
    sentence = refused([*auto, *overrides])
    assert [part for part in fragments if part not in sentence] == [], sentence


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"num_layers": {"transformer_blocks": 60}}, ["60", str(LAYERS), "model=auto"]),
        ({"family": "flux"}, ["flux", "qwen_image", "model=auto"]),
        ({"intervals": {"transformer_blocks": [[0, 9]]}}, ["[0, 9] is out of range"]),
        ({"intervals": {"transformer_blocks": [[0, 2], [1, 3]]}}, ["[1, 3] overlaps"]),
        ({"intervals": {"blocks": [[0, 2]]}}, ["no block stack blocks"]),
        ({"intervals": "none"}, ["is not a pruning plan"]),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(auto, tmp_path, changes, fragments):
    path = write_plan(tmp_path / "plan.json", **changes)
    sentence = refused([*auto, "intervals=from_plan", f"intervals.path={path}"])
    assert [part for part in [str(path), *fragments] if part not in sentence] == [], sentence


def test_a_plan_and_a_list_exclude_each_other(auto, tmp_path):
    path = write_plan(tmp_path / "plan.json")
    plan = ["intervals=from_plan", f"intervals.path={path}"]
    assert "intervals.transformer_blocks" in refused([*auto, *plan, "intervals.transformer_blocks=[[0,1]]"])
    assert "stages=[detect]" in refused([*auto, *plan, f"stages=[{','.join(DETECT)}]"])


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(b"", "holds no prompt"), (b" \n\n\t\n", "holds no prompt"), ("a Würfel".encode("latin-1"), "is not UTF-8")],
)
def test_a_bad_prompt_file_is_refused(auto, tmp_path, content, complaint):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    sentence = refused([*auto, f"generate.prompt_file={path}", "stages=[generate]"])
    assert f"generate.prompt_file={path} {complaint}" in sentence


def test_the_benchmark_fits_the_model_and_the_data(auto, tmp_path, pipeline_folder):
    draws = "stages=[generate,evaluate,report]"
    assert parsed(*auto, draws).benchmark.name == "shapes"
    assert parsed(*auto, draws, "benchmark=none").benchmark.name == "none"
    assert parsed(*auto, draws, "data=folder", "data.path=/p").benchmark.name == "fidelity"
    sentence = refused([*auto, draws, "data=folder", "data.path=/p", "benchmark=shapes"])
    assert "benchmark=shapes scores pictures of the shapes world alone, which data=folder does not draw" in sentence
    assert parsed("model=qwen_image", "model.path=a/b", "generate.prompt=x", draws).benchmark.name == "fidelity"
    for edit in ([], ["data=webdataset", "data.path=/p", "data.given=[given]"]):
        sentence = refused(["model=qwen_image_edit", "model.path=a/b", *edit, draws])
        assert "give generate.prompt_file=FILE, with a prompt a line, and generate.images=[...]" in sentence
    assert "there are no captions to draw" in refused(["model=qwen_image", "model.path=a/b", draws])
    assert parsed("model=tiny_qwen_image", "stages=[pretrain]").benchmark.name == "shapes"


def test_a_model_folder_that_is_none_is_refused(tmp_path):
    for path in (tmp_path / "missing", tmp_path):
        sentence = refused(["model=auto", f"model.path={path}"])
        assert f"model.path={path} is not a pipeline folder" in sentence
    assert "model.path" in refused(["model=auto"])


@pytest.mark.parametrize("stage", ["probe", "detect", "depth", "width", "finetune", "export", "generate", "evaluate"])
def test_stages_that_need_weights_say_so(stage):
    sentence = refused(["model=qwen_image", f"stages=[plan,{stage}]"])
    assert f"stages=[{stage}]" in sentence
    assert "model.path" in sentence


def copy_of(folder, target, skip):
    """Links to all of a folder's files but one, whose copy may be spoilt."""
    for file in folder.rglob("*"):
        if file.is_file():
            copied = target / file.relative_to(folder)
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.write_bytes(file.read_bytes()) if copied.name == skip else copied.symlink_to(file)
    return target


def test_a_truncated_weight_file_in_the_model_folder_is_named(pipeline_folder, tmp_path):
    folder = copy_of(pipeline_folder, tmp_path / "cut", "diffusion_pytorch_model.safetensors")
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    sentence = refused(["model=auto", f"model.path={folder}"])
    assert f"{weights} is truncated" in sentence


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"_class_name": "StableDiffusionPipeline"}', "holds a StableDiffusionPipeline without a transformer"),
        ("{", "its model_index.json does not read as a JSON object"),
        ("", "its model_index.json does not read as a JSON object"),
        ('["QwenImagePipeline"]', "its model_index.json does not read as a JSON object"),
        ("{}", "its model_index.json has no _class_name"),
        ('{"_class_name": ["x", "QwenImagePipeline"]}', "its model_index.json has no _class_name"),
    ],
)
def test_a_folder_of_another_pipeline_is_refused(pipeline_folder, tmp_path, content, complaint):
    folder = copy_of(pipeline_folder, tmp_path / "other", "model_index.json")
    (folder / "model_index.json").write_text(content)
    sentence = refused(["model=auto", f"model.path={folder}"])
    assert f"model.path={folder}" in sentence
    assert complaint in sentence


def test_a_value_of_the_wrong_type_names_its_key():
    """Types are checked where files and command line meet the schema, before any other check."""
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    with pytest.raises(HydraException, match=r"distill\.steps=many"):
        compose("config", ["distill.steps=many"])
    raw = OmegaConf.create({"name": "x", "stages": ["plan"], "distill": {"steps": "many"}})
    with pytest.raises(UsageError, match=r"distill\.steps: .*many") as caught:
        parse(raw)
    assert len(str(caught.value).splitlines()) == 1


# Several processes


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["strategy=fsdp", "stages=[plan]"], "torchrun --nproc-per-node 2 -m ppcl ... strategy=fsdp"),
        (["strategy.cpu_offload=true"], "strategy.cpu_offload=true means nothing to strategy=single"),
        (["strategy.timeout_minutes=0"], "strategy.timeout_minutes=0 must be above 0"),
        (["strategy.kind=tp"], "strategy.kind=tp is not one of single, ddp, fsdp"),
    ],
)
def test_a_strategy_that_means_nothing_is_refused(auto, overrides, sentence):
    assert sentence in refused([*auto, *overrides])


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["stages=[depth]"], "strategy=single runs depth in one process, and 3 were started"),
        (["stages=[cache,width,generate]"], "strategy=single runs width, generate in one process"),
        (
            ["stages=[depth]", "strategy=ddp", "distill=paper"],
            "distill.batch_size=2 does not divide among 3 ranks: make it 3",
        ),
        (
            ["stages=[finetune]", "strategy=fsdp", "finetune=paper"],
            "finetune.batch_size=4 does not divide among 3 ranks: make it 6",
        ),
        (["stages=[pretrain]", "strategy=ddp"], "strategy=ddp does not go with 'stages=[pretrain]'"),
        (["stages=[probe]", "strategy=fsdp", "model.streaming=true"], "model.streaming=true reads the teacher"),
        (["stages=[depth]", "strategy=fsdp", "distill.batch_size=3", "distill.mode=sequential"], "use strategy=ddp"),
        (
            ["stages=[depth]", "strategy=ddp", "distill.batch_size=3", "distill.from_boundaries=true"],
            "distill.from_boundaries=true does not go with strategy=ddp",
        ),
    ],
)
def test_what_ranks_cannot_share_is_refused(auto, monkeypatch, overrides, sentence):
    started(monkeypatch, 3)
    assert sentence in refused([*auto, *overrides])


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["trainer.precision=16-mixed"], "trainer.precision=16-mixed is not one of 32-true, bf16-mixed"),
        (["trainer.precision=bf16-true"], "trainable parameters stay in float32"),
        (["trainer.precision=32-true", "model.dtype=bfloat16"], "does not go with model.dtype=bfloat16"),
    ],
)
def test_a_precision_that_does_not_fit_is_refused(auto, overrides, sentence):
    assert sentence in refused([*auto, *overrides])


@pytest.mark.parametrize(
    ("overrides", "precision"),
    [
        ([], "32-true"),
        (["model.dtype=bfloat16"], "bf16-mixed"),
        (["model.dtype=float16"], "bf16-mixed"),
        (["trainer.precision=bf16-mixed"], "bf16-mixed"),
    ],
)
def test_precision_goes_with_the_teacher(auto, overrides, precision):
    assert resolve_precision(parsed(*auto, *overrides)) == precision


def test_what_ranks_can_share_is_not(auto, monkeypatch):
    started(monkeypatch, 2)
    assert parsed("data=folder", "data.path=/pictures", "stages=[cache]", *auto).strategy.kind == "single"
    sequential = ["distill.mode=sequential", "stages=[depth]"]
    assert parsed(*auto, "strategy=ddp", *sequential).strategy.kind == "ddp"
    assert parsed(*auto, "strategy=fsdp", "strategy.cpu_offload=true").strategy.cpu_offload


def test_losses_are_weighed_by_name(auto):
    paper = [*auto, "recipe=paper"]
    assert parsed(*auto).distill.losses == {"relative_per_token": 1.0}
    assert parsed(*paper).distill.losses == {"direction": 1.0}
    assert parsed(*paper, "distill.losses.relative=0.5").distill.losses == {"direction": 1.0, "relative": 0.5}
    for wrong in ("distill.losses.relatve=0.5", "distill.losses.direction=-1", "distill.losses.relative_per_token=0"):
        with pytest.raises(UsageError, match=r"distill\.losses[.=]\S"):
            parsed(*auto, wrong)


def test_keys_that_a_plus_brought_past_hydra_are_refused(auto):
    with pytest.raises(UsageError, match=r"method\.typo is no configuration key"):
        parsed(*auto, "+method.typo=1")
    with pytest.raises(UsageError, match=r"typo is no configuration key"):
        parsed(*auto, "+typo=1")
    with pytest.raises(UsageError, match=r"distill\.step is no configuration key; did you mean distill\.steps\?"):
        parsed(*auto, "+distill.step=1")
    assert parsed(*auto, "+model.sampling.scheduler.shift=3").model.sampling.scheduler == {"shift": 3}


@pytest.mark.parametrize("override", ["recipe=papr", "recipe=null", "recipe=", "sampling=null"])
def test_a_group_needs_one_of_its_choices(override):
    with pytest.raises(UsageError, match=rf"^{override} is unknown; conf/\w+ has "):
        check_choices([override])


def test_a_loss_without_weight_is_as_if_it_were_not_named(auto):
    assert parsed(*auto, "distill.losses.relative=0").distill.losses == {"relative_per_token": 1.0}
    for weight in ("nan", "inf"):
        with pytest.raises(UsageError, match=r"distill\.losses\.relative=\w+ must be a finite number"):
            parsed(*auto, f"distill.losses.relative={weight}")


def test_without_students_the_default_variants_need_none(auto):
    """They are chosen when they are drawn."""
    config = parsed(*auto, "distill=none", "stages=[generate]", "intervals.transformer_blocks=[[1,2]]")
    assert config.distill.mode == "none"
    assert config.generate.variants is None


# Defaults that depend on the model and the data


def test_settings_come_with_the_models_size(auto):
    small, large = parsed(*auto), parsed("model=qwen_image", "data=shapes")
    assert (small.distill.steps, small.finetune.relative_update, small.finetune.optimizer) == (400, 0.01, "muon")
    assert (large.distill.steps, large.finetune.lr, large.finetune.optimizer) == (6000, 1e-5, "adamw")
    assert parsed("model=qwen_image", "data=shapes", "finetune.lora_rank=16").finetune.lr == 1e-4
    assert parsed(*auto, "distill.steps=7").distill.steps == 7
    assert parsed(*auto, "distill=paper").distill.steps == 6000


def test_a_recipe_sets_the_rates_of_students_and_projectors(auto):
    standard, paper, large = (
        parsed(*auto, *more) for more in ([], ["recipe=paper"], ["recipe=paper", "distill=paper"])
    )
    assert (standard.distill.relative_update, standard.distill.lr, standard.width.lr) == (0.1, None, None)
    assert (paper.distill.relative_update, paper.distill.lr, paper.width.lr) == (None, 1e-3, 1e-3)
    assert large.distill.lr == 1e-5
    assert (standard.width.relative_update, paper.width.relative_update) == (0.025, None)
    assert parsed(*auto, "distill.relative_update=0.1").distill.relative_update == 0.1
    own = parsed(*auto, "recipe=paper", "width.relative_update=0.02")
    assert (own.distill.lr, own.width.lr, own.width.relative_update) == (1e-3, None, 0.02)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["distill.lr=0.1"], "distill.lr=0.1 has no effect with distill.relative_update=0.1: leave it"),
        (["width.lr=0.1"], "width.lr=0.1 has no effect with width.relative_update=0.025: leave it"),
        (["recipe=paper", "distill.lr=null"], "distill.lr=null needs distill.relative_update, such as 0.025"),
        (["distill.relative_update=null"], "distill.optimizer=muon needs distill.relative_update, such as 0.025"),
        (["finetune.relative_update=0.1", "finetune.lr=0.1"], "finetune.lr=0.1 has no effect with finetune.rel"),
    ],
)
def test_a_training_has_its_rates_from_one_key(auto, overrides, message):
    assert message in refused([*auto, *overrides])


RECIPES = {
    "standard": ([], ()),
    "paper": (["recipe=paper"], ()),
    "older": (
        ["recipe=paper"],
        ("distill.optimizer", "distill.relative_update", "width.relative_update", "finetune.relative_update"),
    ),
    "between": ([], ("width.relative_update",)),  # projectors had the students' rate
}


@pytest.mark.parametrize(
    ("recorded", "given", "distill", "finetune"),  # rates of students; of fine-tuning: AdamW's, Muon's, relative
    [
        ("standard", [], (None, 0.1), (None, None, 0.01)),
        ("standard", ["recipe=paper"], (1e-3, None), (2e-3, 0.01, None)),
        ("standard", ["recipe=paper", "distill.lr=0.1"], (0.1, None), (2e-3, 0.01, None)),
        ("standard", ["distill=paper", "finetune=paper"], (None, 0.1), (None, None, 0.01)),
        ("standard", ["finetune.relative_update=null"], (None, 0.1), (2e-3, 0.01, None)),
        ("paper", ["recipe=standard"], (None, 0.1), (None, None, 0.01)),
        ("paper", ["distill.relative_update=0.02"], (None, 0.02), (2e-3, 0.01, None)),
        ("between", [], (None, 0.1), (None, None, 0.01)),
        ("between", ["width=tiny"], (None, 0.1), (None, None, 0.01)),
        ("older", [], (1e-3, None), (2e-3, 0.01, None)),
        ("older", ["distill=paper", "finetune=tiny"], (1e-5, None), (2e-3, 0.01, None)),
        ("older", ["recipe=standard"], (None, 0.1), (None, None, 0.01)),
        ("older", ["recipe=standard", "finetune.optimizer=adamw"], (None, 0.1), (2e-3, 0.01, None)),
        (
            "older",
            ["recipe=standard", "finetune.lr=0.1", "finetune.relative_update=null"],
            (None, 0.1),
            (0.1, 0.01, None),
        ),
    ],
)
def test_a_run_keeps_its_recipe(tmp_path, recorded, given, distill, finetune):
    overrides, unknown = RECIPES[recorded]
    record = OmegaConf.structured(parsed("model=tiny_qwen_image", *overrides))
    record = OmegaConf.create(OmegaConf.to_yaml(record))
    for key in unknown:
        group, name = key.split(".")
        del record[group][name]
    OmegaConf.save(record, tmp_path / "config.yaml")
    command = [f"run={tmp_path}", *given]
    config = parse(continued(compose_command(command)[0], command))
    assert (config.distill.lr, config.distill.relative_update) == distill
    assert config.width.lr == (None if distill[1] else 1e-3)
    of_width = "recipe=standard" in given or (recorded == "standard" and "recipe=paper" not in given)
    assert config.width.relative_update == (0.025 if of_width else None)
    assert (config.finetune.lr, config.finetune.muon_lr, config.finetune.relative_update) == finetune
    paper = "recipe=paper" in given or (recorded in ("paper", "older") and "recipe=standard" not in given)
    assert config.distill.losses == ({"direction": 1.0} if paper else {"relative_per_token": 1.0})


def test_sampling_and_dtype_come_with_the_pipeline_folder(auto, pipeline_folder, tmp_path):
    toy = parsed(*auto).model
    assert (toy.dtype, toy.sampling.height, toy.sampling.num_inference_steps) == ("float32", 32, 20)
    shutil.copytree(pipeline_folder, tmp_path / "real")
    index = tmp_path / "real" / "model_index.json"
    index.write_text(index.read_text().replace("AutoencoderPixelUnshuffle", "AutoencoderKLQwenImage"))
    weights = next((tmp_path / "real" / "transformer").glob("*.safetensors"))
    save_file({name: value.bfloat16() for name, value in load_file(weights).items()}, weights)
    real = parsed("model=auto", f"model.path={tmp_path / 'real'}").model
    assert (real.dtype, real.sampling.height, real.sampling.true_cfg_scale) == ("bfloat16", 1328, 4.0)
    assert "needs pictures with captions: give data.path" in refused(
        ["model=auto", f"model.path={tmp_path / 'real'}", "stages=[probe]"]
    )


def test_data_is_known_by_its_path(auto, tmp_path):
    assert parsed(*auto).data.name == "shapes"
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a circle\n")
    found = parsed(*auto, f"data.path={tmp_path}").data
    assert (found.name, found.shift) == ("folder", 3.0)
    (tmp_path / "00000.tar").touch()
    assert parsed(*auto, f"data.path={tmp_path}").data.name == "webdataset"
    assert parsed(*auto, f'data.path="{tmp_path}/shards-{{000..099}}.tar"').data.name == "webdataset"
    table = tmp_path / "table.jsonl"
    for keys, name in {("image", "text"): "folder", ("image", "prompt_embeds"): "prompts"}.items():
        table.write_text(json.dumps(dict.fromkeys(keys, "a")))
        assert parsed(*auto, f"data.path={table}").data.name == name


@pytest.mark.parametrize(
    ("model", "expected"),
    [("tiny_qwen_image", (60, 8)), ("qwen_image", (1, 1)), ("qwen_image_edit", (2, 2)), ("flux_dev", (2, 2))],
)
def test_as_many_pictures_at_once_as_have_two_million_pixels(model, expected):
    raw, _ = compose_command([f"model={model}", "data.path=PICTURES"])
    assert (raw.generate.batch_size, raw.data.encode_batch_size) == expected
