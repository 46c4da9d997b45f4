"""Methods by the name of their rule."""

from __future__ import annotations

from ppcl.config import MethodConfig
from ppcl.methods.base import Method


def get_method(config: MethodConfig) -> Method:
    """The method that `config.rule` names."""
    from ppcl.methods.cka_sensitivity import CkaSensitivity
    from ppcl.methods.ppcl import Ppcl

    return (CkaSensitivity if config.rule == "cka_sensitivity" else Ppcl)(config)
