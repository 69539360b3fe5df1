"""Faster starts of processes."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def lasting_imports() -> Iterator[None]:
    """Pause the garbage collector while modules are imported, and have it leave alone what they made.

    torch, transformers, Prefect and MLflow make a million objects that stay. Without this, collections that free
    nothing take a quarter of the time to import them, and later ones look at all these objects again.
    """
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()
