"""What recipes and executors there are, by name: read from their source, built, and their workloads remembered."""

from nemo_cpt.catalog.source import (
    Function,
    Parameter,
    assigned,
    check_distinct,
    data_example,
    default_data,
    executor,
    executors,
    function_in,
    functions,
    mixture_of,
    parse,
    parse_value,
    recipe,
    recipes,
    split,
)
from nemo_cpt.errors import nearest

__all__ = [
    "Function",
    "Parameter",
    "assigned",
    "check_distinct",
    "data_example",
    "default_data",
    "executor",
    "executors",
    "function_in",
    "functions",
    "mixture_of",
    "nearest",
    "parse",
    "parse_value",
    "recipe",
    "recipes",
    "split",
]
