"""Corpora that are known by name, and where they are."""

from dataclasses import dataclass

_LLM_JP = "https://gitlab.llm-jp.nii.ac.jp/datasets/llm-jp-corpus-v3/-/raw/main/ja/ja_wiki"
_LLM_JP_FILES = [*(f"train_{number}" for number in range(14)), "validation_0"]


@dataclass(frozen=True)
class Corpus:
    """A corpus to fetch.

    Attributes:
        urls: Addresses of its files, `hf:NAME` for a dataset of the Hugging Face hub, or a dump's name.
        note: What to do with it.
    """

    urls: tuple[str, ...]
    note: str


CORPORA = {
    "llm-jp/ja_wiki": Corpus(
        urls=tuple(f"{_LLM_JP}/{name}.jsonl.gz?ref_type=heads" for name in _LLM_JP_FILES),
        note="Japanese Wikipedia of llm-jp-corpus-v3; `train_*.jsonl.gz` to prepare, `validation_0.jsonl.gz` held out.",
    ),
    "wikinews-zhtw": Corpus(
        urls=("hf:erhwenkuo/wikinews-zhtw",),
        note="Wikinews in traditional Chinese; give the folder to prepare.",
    ),
    "wikimedia/enwiki": Corpus(
        urls=("wikipedia:en@latest",),
        note="The English Wikipedia of its latest dump, as JSON lines to prepare; `wikipedia:ja@latest` and so on.",
    ),
}
