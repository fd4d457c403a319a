"""Every test that docs/guarantees.md names is there."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "guarantees.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("cell", re.findall(r"\| ((?:`[^`|]+`(?:, )?)+) \|$", PAGE, re.MULTILINE))
def test_the_page_names_tests_that_are_there(cell: str) -> None:
    file = ""
    for name in re.findall(r"`([^`]+)`", cell):
        path, _, function = name.partition("::")
        file = path or file  # `::test_name` is one more of the file before it
        text = (TESTS / file).read_text(encoding="utf-8")
        assert f"def {function}" in text or not function, name
