"""`experiments.recipes`: rows are found again, cells know their settings, and tables say what the rows say."""

import math

import pytest

from experiments.recipes import chains as chained
from experiments.recipes import report, run
from experiments.recipes.cells import KEYS, RECIPES, TEACHERS, Cell, Sitting, claimed, steps_within
from experiments.recipes.chains import EQUAL, PLANNED, Equal, Planned
from experiments.recipes.table import Table

DIGEST = "0123456789abcdef"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder to work in, for the runs of cells."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def table(tmp_path):
    return Table(tmp_path / "results.csv", run.COLUMNS, KEYS)


def row(recipe="paper", rate=0.001, error=0.02, steps=250, budget="steps", seconds=100.0, seed=10, **more):
    found = {"way": "local", "teacher": "tiny_dit", "digest": DIGEST, "recipe": recipe, "rate": rate, "error": error}
    found |= {"steps": steps, "seed": seed, "budget": budget, "batch_size": 64, "prompts": 60, "shared": "no"}
    return found | {"seconds": seconds, "score": 0.5, "drop_percent": 40.0, "peak_mb": 60.0, "minutes": 3.0} | more


def baseline(way, **more):
    return row("", None, None, 0, seconds=None, seed=None, peak_mb=None, way=way, params_ratio=0.652) | more


def all_rates(best, recipe="paper"):
    return [row(recipe, rate, 0.01 if rate == best else 0.02) for rate in RECIPES[recipe].rates]


def test_a_row_is_found_by_the_values_it_was_written_with(table):
    for rate in (0.0125, 1e-3, 4e-2):
        table.add(row(rate=rate))
    for rate in (0.0125, 1e-3, 4e-2):
        assert table.find(recipe="paper", rate=rate, steps=250)["rate"] == f"{rate:g}"
    assert table.find(rate=0.5) is None
    table.add(baseline("removed"))
    assert table.find(way="removed", rate=None, seed=None)["error"] == ""


def test_a_row_replaces_that_of_the_same_keys_alone(table):
    table.add(row())
    table.add(row(rate=0.01))
    Table(table.path, run.COLUMNS, KEYS).add(row(error=0.03))  # as another process
    table.add(row(digest="another teacher's"))
    assert [(found["rate"], found["error"]) for found in table.rows] == [
        ("0.01", "0.02"), ("0.001", "0.03"), ("0.001", "0.02"),
    ]  # fmt: skip


def test_a_column_that_came_later_is_empty_in_older_rows(table):
    Table(table.path, [name for name in run.COLUMNS if name != "remark"], KEYS).add(row())
    table.add(row(rate=0.01, remark="diverged"))
    assert [found["remark"] for found in table.rows] == ["", "diverged"]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_trained_at_the_rate_of_its_cell(elsewhere, name):
    recipe = RECIPES[name]
    cell = Cell("tiny_dit", "local", name, recipe.rates[-1], 7, 11)
    found = cell.run()
    config = found.config
    assert cell.rate_of(found) == recipe.rates[-1]
    assert (config.distill.steps, config.distill.batch_size, config.data.train_seed) == (7, 64, 11)
    assert [*config.distill.losses] == ["direction" if name in ("paper", "direction-muon") else "relative_per_token"]
    assert config.distill.optimizer == ("muon" if name in ("standard", "direction-muon") else "adamw")
    assert found.folder != Cell("tiny_dit", "local", name, recipe.rates[0], 7, 11).run().folder


def test_the_configured_rate_and_the_same_rate_given_are_one_cell(elsewhere):
    for name in ("standard", "paper"):
        configured = Cell("tiny_dit", "local", name, None, 7, 10)
        rate = configured.rate_of(configured.run())
        assert configured.run().folder == Cell("tiny_dit", "local", name, rate, 7, 10).run().folder


def test_steps_fit_into_the_minutes_by_the_fastest_earlier_step(table):
    keys = row(steps=1000)
    assert steps_within(25, keys, []) == 1000
    table.add(row("standard", seconds=50.0))  # another recipe's
    table.add(row(seconds=1000.0))
    assert steps_within(25, keys, table.rows) == 375
    table.add(row(rate=0.01, seconds=500.0))
    assert steps_within(25, keys, table.rows) == 750


def test_a_budgets_row_is_the_whole_training_if_that_fits(table):
    facts = {"way": "local", "recipe": "paper", "rate": 0.001}
    for seed in (10, 11, 12):
        table.add(row(seed=seed, seconds=500.0))
    assert report.within(table.rows, 5.0, 250, **facts) == []
    table.add(row(seed=11, steps=150, budget="5 min", seconds=300.0))
    assert [found["steps"] for found in report.within(table.rows, 5.0, 250, **facts)] == ["150"]
    table.add(row(seed=10, seconds=200.0))
    found = report.within(table.rows, 5.0, 250, **facts)
    assert [(row["seed"], row["steps"]) for row in found] == [("10", "250"), ("11", "150"), ("12", "250")]


