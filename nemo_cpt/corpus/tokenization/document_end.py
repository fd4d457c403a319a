"""The token that ends documents: the tokenizer's EOS, if the model that lies beside it ends texts with it too."""

from pathlib import Path
from typing import Any

from nemo_cpt.corpus.tokenization.tokenizer import Tokenizer
from nemo_cpt.corpus.tokenization.tokenizer_files import read_object
from nemo_cpt.errors import CptError

MODEL_FILES = ("config.json", "generation_config.json")


def end_of_document(tokenizer: Tokenizer, token: str | None) -> int:
    """Return the id of the token that ends documents: that named, or the tokenizer's EOS.

    Raises:
        CptError: There is no such token; or none was named, and the model's config.json and generation_config.json
            beside the tokenizer name other ends than its EOS.
    """
    if token is not None:
        return tokenizer.id_of(token)
    if tokenizer.eos is None:
        raise CptError(f"{tokenizer.name} has no EOS token: name one with eod_token, or use append_eod=False.")
    text, number = tokenizer.eos
    # <|end_of_text|>.
    if (ends := _ends_of_model(tokenizer)) and number not in ends:
        others = ", ".join(f"{name} ({end})" for end, name in ends.items())
        raise CptError(
            f"The EOS of {tokenizer.name} is {text} ({number}), but the model beside it ends texts with {others}, as "
            f"{' and '.join(MODEL_FILES)} say: it would learn another end than the one that stops it. Name the "
            "token that shall end documents with eod_token= (--eod-token), or correct the files."
        )
    return number


def end_warnings(tokenizer: Tokenizer, eod: int | None, named: bool) -> list[str]:
    """Return what the user should know about the end of documents.

    Args:
        tokenizer: The tokenizer.
        eod: Id of the token that ends documents, None for none.
        named: Whether the user named it.
    """
    warnings = []
    bos = tokenizer.bos
    # GPT-2's kind, where one token is both; for others it is a slip of the configuration.
    if bos and bos[1] == eod and not named and eod not in _ends_of_model(tokenizer):
        warnings.append(
            f"Documents end with {bos[0]}, which also begins texts, and no config.json beside the tokenizer says that "
            "the model ends with it. If it does not, name the right token with eod_token= (--eod-token)."
        )
    if tokenizer.pad and tokenizer.pad[1] == eod:
        warnings.append(
            f"{tokenizer.pad[0]} ends documents and is the padding token. The recipes here train on it; without them, "
            "NeMo's and Megatron's data modules overwrite it with token 0 and leave it out of the loss."
        )
    return warnings


def _ends_of_model(tokenizer: Tokenizer) -> dict[int, str]:
    """Return the tokens with which the model beside the tokenizer ends texts, by id; none where no file says."""
    stated: list[Any] = []
    for name in MODEL_FILES:
        config = read_object(Path(tokenizer.folder) / name)
        parts = [config, *(part for part in config.values() if isinstance(part, dict))]  # as text_config
        stated += [part["eos_token_id"] for part in parts if "eos_token_id" in part]
    ids = [end for value in stated for end in (value if isinstance(value, list) else [value])]
    names = {number: text for text, number in tokenizer.special.items()}
    # `type`, not isinstance: true is an int in Python, and such files exist.
    return {end: names.get(end, "no special token") for end in ids if type(end) is int}
