"""How a model is asked: the chat template that the user names, and what is wrong with the one in its folder."""

from pathlib import Path

from nemo_cpt.checkpoint import tokenizer_ids
from nemo_cpt.checkpoint.architecture import read_json
from nemo_cpt.errors import CptError

# Special tokens that end a turn in the chat templates of Llama 3, ChatML (Qwen, SmolLM), Gemma and Phi.
TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>")


def check_template_choice(choice: str) -> None:
    """Refuse a template that is none, before a checkpoint is exported for it.

    Raises:
        CptError: it is neither the name of one that ships nor a file that can be read.
    """
    from nemo_cpt.conversations.templates import SHIPPED

    if choice in SHIPPED:
        return
    try:
        Path(choice).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CptError(
            f"there is no chat template {choice} ({error}): name one of {', '.join(SHIPPED)}, or a Jinja file"
        ) from None


def template_text(choice: str, folder: Path) -> str:
    """The Jinja text of a template that the user names for a Hugging Face folder.

    Raises:
        CptError: there is no such template, or one that ships cannot be used with the folder's tokenizer.
    """
    from nemo_cpt.conversations.templates import SHIPPED, load_template
    from nemo_cpt.corpus.tokenization.tokenizer import load_tokenizer

    check_template_choice(choice)
    if choice in SHIPPED:
        return load_template(choice, load_tokenizer(folder)).text
    return Path(choice).read_text(encoding="utf-8")


def has_chat_template(folder: Path) -> bool:
    """Whether a Hugging Face folder can be given messages, read without transformers."""
    from nemo_cpt.conversations.templates import own_template

    return own_template(folder) is not None


def end_ids(folder: Path) -> list[int]:
    """The ids that end replies, by generation_config.json, else config.json, as transformers and vLLM read them.

    Raises:
        CptError: a file names something else.
    """
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if path.is_file() and (ids := tokenizer_ids.end_ids(read_json(path), str(path))):
            return sorted(ids)
    return []


def reply_warnings(folder: Path) -> list[str]:
    """What in a Hugging Face folder lets its replies go wrong, in words: a lost chat template, ends that are not its.

    A template or a tokenizer that cannot be examined is passed over: what it is used for refuses it.
    """
    from nemo_cpt.conversations.templates import OWN, load_template
    from nemo_cpt.corpus.tokenization.tokenizer import load_tokenizer

    ends = end_ids(folder)
    if not ends:
        return [f"{folder} names no eos_token_id: nothing but the most tokens of a reply ends one"]
    try:
        tokenizer = load_tokenizer(folder)
        if has_chat_template(folder):
            text, number = load_template(OWN, tokenizer).stop
            of = "answers of its chat template"
        # Base models end texts with another token than chats end turns: these ends are a tuned model's.
        elif lost := [text for text in TURN_ENDS if tokenizer.special.get(text) in ends]:
            return [
                f"{folder} ends replies at {lost[0]}, as chat templates write it, and has no chat template: a tuned "
                "model whose template was lost? Export it again, or name one with --chat-template"
            ]
        elif tokenizer.eos is not None:
            text, number = tokenizer.eos
            of = "texts of its tokenizer"
        else:
            return []
    except CptError:
        return []
    if number in ends:
        return []
    return [
        f"{of} end with {text} ({number}), and eos_token_id in {folder} is {', '.join(map(str, ends))}: transformers "
        f"and vLLM do not end replies there. Add {number} to eos_token_id in generation_config.json, or export again"
    ]
