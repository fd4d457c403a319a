"""docs/troubleshooting.md is searched by the words of a message: those of ours must be what the code says."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/troubleshooting.md").read_text()
QUOTED = [said for bold in re.findall(r"\*\*(.*?)\*\*", PAGE, re.S) for said in re.findall(r"`([^`]+)`", bold)]
OF_OTHERS = {  # torch's, NeMo's, Megatron's, the hub's, Slurm's, the kernel's
    "UnicodeDecodeError", "UnicodeEncodeError",
    "403 Client Error", "401 Client Error", "Invalid username or password", "GatedRepoError",
    "Invalid credentials in Authorization header", "fine-grained token",
    "There is no ds/ja_text_document.idx", "Could not find data-idx or data-bin files at the prefix",
    "Key 'validation_data_prefix' is not in struct", "ConfigAttributeError", "rope_scaling",
    "Token indices sequence length is longer than the specified maximum sequence length",
    "found NaN in local grad norm", "CUDA out of memory", "torch.OutOfMemoryError", "Killed", "oom-kill", "Bus error",
    "unable to open shared memory object", "No space left on device",
    "NVTE_FLASH_ATTN set to 0, but expected 1 for attention backend type auto",
    "apply_rope_fusion is not available. Please install TE", "Transformer Engine",
    "CUDA driver version is insufficient", "no kernel image is available", "NCCL error", "Timeout at NCCL",
    "unhandled system error", "libcuda.so", "from nemo.collections import llm",
    "megatron.core.utils ... end of life", "The pynvml package is deprecated",
    "STOPPED", "Invalid account or account/partition combination", "Requested node configuration is not available",
    "Dataset scripts are no longer supported", "Couldn't reach",
    "Failed to establish a new connection", "wandb: ERROR", "api_key not configured",
}  # fmt: skip


@pytest.fixture(scope="module")
def said() -> list[str]:
    """Every string of the code, as far as it is written out."""
    files = [path for folder in ("nemo_cpt", "executors", "recipes") for path in (ROOT / folder).rglob("*.py")]
    nodes = (node for path in files for node in ast.walk(ast.parse(path.read_text())))
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


@pytest.mark.parametrize("words", sorted(set(QUOTED) - OF_OTHERS))
def test_what_the_page_quotes_is_what_the_code_says(words: str, said: list[str]) -> None:
    assert any(words in text for text in said)


def test_it_has_the_thirty_and_no_list_of_others_that_it_does_not_quote() -> None:
    assert len(QUOTED) > 50
    assert set(QUOTED) >= OF_OTHERS
