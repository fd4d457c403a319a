"""What a base's licence asks of models that are made from it, as far as it is known here; no legal advice.

Read in the agreements themselves: Llama 2 (1.b.iii), Meta Llama 3 (1.b.i and iii), Llama 3.1, 3.2, 3.3 and 4 (1.b.i and
iii), Qwen (4.b). Others are kept and named, and whoever publishes reads them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

_META = "Copyright © Meta Platforms, Inc. All Rights Reserved."


@dataclass(frozen=True)
class Licence:
    """A base's licence.

    Attributes:
        id: as the hub names it in a card's `license`.
        name: `license_name`, where the id is "other".
        link: `license_link`, where the id is "other".
        prefix: how the name of a derived model has to begin.
        display: words that have to be shown.
        notice: text of the NOTICE file that goes with the model.
        needs_text: a copy of the licence has to go with the model.
    """

    id: str
    name: str | None = None
    link: str | None = None
    prefix: str = ""
    display: str = ""
    notice: str = ""
    needs_text: bool = False


def _llama(version: str) -> Licence:
    notice = f"Llama {version} is licensed under the Llama {version} Community License, {_META}"
    return Licence(f"llama{version}", None, None, "Llama", "Built with Llama", notice, needs_text=True)


_LLAMA_2 = f"Llama 2 is licensed under the LLAMA 2 Community License, {_META.replace('©', '(c)')}"
_LLAMA_3 = f"Meta Llama 3 is licensed under the Meta Llama 3 Community License, {_META}"
_KNOWN = (
    Licence("llama2", notice=_LLAMA_2, needs_text=True),
    Licence("llama3", None, None, "Llama 3", "Built with Meta Llama 3", _LLAMA_3, needs_text=True),
    *map(_llama, ("3.1", "3.2", "3.3", "4")),
    Licence("other", "qwen", display="Built with Qwen", needs_text=True),
    Licence("other", "qwen-research", display="Built with Qwen", needs_text=True),
)
_TEXTS = (  # the first lines of the agreements
    (r"META LLAMA 3 COMMUNITY LICENSE", "llama3"),
    (r"LLAMA ([0-9.]+) (?:VERSION )?COMMUNITY LICENSE", r"llama\1"),
    (r"QWEN RESEARCH LICENSE", "qwen-research"),
    (r"QWEN LICENSE AGREEMENT", "qwen"),
    (r"APACHE LICENSE\s+VERSION 2\.0", "apache-2.0"),
    (r"MIT LICENSE", "mit"),
)


def licence(id_: str, name: str | None = None, link: str | None = None) -> Licence:
    """A licence by the hub's names, with what it is known to ask."""
    for known in _KNOWN:
        # Licences without an id of the hub's own are "other", and told by their names.
        if known.id == id_ and (known.name is None or known.name == (name or "").lower()):
            return replace(known, name=name, link=link)
    return Licence(id_, name, link)


def licence_of_card(card: Any) -> Licence | None:
    """The licence that a model's card on the hub names, if it does."""
    found = card and card.get("license")
    return licence(str(found), card.get("license_name"), card.get("license_link")) if found else None


def licence_texts(folder: Path) -> list[Path]:
    """The files of a folder that hold a licence."""
    return sorted(path for path in folder.iterdir() if path.is_file() and path.name.upper().startswith("LICEN"))


def licence_of_texts(folder: Path) -> Licence | None:
    """The licence whose text lies in a folder, if it is one that is known by its text."""
    for path in licence_texts(folder):
        # The title stands at the top; further down agreements name each other.
        head = path.read_text(encoding="utf-8", errors="replace")[:4000].upper()
        for pattern, name in _TEXTS:
            if found := re.search(pattern, head):
                known = found.expand(name)
                return licence("other", known, path.name) if known.startswith("qwen") else licence(known)
    return None


def breaches(found: Licence, repo_id: str, folder: Path) -> Iterator[str]:
    """What a licence asks and publishing a folder under a name would not give, in words that say what to do."""
    title = found.name or found.id
    name = repo_id.partition("/")[2]
    # What stands between words does not count: Llama-3-ja begins with "Llama 3".
    if found.prefix and not re.sub(r"[-_ ]", "", name).lower().startswith(re.sub(" ", "", found.prefix).lower()):
        wanted = f"{found.prefix.replace(' ', '-')}-..."
        yield f"the licence {title} asks that the model's name begins with {found.prefix!r}: {wanted}, not {name}"
    if found.needs_text and not licence_texts(folder):
        yield f"the licence {title} asks that its text goes with the model: copy the base's LICENSE into {folder}"