def test_the_best_rate_has_the_least_error_and_is_known_when_all_were_tried(table, elsewhere):
    best, last = RECIPES["paper"].rates[-2:]
    for found in all_rates(best)[:-1]:
        table.add(found)
    assert [*report.compared(table.rows, "tiny_dit", DIGEST, 250)] == ["ours", "the paper's"]
    table.add(row(rate=last, error=math.nan, remark="diverged"))
    assert report.compared(table.rows, "tiny_dit", DIGEST, 250)["the paper's at its best rate"] == ("paper", str(best))
    text = report.rates_table(table.rows, 250)
    assert "| **0.0100 (0.50)** | diverged |" in text
    assert text.count("**") == 2


def test_tables_of_two_teachers_with_one_name_stand_apart(table, elsewhere):
    table.add(baseline("teacher", score=0.9))
    for found in all_rates(0.01):
        table.add(found)
        table.add(found | {"digest": "fedcba9876543210"})
    text = report.rates_table(table.rows, 250)
    assert text.index("fedcba98") < text.index("01234567")  # the newer one first
    local = report.local_table(table.rows, 250, {"short": (250, 5.0), "long": (1000, 25.0)})
    assert "the paper's at its best rate, 0.01 | 250 (steps) | 1 | 0.0100 | 0.500 |" in local
    assert "long" not in local


def test_ratios_of_subsets_are_over_the_ones_both_recipes_have(table, elsewhere, tmp_path):
    for found in all_rates(0.01):
        table.add(found)
    subsets = Table(tmp_path / "subsets.csv", run.SUBSET_COLUMNS, run.SUBSET_KEYS)
    keys = {key: value for key, value in row().items() if key in run.SUBSET_KEYS}
    for number in range(3):
        subsets.add(keys | {"subset": number, "error": 0.01 * (number + 1)})
    for number in range(2):
        subsets.add(keys | {"recipe": "standard", "rate": 0.1, "subset": number, "error": 0.005})
    text = report.subsets_table(table.rows, subsets.rows, 250)
    assert "| ours | 2 | 0.00500 | 0.333 | 2 of 2 |" in text
    assert report.plot_subsets(tmp_path / "subsets.png", table.rows, subsets.rows, 250)
    assert report.plot_rates(tmp_path / "rates.png", table.rows, 250)


def test_random_subsets_are_different_and_the_same_every_time():
    found = run.random_subsets(6, 50)
    assert len(set(found)) == 50
    assert all(map(any, found))
    assert found == run.random_subsets(6, 50)
    assert min(len(teacher.intervals) for teacher in TEACHERS.values()) >= 6


