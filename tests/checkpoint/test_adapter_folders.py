"""A folder of peft's adapters is told from a model, wherever one is asked for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_cpt.catalog.matching import recipes_for
from nemo_cpt.checkpoint import export_hf, grow_model, import_hf, merge, verify
from nemo_cpt.errors import CptError
from nemo_cpt.evaluation import evaluate
from nemo_cpt.inference import open_engine
from nemo_cpt.training.preconditions import check_base
from tests.support import small_models as models

TAKERS: dict[str, Callable[[Path, Path, Path], Any]] = {
    "import": lambda adapter, nemo, dest: import_hf(adapter, dest),
    "export": lambda adapter, nemo, dest: export_hf(adapter, dest),
    "merge": lambda adapter, nemo, dest: merge(adapter, dest),
    "verify": lambda adapter, nemo, dest: verify(nemo, adapter),
    "verify, the other way": lambda adapter, nemo, dest: verify(adapter, nemo),
    "grow": lambda adapter, nemo, dest: grow_model(adapter, dest, nemo / "hf"),
    "chat and serve": lambda adapter, nemo, dest: open_engine(adapter),
    "evaluate": lambda adapter, nemo, dest: evaluate(adapter, dest, prompts=["ja"]),
    "run": lambda adapter, nemo, dest: check_base(adapter),
    "recipes --base": lambda adapter, nemo, dest: recipes_for(adapter),
}


@pytest.fixture(scope="module")
def nemo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    import_hf(models.make("smollm2", folder / "hf"), folder / "nemo")
    return folder / "nemo"


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize("base", ["HuggingFaceTB/SmolLM2-135M", None])
def test_it_is_named_with_what_makes_a_model_of_it(taker: str, base: str | None, nemo: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base} if base else []))
    with pytest.raises(CptError, match=rf"adapters for peft .* added to {base or 'their base'}, .*nemo-cpt export CHE"):
        TAKERS[taker](adapter, nemo, tmp_path / "dest")
    assert not (tmp_path / "dest").exists()
