"""Llama-3.1's own tokenizer, grown: its special tokens stand beside the model's vocabulary, and are easily lost."""

from pathlib import Path

from nemo_cpt.corpus.tokenization.tokenizer import FastEncoder, load_tokenizer
from nemo_cpt.vocabulary import grow
from tests.support.tokenizers import llama31
from tests.vocabulary.conftest import CORPUS, texts


def test_it_grows_behind_its_special_tokens(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    base = llama31(tmp_path / "base")
    report = grow(str(base), str(CORPUS / "ja.jsonl"), tmp_path / "grown", tokens=100, min_count=2)
    assert (report.first_id, report.vocabulary_size, report.tokens) == (128_256, 128_384, 128)
    old, new = load_tokenizer(str(base)), load_tokenizer(str(tmp_path / "grown"))
    assert new.special == old.special
    assert new.special["<|eot_id|>"] == 128_009
    documents = [*texts("en"), *texts("ja"), "京都<|eot_id|>です<|start_header_id|>"]
    before, after = (each.reference_encoder().encode(documents)[0].tolist() for each in (old, new))
    english = [each.reference_encoder().encode(texts("en"))[0].tolist() for each in (old, new)]
    assert english[0] == english[1]
    assert len(after) < len(before)
    assert new.reference_encoder().decode(after) == "".join(documents)
    assert new.definition is not None
    assert FastEncoder(new.definition, False).encode(documents)[0].tolist() == after