def test_the_readme_has_a_place_for_each_table(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text((run.HERE / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    tables = {name: f"| {name} \\1 |" for name in (*run.GROUPS, "costs", "widths", "noise_levels")}
    for _ in range(2):
        report.fill(readme, tables)
    assert all(readme.read_text(encoding="utf-8").count(text) == 1 for text in tables.values())
    with pytest.raises(ValueError, match="0 places for the table other"):
        report.fill(readme, {"other": ""})


def test_one_process_at_a_time_holds_a_cell(tmp_path):
    with claimed(tmp_path / "cell") as first, claimed(tmp_path / "cell") as second:
        assert (first, second) == (True, False)
    with claimed(tmp_path / "cell") as again:
        assert again


def test_a_measured_cell_is_not_measured_again(elsewhere, table, monkeypatch):
    cell = Cell("tiny_dit", "local", "standard", 0.05, 3, 10)
    sitting = Sitting(table, prompts=1, shared=True)
    measured = sitting.row(cell)
    assert [found["way"] for found in table.rows] == ["teacher", "local"]
    assert 0 < float(measured["error"]) < 0.1
    assert float(measured["params_ratio"]) == pytest.approx(0.652, abs=1e-3)
    assert float(measured["peak_mb"]) > 10
    monkeypatch.setattr(Sitting, "_figures", lambda *_: pytest.fail("measured again"))
    assert sitting.row(cell) == measured
    assert sitting.row(cell, minutes=5.0) == measured


def chain_row(entry, score=0.5, peak_mb=60.0, error=0.01, group="equal", budget="5 min", **more):
    found = {"group": group, "entry": entry, "teacher": "tiny_dit", "digest": DIGEST, "batch_size": 64, "seed": 10}
    found |= {"budget": budget, "prompts": 60, "rate": 0.05, "error": error, "score": score, "peak_mb": peak_mb}
    found |= {"drop_percent": 100 - 100 * score, "seconds": 300.0, "depth_steps": 600, "depth_seconds": 300.0}
    return found | {"categories": "one=0.5 two=0.5"} | more


@pytest.fixture
def chains(tmp_path):
    return Table(tmp_path / "chains.csv", chained.COLUMNS, chained.KEYS)


@pytest.mark.parametrize("name", EQUAL)
def test_every_chain_trains_as_its_entry_says(elsewhere, name):
    entry = EQUAL[name]
    chain = Equal(name, "tiny_dit", 11, 5.0, 0.02 if entry.best_rate else None)
    config = chain.run(depth=7, finetune=5).config
    distill, finetune = config.distill, config.finetune
    assert distill.mode == {"local": "parallel", "sequential": "sequential", "removed": "none"}[entry.way]
    assert config.data.train_seed == 11
    if entry.share:
        assert (distill.steps, distill.batch_size) == (7, 64)
        assert distill.optimizer == ("muon" if entry.recipe == "standard" else "adamw")
    if entry.best_rate:
        assert distill.lr == 0.02
    if entry.tuning:
        assert (finetune.steps, finetune.batch_size) == (5, 64)
        assert finetune.lora_rank == (8 if name == "local-lora" else 0)
        assert (finetune.feature_weight == 0) == (name == "output")
        assert finetune.optimizer == ("adamw" if name == "local-lora" else "muon")


def test_students_of_equal_are_those_of_local(elsewhere):
    cell = Equal("local-tuned", "tiny_dit", 10, 5.0).cell(7)
    assert cell.run().folder == Cell("tiny_dit", "local", "standard", None, 7, 10).run().folder


def test_a_chains_folder_does_not_depend_on_its_steps_but_on_its_settings(elsewhere):
    chain = Equal("paper", "tiny_dit", 10, 5.0)
    assert chain.run(depth=7).folder == chain.run(depth=9).folder
    others = [Equal("paper", "tiny_dit", 10, 25.0), Equal("paper", "tiny_dit", 11, 5.0)]
    others += [Equal("paper", "tiny_dit", 10, 5.0, 0.02), Equal("local", "tiny_dit", 10, 5.0)]
    assert len({one.run().folder for one in [chain, *others]}) == 5


@pytest.mark.parametrize("name", run.HALF)
def test_half_has_the_demos_settings_and_the_cells_students(elsewhere, name):
    demo = Planned(name, "tiny_qwen_image", 10, None)
    config = demo.run().config
    assert config.budget.params == 0.5
    theirs = demo.cell(config.distill.steps).run()
    assert chained.identity(theirs.config.distill) == chained.identity(config.distill)
    assert theirs.intervals == demo.run().intervals
    long = Planned(name, "tiny_qwen_image", 10, 25.0, steps=1000).run(finetune=3).config
    assert (long.distill.steps, long.finetune.steps, long.width.steps) == (1000, 3, config.width.steps)
    small = Planned(name, "tiny_qwen_image", 10, None, scale=0.01)
    assert small.budget == "demo scaled"
    assert small.run().config.finetune.steps < config.finetune.steps


@pytest.mark.parametrize("name", ["ours", "paper", "paper-best"])
def test_planned_has_the_cells_students_and_no_tuning(elsewhere, name):
    rate = 0.02 if PLANNED[name].best_rate else None
    chain = Planned(name, "tiny_qwen_image", 10, None, rate, params=0.655, steps=250, is_tuned=False)
    own, cell = chain.run(), chain.cell(250).run()
    assert (chain.group, chain.budget, own.config.budget.params) == ("planned", "250 steps", 0.655)
    assert "finetune" not in own.config.stages
    assert chained.identity(own.config.distill) == chained.identity(cell.config.distill)
    assert own.intervals == cell.intervals
    assert rate is None or own.config.distill.lr == rate


def test_known_seconds_are_those_of_trainings_with_the_same_steps(table, chains):
    table.add(row(seconds=125.0))
    table.add(row("standard", seconds=50.0))
    chains.add(chain_row("paper-best", depth_seconds=240.0))
    chains.add(chain_row("sequential-paper", depth_seconds=60.0))
    chains.add(chain_row("output", depth_seconds=None, depth_steps=None, finetune_steps=100, finetune_seconds=80.0))
    known = [table.rows, chains.rows]
    assert chained.known_seconds(*known, Equal("paper", "tiny_dit", 12, 25.0), DIGEST, "depth") == [0.4, 0.5]
    assert chained.known_seconds(*known, Equal("paper", "tiny_dit", 12, 25.0), "another", "depth") == []
    assert chained.known_seconds(*known, Equal("output", "tiny_dit", 12, 25.0), DIGEST, "finetune") == [0.8]
    assert chained.known_seconds(*known, Equal("removal-tuned", "tiny_dit", 12, 25.0), DIGEST, "finetune") == []


def test_the_tables_of_equal_say_who_wins_and_what_fits(table, chains, elsewhere, tmp_path):
    table.add(baseline("teacher", score=0.9))
    chains.add(chain_row("local", 0.60, 60.0, 0.004))
    chains.add(chain_row("removal-tuned", 0.80, 150.0, 0.003))
    chains.add(chain_row("paper", 0.30, 57.0, 0.02, seconds=200.0))
    diverged = {"score": None, "drop_percent": None, "error": math.nan, "remark": "diverged"}
    chains.add(chain_row("sequential") | diverged)
    budgets = {"short": 5.0, "long": 25.0}
    text = report.equal_tables(table.rows, chains.rows, budgets)
    assert "| removal + tuning | 1 | 600 | 300 | 150.0 | **0.00300** | **0.800** | **20.0** |" in text
    assert "| the paper's recipe, local only | 1 | 600 | 200 | **57.0** | 0.0200 |" in text
    assert "| short | removal + tuning | 2.50 | does not fit | - | - |" in text
    assert "| short | ours, local only | 1.00 | **0.00400** | **0.600** | **40.0** |" in text
    assert "sequential, our recipe (diverged)" in text
    assert "**removal + tuning** has the highest score (0.800) and the least error (0.00300): ours does not win" in text
    assert "The winner takes 2.50 times the peak" in text
    assert "of ours, local only **ours, local only** has the highest score (0.600)" in text
    assert "off the time: the paper's recipe, local only." in text
    assert "Long" not in text
    assert report.plot_equal(tmp_path / "equal.png", table.rows, chains.rows, budgets)


def test_scores_within_the_noise_are_named(chains):
    for name, score in (("local", 0.60), ("local-tuned", 0.63), ("paper", 0.30)):
        chains.add(chain_row(name, score))
    found = report.entries(chains.rows, "tiny_dit", DIGEST, 5.0)
    assert report.level(found, "local-tuned") == ["ours, local only"]


def test_the_table_of_half_has_the_minutes_of_each_part(chains):
    assert report.half_table([]) == ""
    more = {"width_steps": 30, "width_seconds": 30.0, "finetune_steps": 250, "finetune_seconds": 240.0}
    chains.add(chain_row("ours", group="half", budget="demo", error_before=0.02, **more))
    assert "| ours | demo | 1 | 600/30/250 | 5.0 | 0.5 | 4.0 | 5.0 | 60.0 | 0.0200 | 0.0100 |" in report.half_table(
        chains.rows
    )


def test_the_table_of_planned_has_the_students_alone_of_the_same_seeds(table, chains):
    assert report.planned_table([], []) == ""
    for seed in (10, 11):
        table.add(row("standard", 0.05, score=0.5 + seed / 100, steps=250, seed=seed, blocks=13))
    more = {"depth_steps": 250, "blocks": 15, "params_ratio": 0.65}
    chains.add(chain_row("ours", 0.8, group="planned", budget="250 steps", **more))
    text = report.planned_table(table.rows, chains.rows)
    assert "| students | 1 | 13 |" in text
    assert "| students and projectors | 1 | 15 | 0.650 | 0.0100 | 0.800 | 20.0 |" in text


def test_the_least_error_of_each_width_is_bold(tmp_path):
    assert set(report.neighbours(tmp_path).values()) == {""}
    columns = ("what", "channels", "steps", "relative_update", "rms", "before", "after")
    widths = Table(tmp_path / "widths.csv", columns, columns[:4])
    for channels in (64, 128):
        for rate, after in ((0.05, 0.1), (0.1, 0.2)):
            widths.add({"what": "trained", "channels": channels, "steps": 5, "relative_update": rate, "after": after}
                       | {"rms": 0.3, "before": 1.0})  # fmt: skip
    assert report.neighbours(tmp_path)["widths"].count("**0.100**") == 2


def test_a_chain_that_was_stopped_goes_on_with_the_steps_it_began_with(elsewhere, table, chains):
    chain = Equal("local-tuned", "tiny_dit", 10, 5.0)
    decided = {"depth": 123, "finetune": 45}
    chained.write_json(chain.run().folder / "steps.json", decided)
    assert chained.Chains(Sitting(table, prompts=1, shared=True), chains)._steps(chain) == decided


def test_an_entry_that_the_chosen_group_does_not_have_is_refused(capsys):
    with pytest.raises(SystemExit):
        run.main(["--only", "half", "--entry", "local"])
    assert "local is not in half" in capsys.readouterr().err
