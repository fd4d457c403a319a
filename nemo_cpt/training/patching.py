"""How a function of another package is replaced by a patched one."""

import functools
from collections.abc import Callable
from typing import Any


def replace(owner: Any, name: str, patch: Callable[[Callable], Callable]) -> None:
    """Replace `owner.name` by `patch(owner.name)`, once; other patches of it stay in effect.

    The patched function's `unpatched` is what it replaced.
    """
    # By getattr, so that a method inherited from a base class is found; it is set on `owner` alone.
    original = getattr(owner, name)
    # Known by its name: the same patch may be another object when its module was imported twice.
    applied, key = getattr(original, "applied", ()), getattr(patch, "func", patch).__qualname__
    if key in applied:
        return
    patched: Any = functools.wraps(original)(patch(original))
    patched.unpatched, patched.applied = original, (*applied, key)
    setattr(owner, name, staticmethod(patched) if isinstance(vars(owner)[name], staticmethod) else patched)
