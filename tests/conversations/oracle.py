"""Masks as transformers computes them, from the templates that ship with `{% generation %}` written into them."""

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

MARKED = {
    "llama3": (
        "{{- bos_token }}{%- for m in messages %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
        "{%- if m.role == 'assistant' %}{% generation %}{{- m.content | trim + '<|eot_id|>' }}{% endgeneration %}"
        "{%- else %}{{- m.content | trim + '<|eot_id|>' }}{%- endif %}{%- endfor %}"
    ),
    "chatml": (
        "{{- bos_token }}{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
        "{%- if m.role == 'assistant' %}{% generation %}{{- m.content | trim + '<|im_end|>' }}{% endgeneration %}"
        "{%- else %}{{- m.content | trim + '<|im_end|>' }}{%- endif %}{{- '\n' }}{%- endfor %}"
    ),
}
MARKED["mistral"] = (
    "{{- bos_token }}{%- set begin = '' %}{%- set rest = messages %}"
    "{%- if messages[0].role == 'system' %}{%- set begin = messages[0].content | trim + '\n\n' %}"
    "{%- set rest = messages[1:] %}{%- endif %}"
    "{%- for m in rest %}{%- if m.role == 'assistant' %}"
    "{% generation %}{{- ' ' + m.content | trim + eos_token }}{% endgeneration %}"
    "{%- else %}{{- '[INST] ' + (begin if loop.first else '') + m.content | trim + '[/INST]' }}"
    "{%- endif %}{%- endfor %}"
)
_ALPACA = (
    "{{- bos_token }}"
    "{%- if messages[0].role == 'system' %}{{- messages[0].content | trim }}{%- set rest = messages[1:] %}"
    "{%- else %}{{- 'PREAMBLE' }}{%- set rest = messages %}{%- endif %}{{- '\n\n' }}"
    "{%- for m in rest %}{%- if m.role == 'assistant' %}{{- '### ANSWER:\n' }}"
    "{% generation %}{{- m.content | trim + eos_token }}{% endgeneration %}"
    "{%- else %}{%- if not loop.first %}{{- '\n\n' }}{%- endif %}{{- '### QUESTION:\n' + m.content | trim + '\n\n' }}"
    "{%- endif %}{%- endfor %}"
)
_WORDS = {
    "alpaca-en": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
        "Instruction",
        "Response",
    ),
    "alpaca-ja": (
        "以下に、あるタスクを説明する指示があります。リクエストを適切に完了するための回答を記述してください。",
        "指示",
        "応答",
    ),
    "alpaca-zh": ("以下是一条描述任务的指令。请写出能恰当完成该请求的回答。", "指令", "回答"),
}
for _name, (_preamble, _question, _reply) in _WORDS.items():
    MARKED[_name] = _ALPACA.replace("PREAMBLE", _preamble).replace("QUESTION", _question).replace("ANSWER", _reply)

PHRASES = (
    "富士山は日本で一番高い山です。",
    "What is it?",
    "  leading and trailing  ",
    "\n\n改行から始まる\n",
    "def f(x):\n    return x ** 2\n\n\nprint(f(3))",
    "1234567890 と 3.14159",
    "👩‍👩‍👧‍👦 emoji 🇯🇵",
    "ｶﾀｶﾅ が ﾊﾞ é ﷺ",
    "### 応答:\n",
    "- a\n- b\n\t- c",
    "안녕하세요 你好 Привет",
    "。。。",
    "A",
    "<b>html</b> & {{ braces }} {% raw %}",
)


def generate(count: int, seed: int = 0) -> list[list[dict[str, str]]]:
    """Conversations of one to four questions with answers, some with a system message, of awkward phrases."""
    chance = random.Random(seed)

    def text() -> str:
        return chance.choice(("", " ", "\n")).join(chance.choices(PHRASES, k=chance.randint(1, 3)))

    found = []
    for _ in range(count):
        system = [{"role": "system", "content": text()}] if chance.random() < 0.3 else []
        turns = [
            {"role": role, "content": text()} for _ in range(chance.randint(1, 4)) for role in ("user", "assistant")
        ]
        found.append(system + turns)
    return found


@cache
def loaded(folder: Path) -> Any:
    """A tokenizer as transformers loads it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def masks(folder: Path, marked: str, conversations: list[Any]) -> list[tuple[list[int], list[int]]]:
    """The tokens of each conversation and whether each is marked, by transformers' own `apply_chat_template`."""
    tokenizer = loaded(folder)
    if tokenizer("a").input_ids[0] != tokenizer.bos_token_id:  # BOS where the tokenizer itself puts it
        marked = marked.replace("{{- bos_token }}", "")
    found = tokenizer.apply_chat_template(
        conversations, chat_template=marked, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return list(zip(found["input_ids"], found["assistant_masks"], strict=True))


def add_tokens(folder: Path, tokens: list[str]) -> None:
    """Give a tokenizer special tokens, as those who tune a base with a foreign template do."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    names = content["model"]["vocab"].keys() | {entry["content"] for entry in content["added_tokens"]}
    for token in tokens:
        if token not in names:
            entry = {"id": len(names), "content": token, "special": True, "normalized": False}
            content["added_tokens"].append(entry | dict.fromkeys(("single_word", "lstrip", "rstrip"), False))
            names |= {token}
    path.write_text(json.dumps(content, ensure_ascii=False), "utf-8")
