"""Counts that every executor takes."""

from nemo_cpt.errors import CptError


def check_not_negative(executor: str, **counts: int | None) -> None:
    """Refuse counts below 0; None stands for a default.

    Args:
        executor: the function's name, for the message.
        **counts: its arguments.

    Raises:
        CptError: one is below 0.
    """
    for name, count in counts.items():
        if count is not None and count < 0:
            raise CptError(f"{executor}({name}={count}): 0 or more")
