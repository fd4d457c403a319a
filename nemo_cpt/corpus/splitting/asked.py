"""What tells a conversation from another: what was asked, whatever was answered."""

from dataclasses import dataclass
from typing import Any

from nemo_cpt.corpus.reading.lines import TextUnder, UnusableError

ASKING = ("user", "human")  # OpenAI's name of the role, and ShareGPT's


@dataclass(frozen=True)
class AskedUnder(TextUnder):
    """Takes the text under a key, or the questions of the messages under it.

    Not the system's words, which are the same in many conversations and would make near duplicates of them all.
    """

    def of_column(self, text: Any) -> str:
        """Return the text that a value of the key's column is, or the questions of its messages."""
        if not isinstance(text, list):
            return super().of_column(text)
        asked = [turn for turn in text if isinstance(turn, dict) and turn.get("role", turn.get("from")) in ASKING]
        texts = [part for turn in asked for part in _texts(turn.get("content", turn.get("value")))]
        if not texts:
            raise UnusableError("not_a_string", f"{self.key!r} is a list without a message of a user's, not a string")
        return "\n".join(texts)


def _texts(content: Any) -> list[str]:
    """The texts of a message: one, or those of its parts."""
    parts = content if isinstance(content, list) else [{"text": content}]
    return [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
