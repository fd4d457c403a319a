"""Whole numbers, rounded."""


def rounded_up(number: int, multiple: int) -> int:
    """The least multiple of `multiple` that is not below `number`."""
    # Floor division rounds down, of a negative number away from 0: no float, exact for any size.
    return -(-number // multiple) * multiple
