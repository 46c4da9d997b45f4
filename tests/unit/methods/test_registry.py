"""Methods are found by their files, with settings of their own."""

import sys
from textwrap import dedent

import pytest

import ppcl.methods
from ppcl.config import MethodConfig
from ppcl.errors import UsageError
from ppcl.methods.registry import load_method, method_names
from ppcl.options import identity

NEW = """
from dataclasses import dataclass

from ppcl.methods.base import Detection, Method


@dataclass
class Settings:
    depth: int = 2


class EveryOther(Method):
    settings_class = Settings

    def detect(self, teacher):
        return Detection({"blocks": [(0, self.settings.depth)]})
"""


@pytest.fixture
def new_method(tmp_path, monkeypatch):
    (tmp_path / "every_other.py").write_text(dedent(NEW))
    monkeypatch.setattr(ppcl.methods, "__path__", [*ppcl.methods.__path__, str(tmp_path)])
    yield
    sys.modules.pop("ppcl.methods.every_other", None)


def test_a_file_is_all_that_a_method_takes(new_method):
    assert {"cka_sensitivity", "every_other", "lp", "shortgpt", "tinyfusion"} < {*method_names()}
    assert not {"removal", "windows", "patterns", "base"} & {*method_names()}
    method = load_method(MethodConfig(rule="every_other", settings={"depth": 5}))
    assert method.detect(None).intervals == {"blocks": [(0, 5)]}


def test_settings_that_mean_nothing_to_it_are_refused(new_method):
    with pytest.raises(UsageError, match=r"^method\.settings\.deph is not a setting here; there are depth\."):
        load_method(MethodConfig(rule="every_other", settings={"deph": 5}))
    with pytest.raises(UsageError, match=r"^method\.settings\.depth: "):
        load_method(MethodConfig(rule="every_other", settings={"depth": "far"}))
    with pytest.raises(UsageError, match=r"^method\.settings\.depth is not a setting here; there are none\."):
        load_method(MethodConfig(rule="lp", settings={"depth": 5}))


def test_settings_are_part_of_a_plans_identity_where_there_are_some():
    assert "settings" not in identity(MethodConfig())
    assert identity(MethodConfig(settings={"depth": 5}))["settings"] == {"depth": 5}
