"""Any transformer of diffusers with feed-forward networks replaced by linear maps.

The class `PrunedX` is made from diffusers' class X when it is first asked for: `PrunedWanTransformer3DModel` from
`WanTransformer3DModel`. It is called `PrunedTracedX` where a family of ppcl has a `PrunedX` of its own.

An export holds a copy of this file. So `trust_remote_code=True` loads the model where ppcl is not installed.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import diffusers
from diffusers.configuration_utils import register_to_config
from diffusers.models import transformers
from torch import nn


def __getattr__(name: str) -> Any:
    """Return the pruned class of this name; `AttributeError` if diffusers has no such class to make it from."""
    found = re.fullmatch(r"Pruned(?:Traced)?([A-Z]\w+)", name)
    stock = found and getattr(diffusers, found[1], getattr(transformers, found[1], None))
    if not (isinstance(stock, type) and issubclass(stock, diffusers.ModelMixin)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}: diffusers has no such transformer")
    return _pruned(stock, name)


@cache
def _pruned(stock: Any, name: str) -> Any:
    """Return a subclass of `stock` with one more argument, `pruned_feed_forwards`.

    That maps the place of each module that is replaced, such as `blocks.3.ffn`, to the channels that it takes and
    returns.
    """

    def __init__(  # noqa: N807 - of the class that is made below
        self: Any, *args: Any, pruned_feed_forwards: Mapping[str, int] | None = None, **settings: Any
    ) -> None:
        stock.__init__(self, *args, **settings)
        for place, dim in (pruned_feed_forwards or {}).items():
            block, _, module = place.rpartition(".")
            setattr(self.get_submodule(block), module, nn.Linear(dim, dim))

    # diffusers reads from the signature which entries of a config are arguments.
    added = inspect.signature(__init__).parameters["pruned_feed_forwards"]
    own = [item for item in inspect.signature(stock.__init__).parameters.values() if item.kind != item.VAR_KEYWORD]
    __init__.__signature__ = inspect.Signature([*own, added])  # type: ignore[attr-defined]
    module = "ppcl" if __name__.startswith("ppcl.") else __name__  # the name that diffusers writes when it saves it
    what = f"{stock.__name__} with a linear map at each place in `pruned_feed_forwards`."
    return type(stock)(
        name, (stock,), {"__init__": register_to_config(__init__), "__module__": module, "__doc__": what}
    )
