"""Which implementation of an operator runs: one rule for all of them."""

from collections.abc import Callable

BACKENDS = ("auto", "eager", "fused", "naive")


def resolve(op: str, implementations: dict[str, Callable], backend: str) -> str:
    """The key of `implementations` that `backend` means for `op`.

    `auto` takes the fastest implementation that runs here; every other name means itself.

    Raises:
        ValueError: an unknown name, or an implementation that this operator does not have.
    """
    if backend not in BACKENDS:
        raise ValueError(f"ops.backend must be one of {', '.join(BACKENDS)}; got {backend!r}.")
    name = next(name for name in ("fused", "eager", "naive") if name in implementations) if backend == "auto" else backend
    if name not in implementations:
        raise ValueError(
            f"ops.backend={backend}: {op} has no {name} implementation in this version of hybridlm, "
            f"only {', '.join(implementations)}. Use ops.backend=auto."
        )
    return name
