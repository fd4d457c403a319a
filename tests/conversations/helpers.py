"""Files of conversations."""

import json
from pathlib import Path
from typing import Any


def write_lines(path: Path, values: list[Any]) -> Path:
    path.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), "utf-8")
    return path


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def pairs(count: int, start: int = 0) -> list[dict[str, str]]:
    return [
        {"query": f"{i}番の質問は何ですか。", "answer": f"{i}番の答えです。" * (1 + i % 7)}
        for i in range(start, start + count)
    ]


def same_sets(one: str | Path, other: str | Path) -> bool:
    """Say whether two sets are equal, byte for byte."""
    return all(
        Path(f"{one}.{end}").read_bytes() == Path(f"{other}.{end}").read_bytes() for end in ("bin", "idx", "mask")
    )
