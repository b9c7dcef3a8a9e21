"""What stands in for a module's forward: a `functools.partial` of a function of this package, as an attribute.

It can be found, copied with its module, and taken out again; the class's own forward is behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import nn

_PACKAGE = __name__.split(".")[0]


def stand_in(module: Any, function: Callable) -> partial | None:
    """The partial of `function` that stands in for a module's forward, if it is one."""
    forward = vars(module).get("forward") if isinstance(module, nn.Module) else None
    return forward if isinstance(forward, partial) and forward.func is function else None


def take_out(modules: Iterable[nn.Module], function: Callable) -> None:
    """Give the modules for which a partial of `function` stands in their own forward back."""
    for module in modules:
        if stand_in(module, function) is not None:
            del module.forward


def keeps_forward(module: nn.Module) -> bool:
    """Whether a module computes what its class says: by its own forward, or by a kernel of this package."""
    forward = vars(module).get("forward")
    return forward is None or (isinstance(forward, partial) and forward.func.__module__.split(".")[0] == _PACKAGE)


def is_hooked(module: nn.Module) -> bool:
    """Whether forward hooks see what goes in or out, or somebody gave it a forward of its own."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or not keeps_forward(module)
