"""Real documents: the demo's Japanese and English, and prose in Chinese and Korean."""

import json
from importlib.resources import files
from pathlib import Path

import pytest

CHINESE = (
    "城里的图书馆是三十年前建的，当时附近还是一片农田。现在周围有学校、医院和两条地铁线，"
    "每天来看书的人比以前多了好几倍。"
    "馆长说，最受欢迎的是儿童阅览室，周末常常找不到座位。为了解决这个问题，去年他们把二楼的仓库改成了新的阅览室，"
    "还请了附近大学的学生来给孩子们讲故事。\n\n"
    "老人们则喜欢一楼靠窗的位置。他们早上带着茶来，读完报纸以后，会在院子里下棋。有一位退休的教师告诉我，"
    "他在这里认识了很多朋友，也学会了用电脑写信给住在国外的女儿。今年春天，图书馆打算在屋顶上种花，"
    "让读者可以一边晒太阳一边看书。大家都期待着那一天早点到来。"
)
KOREAN = (
    "작은 마을의 기차역은 오랫동안 사람들이 만나고 헤어지는 곳이었다. "
    "아침마다 학생들이 책가방을 메고 기차를 기다렸고, "
    "시장에 가는 할머니들은 보따리를 옆에 두고 이야기를 나누었다. "
    "지금은 하루에 네 번만 기차가 서지만 역 앞의 은행나무는 "
    "예전 모습 그대로 서 있다.\n\n"
    "지난해부터 마을 사람들은 비어 있던 대합실을 작은 도서관으로 바꾸기 시작했다. 집에 있던 책을 한 권씩 가져오고, "
    "목수였던 어르신이 책장을 만들었다. 주말이면 아이들이 모여 그림책을 읽고, "
    "저녁에는 어른들이 차를 마시며 마을의 역사를 "
    "이야기한다. 도시로 떠난 사람들도 고향에 올 때마다 이곳에 들러 책을 한 권 두고 간다. "
    "역장은 언젠가 기차가 다시 많이 "
    "서게 되기를 바란다고 말했다. 그날이 오면 도서관의 문도 더 일찍 열게 될 것이다."
)


def demo(language: str) -> list[str]:
    lines = (files("nemo_cpt.demo") / "corpus" / f"{language}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


@pytest.fixture(scope="session")
def japanese() -> list[str]:
    """Documents of some 600 characters: the demo's are shorter than a web page that is worth keeping."""
    texts = demo("ja")
    return ["\n\n".join(texts[start : start + 3]) for start in range(0, len(texts) - 2, 3)]


@pytest.fixture(scope="session")
def english() -> list[str]:
    return demo("en")


@pytest.fixture
def corpus(tmp_path: Path, japanese: list[str]) -> Path:
    """JSON lines with ids and other fields."""
    path = tmp_path / "ja.jsonl"
    lines = (json.dumps({"id": f"d{number}", "text": text, "n": 10**30}) for number, text in enumerate(japanese))
    path.write_text("".join(line + "\n" for line in lines), "utf-8")
    return path
