"""A preparation that is killed goes on when it is called again, and tokens and mask are those of an undisturbed one."""

from pathlib import Path

import pytest

import nemo_cpt.corpus
from nemo_cpt.conversations import open_conversations, prepare
from tests.conversations.helpers import pairs, same_sets, write_lines
from tests.support.crashes import killed_at, lines_of

KILLS = 15
CODE = Path(nemo_cpt.corpus.__file__).parent


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    for i in range(3):
        write_lines(folder / f"{i}.jsonl", pairs(1500, start=1500 * i))
    return folder


def run(chats: Path, prefix: Path, tokenizer: Path) -> str:
    # The reference tokenizer: slow enough for kills to find it at work; a checkpoint after every round
    options = {"fast": False, "workers": 2, "chunk_bytes": 20_000, "checkpoint_seconds": 0, "quiet": True}
    return prepare(chats, prefix, tokenizer, template="chatml", **options).prefix


def test_kills_at_any_line(chats: Path, small: Path, tmp_path: Path) -> None:
    expected = run(chats, tmp_path / "expected", small)
    lines = lines_of(lambda: run(chats, tmp_path / "counted", small), CODE)
    kills, finished = 0, 0
    while kills < KILLS:
        target = tmp_path / f"set{finished}"
        line = 1 + lines.count * (kills % 5) // 5 + kills  # a fifth further each time: resumed runs get somewhere
        got_there, _ = killed_at(line, lambda: run(chats, target, small), CODE)  # noqa: B023
        kills += got_there
        if Path(f"{target}_conversations.idx").exists():
            open_conversations(target)
            assert same_sets(f"{target}_conversations", expected)
            finished += 1
    assert same_sets(run(chats, target, small), expected)
    assert not [path.name for path in tmp_path.iterdir() if path.suffix in (".part", ".journal")]
