"""Names of runs, and how an override has to be quoted."""

import shlex
from types import SimpleNamespace

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException

from ppcl.command import check_choices
from ppcl.errors import UsageError
from ppcl.paths import check_folder, check_name
from ppcl.sentences import sentence


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("generate.prompt", "it's a cat"),
        ("generate.prompt", "a 'quoted' word"),
        ("generate.prompt", 'a "quoted" word'),
        ("generate.prompt", 'it\'s a "cat"'),
        ("generate.prompt", "a cat (sitting"),
        ("generate.prompt", "a=b"),
        ("name", "\u00e4pfel"),
        ("data.path", "/bilder/sch\u00f6n"),
    ],
)
def test_text_that_cannot_be_read_is_shown_as_it_has_to_be_typed(key, text):
    """What the sentence ends with, typed into a shell, is the text that was meant."""
    parser = OverridesParser.create()
    with pytest.raises(OverrideParseException) as raised:
        parser.parse_overrides([f"{key}={text}"])
    told = sentence(raised.value)
    assert told.startswith(f"{key}={text} cannot be read: ")
    (typed,) = shlex.split(told.partition("those of the shell: ")[2])
    override = parser.parse_override(typed)
    assert (override.key_or_group, override.value()) == (key, text)


def test_a_home_folder_is_written_by_its_variable():
    with pytest.raises(OverrideParseException) as raised:
        OverridesParser.create().parse_overrides(["data.path=~/pictures"])
    assert sentence(raised.value).endswith("write data.path=$HOME/pictures for your home folder.")


def test_a_line_break_stays_within_the_line():
    with pytest.raises(OverrideParseException) as raised:
        OverridesParser.create().parse_overrides(["generate.prompt=a\n(b"])
    assert "\n" not in sentence(raised.value)


@pytest.mark.parametrize("name", ["first", "mine/first", "a b", "v1.2", "\u00e4pfel", "..x", "a/..b"])
def test_a_name_within_the_folder_of_runs_is_taken(name):
    check_name("name", name)


@pytest.mark.parametrize(
    "name", ["", "..", ".", "../x", "a/../../x", "/tmp/x", "a//b", "a/", "~/x", "a\nb", "a\x1b[31m", "a" * 300]
)
def test_a_name_that_leads_elsewhere_is_refused_before_hydra_makes_a_folder(name):
    with pytest.raises(UsageError, match=r"^name=") as raised:
        check_choices([f"name={name}"])
    assert str(raised.value).isprintable()


def test_quotes_and_sweeps_do_not_hide_a_name():
    for override in ("name='../x'", 'name="../x"', "name=first,../x"):
        with pytest.raises(UsageError, match="not within the folder of runs"):
            check_choices([override])
    check_choices(["name=first,second", "name=${model.name}_new"])


@pytest.mark.parametrize("key", ["paths.runs_dir", "paths.cache_dir"])
def test_folders_are_not_empty(key):
    with pytest.raises(UsageError, match=f"^{key}= is no name of a folder"):
        check_choices([f"{key}="])


@pytest.mark.parametrize("name", ["cache", "cache/data"])
def test_a_run_does_not_lie_in_the_cache(name):
    paths = SimpleNamespace(runs_dir="runs", cache_dir="runs/cache")
    with pytest.raises(UsageError, match=f"name={name} is the folder of the cache"):
        check_folder(SimpleNamespace(run=None, name=name, paths=paths))
    check_folder(SimpleNamespace(run=None, name="cached", paths=paths))
