"""Exports on the hub: what is sent, what the card says, what is refused; against the hub's protocol on this machine."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from nemo_cpt.checkpoint import export_hf, import_hf
from nemo_cpt.checkpoint.download_record import DownloadRecord
from nemo_cpt.checkpoint.provenance import BEFORE, Provenance, read_provenance, write_provenance
from nemo_cpt.errors import CptError
from nemo_cpt.publishing import push
from nemo_cpt.publishing.card import Subject, model_card
from nemo_cpt.publishing.licences import Licence
from tests.support import small_models as models
from tests.support.upload_hub import TOKEN, UploadHub, upload_hub

BASE, COMMIT, REPO = "meta-llama/Llama-3.1-8B", "a" * 40, "me/Llama-3.1-8B-ja"
PRETRAINING = {
    "step": 300,
    "settings": {
        "schedule": {"max_steps": 300, "lr": 1e-5, "lr_scheduler": "CosineAnnealingScheduler"},
        "data": {"global_batch_size": 512, "seq_length": 8192, "train": [[0.25, "en:aa"], [0.75, "ja:bb"]]},
        "adapters": {"peft": None},
        "layout": {"precision": "bf16-mixed"},
    },
    "template": None,
    "launched": {
        "recipe": "llama31_8b.continual_pretrain",
        "arguments": {"base": "/secret/place/base", "lr": 1e-5, "run_on": "/secret/place", "model": "base"},
        "fields": [],
    },
    "versions": {"nemo_cpt": "0.1.0", "torch": "2.13.0"},
    "losses": [{"step": 0, "ja": 2.5, "en": 1.875}, {"step": 300, "ja": 1.75, "en": 1.9}],
    "validated_on": {"sets": {"ja": "/secret/place/ds/ja_validation"}},
}
TUNING = {
    **PRETRAINING,
    "step": 40,
    "launched": {},
    "settings": PRETRAINING["settings"]
    | {
        "adapters": {"peft": "LoRA", "dim": 16},
        "data": {"global_batch_size": 8, "seq_length": 4096, "too_long": "drop", "train": [[1.0, "ja_chats:cc"]]},
    },
    BEFORE: [PRETRAINING],
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an export makes of a training's checkpoint, the base having been downloaded."""
    folder = tmp_path_factory.mktemp("exported")
    models.make("llama31", folder / "hf")
    (folder / "hf" / "LICENSE").write_text("LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\nLlama 3.1 Version Release Date: ...")
    DownloadRecord(BASE, COMMIT, {}).write(folder / "hf")
    import_hf(folder / "hf", folder / "base")
    (folder / "base" / "run.json").write_text(json.dumps(TUNING))
    export_hf(folder / "base", folder / "out", shard_bytes=60_000)
    return folder / "out"


@pytest.fixture
def out(exported: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(exported, tmp_path / "out"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # other tests go offline in this process
    with upload_hub() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        yield server


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "nemo_cpt.cli", "push", *map(str, arguments)]


def environ(hub: UploadHub) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"} | {"HF_ENDPOINT": hub.url}


def metadata(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_an_export_becomes_a_private_repository_in_one_commit(exported: Path, hub: UploadHub) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in exported.iterdir()}
    report = push(exported, REPO)
    assert hub.private == {REPO: True}
    assert hub.commits == [REPO]
    assert report.url == f"{hub.url}/{REPO}/commit/{'d' * 40}"
    files = hub.repositories[REPO]
    sent = {path.name for path in exported.iterdir() if path.name[0] != "."}
    assert set(files) == sent | {"README.md", "NOTICE", ".gitattributes"}
    assert all(files[name] == (exported / name).read_bytes() for name in sent)
    assert files["NOTICE"].startswith(b"Llama 3.1 is licensed under the Llama 3.1 Community License, Copyright")
    assert {path.name: path.stat().st_mtime_ns for path in exported.iterdir()} == before


def test_a_second_push_of_the_same_does_nothing(exported: Path, hub: UploadHub) -> None:
    push(exported, REPO)
    push(exported, REPO)
    assert hub.commits == [REPO]
    assert set(hub.puts.values()) == {1}


def test_weights_of_an_earlier_push_do_not_stay(out: Path, exported: Path, hub: UploadHub) -> None:
    """transformers would take an old model.safetensors before the new shards."""
    push(exported, REPO)
    hub.repositories[REPO]["model.safetensors"] = b"of an earlier run"
    hub.repositories[REPO]["notes.pdf"] = b"the owner's"
    (out / "generation_config.json").write_text("{}")
    push(out, REPO)
    assert "model.safetensors" not in hub.repositories[REPO]
    assert "notes.pdf" in hub.repositories[REPO]


def test_what_an_earlier_push_had_beside_its_weights_is_no_part_of_this_model(
    out: Path, exported: Path, hub: UploadHub
) -> None:
    """An adapter's configuration is another model to transformers; a template is how people ask it."""
    (out / "chat_template.jinja").write_text("{{ bos_token }}")
    (out / "additional_chat_templates").mkdir()
    (out / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    report = push(out, REPO)
    assert "additional_chat_templates/tool_use.jinja" in report.files
    assert report.left_out == ()
    assert hub.repositories[REPO]["additional_chat_templates/tool_use.jinja"] == b"{{ tools }}"
    hub.repositories[REPO] |= {"adapter_config.json": b"{}", "results.json": b"{}"}
    push(exported, REPO)
    sent = {path.name for path in exported.iterdir() if path.name[0] != "."}
    assert set(hub.repositories[REPO]) == sent | {"README.md", "NOTICE", ".gitattributes", "results.json"}


def test_a_template_within_the_tokenizer_s_configuration_is_one_to_the_card(out: Path, hub: UploadHub) -> None:
    assert "apply_chat_template" not in push(out, REPO, dry_run=True).card
    config = json.loads((out / "tokenizer_config.json").read_text())
    (out / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "{{ bos_token }}"}))
    assert "apply_chat_template" in push(out, REPO, dry_run=True).card


def test_the_card_says_what_the_model_was_made_of(exported: Path, hub: UploadHub) -> None:
    card = push(exported, REPO, dry_run=True).card
    assert metadata(card) == {
        "license": "llama3.1",
        "base_model": [BASE],
        "base_model_relation": "finetune",
        "language": ["en", "ja"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["nemo-cpt", "continual-pretraining", "instruction-tuning"],
    }
    assert "**Built with Llama**" in card
    assert f"[{BASE}](https://huggingface.co/{BASE}), revision `{COMMIT[:12]}`" in card
    first, second = card.split("## 2. ")
    assert "| ja | 75.0% | 943.7 M |\n| en | 25.0% | 314.6 M |" in first
    assert "| tokens | 1,258,291,200 |" in first
    assert "| held-out loss (nats per token) | at step 0 | at step 300 |" in first
    assert "| ja | 2.5000 | 1.7500 |\n| en | 1.8750 | 1.9000 |" in first
    assert "`llama31_8b.continual_pretrain lr=1e-05 model=base`" in first
    assert "nemo_cpt 0.1.0, torch 2.13.0" in first
    assert second.startswith("Instruction tuning\n")
    assert "| data | weight |\n|---|---|\n| ja_chats | 1 |" in second
    assert "| adapters | LoRA, rank 16 |" in second
    assert "| tokens | 1,310,720 at most, as sequences are not all full |" in second
    assert f'from_pretrained("{REPO}"' in card
    assert "secret" not in card
    assert hub.repositories == {}


def test_a_loss_that_was_no_number_stands_in_the_card() -> None:
    losses = [PRETRAINING["losses"][0], {"step": 300, "ja": None, "en": 1.9}]  # as a run's record holds NaN
    origin = Provenance(BASE, COMMIT, [PRETRAINING | {"losses": losses}])
    card = model_card(Subject(REPO, origin, Licence("llama3.1"), ["ja"], is_adapter=False, has_template=False))
    assert "| ja | 2.5000 | NaN |\n| en | 1.8750 | 1.9000 |" in card


def test_where_a_model_comes_from_goes_through_import_and_export(exported: Path, tmp_path: Path) -> None:
    """Also where the export is imported again, to train on."""
    import_hf(exported, tmp_path / "again")
    export_hf(tmp_path / "again", tmp_path / "out")
    found = read_provenance(tmp_path / "out")
    assert (found.repo_id, found.commit) == (BASE, COMMIT)
    assert [training["step"] for training in found.trainings] == [300, 40]


def test_a_push_that_is_killed_goes_on_where_it_was(exported: Path, hub: UploadHub) -> None:
    hub.hold_after = 2
    killed = subprocess.Popen(command(exported, REPO), env=environ(hub))
    assert hub.holding.wait(120)
    killed.kill()
    killed.wait()
    assert len(hub.large) == 2
    assert hub.commits == []
    assert set(hub.repositories[REPO]) == {".gitattributes"}, "nobody sees half a model"
    hub.hold_after = None
    push(exported, REPO)
    assert hub.commits == [REPO]
    assert set(hub.puts.values()) == {1}, "what had arrived was not sent again"


def _edit_config(folder: Path) -> None:
    (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace("{", f'{{"x": "{Path.home()}/y",', 1)
    )


def _hold_token(folder: Path) -> None:
    (folder / "notes.txt").write_text(f"export HF_TOKEN={TOKEN}")


def _be_a_run(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "checkpoints").mkdir()


def _lose_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def _lose_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("change", "arguments", "says"),
    [
        (None, {"repo_id": "model"}, "no repository's name"),
        (None, {"repo_id": "someone/Llama-x"}, "may not write to someone/Llama-x: take an owner that is you"),
        (None, {"repo_id": "me/swallow", "public": True}, "name begins with 'Llama': Llama-..., not swallow"),
        (None, {"base_model": "meta-llama/Llama-3.2-1B"}, f"was downloaded as {BASE}"),
        (None, {"base_licence": "apache-2.0"}, "the text in .* is that of llama3.1"),
        (None, {"languages": ["Japanese"]}, "'Japanese' is no language's code"),
        (_be_a_run, {}, "is a run or a NeMo checkpoint: `nemo-cpt export"),
        (_edit_config, {}, "config.json in .* holds a path of this machine"),
        (_hold_token, {}, "notes.txt in .* holds your token"),
        (_lose_shard, {}, "is missing though the index names it"),
        (_lose_tokenizer, {}, "no whole model or adapter"),
    ],
)
def test_refused_with_nothing_sent(
    change: Callable[[Path], None] | None, arguments: dict, says: str, out: Path, hub: UploadHub
) -> None:
    if change:
        change(out)
    with pytest.raises(CptError, match=says) as refused:
        push(out, **{"repo_id": REPO} | arguments)
    assert TOKEN not in str(refused.value)
    assert not hub.commits
    assert not hub.large


def test_a_private_repository_of_another_name_is_warned(exported: Path, hub: UploadHub) -> None:
    report = push(exported, "me/swallow")
    assert "name begins with 'Llama'" in report.warnings[0]
    assert hub.commits == ["me/swallow"]


def test_a_wrong_token(exported: Path, hub: UploadHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_anotheranotheranotheranother")
    with pytest.raises(CptError, match="does not know your token: set the environment variable HF_TOKEN") as refused:
        push(exported, REPO)
    assert "hf_another" not in str(refused.value)


def test_offline_nothing_is_tried(exported: Path, hub: UploadHub) -> None:
    offline = environ(hub) | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command(exported, REPO), capture_output=True, text=True, env=offline)
    assert done.returncode == 2
    assert done.stderr.endswith("nemo-cpt: HF_HUB_OFFLINE is set, so nothing can be sent. Unset it.\n")
    assert hub.repositories == {}


def test_what_was_not_pushed_from_here_is_not_overwritten(exported: Path, hub: UploadHub) -> None:
    hub.repositories[REPO], hub.private[REPO] = {"model.safetensors": b"theirs"}, True
    with pytest.raises(CptError, match=r"holds files that this command did not push \(model.safetensors\)"):
        push(exported, REPO)
    push(exported, REPO, replace=True)
    assert "model.safetensors" not in hub.repositories[REPO]


@pytest.mark.parametrize("public", [True, False])
def test_a_repository_keeps_who_sees_it(public: bool, exported: Path, hub: UploadHub) -> None:
    push(exported, REPO, public=public)
    with pytest.raises(CptError, match="--public"):
        push(exported, REPO, public=not public)
    assert hub.private[REPO] is not public


def test_without_its_text_the_licence_is_the_base_s_on_the_hub(out: Path, hub: UploadHub) -> None:
    (out / "LICENSE").unlink()
    hub.cards[BASE] = {"license": "llama3.1", "language": ["de"]}
    report = push(out, REPO)
    assert report.licence == "llama3.1"
    assert "its text goes with the model: copy the base's LICENSE" in report.warnings[0]
    hub.cards[BASE] = {}
    with pytest.raises(CptError, match="names no licence"):
        push(out, REPO)


def test_a_base_that_is_not_known_has_to_be_named(out: Path, hub: UploadHub) -> None:
    (out / ".provenance.json").unlink()
    (out / "LICENSE").unlink()
    with pytest.raises(CptError, match="give --base-model OWNER/NAME, or --license"):
        push(out, "me/x")
    hub.cards["HuggingFaceTB/SmolLM2-135M"] = {"license": "apache-2.0", "language": "en"}
    card = push(out, "me/x", base_model="HuggingFaceTB/SmolLM2-135M@v1", dry_run=True).card
    assert metadata(card)["license"] == "apache-2.0"
    assert metadata(card)["language"] == ["en"]
    assert "How it was trained was not recorded" in card


def test_a_model_from_scratch_has_no_base(out: Path, hub: UploadHub) -> None:
    write_provenance(out, Provenance(from_scratch=True, trainings=[{"step": 3}]))
    (out / "LICENSE").unlink()
    with pytest.raises(CptError, match="trained from random weights: under which licence"):
        push(out, "me/x")
    with pytest.raises(CptError, match="trained from random weights; leave it away"):
        push(out, "me/x", base_model="a/b")
    card = push(out, "me/x", base_licence="mit", dry_run=True).card
    assert "A model trained from random weights. Licence: mit.\n" in card
    assert "## Pretraining" in card
    assert "base_model" not in metadata(card)


def test_an_adapter_names_its_base_on_the_hub(tmp_path: Path, hub: UploadHub) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": f"{tmp_path}/base", "r": 8}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    arguments = {"base_model": "a/b", "base_licence": "mit"}
    card = push(tmp_path, "me/lora", **arguments).card
    assert json.loads(hub.repositories["me/lora"]["adapter_config.json"]) == {"base_model_name_or_path": "a/b", "r": 8}
    assert metadata(card)["base_model_relation"] == "adapter"
    assert 'PeftModel.from_pretrained(model, "me/lora")' in card


def test_a_readme_in_the_folder_is_the_card(out: Path, hub: UploadHub) -> None:
    (out / "README.md").write_text("# mine\n")
    assert push(out, REPO).card == "# mine\n"
    assert hub.repositories[REPO]["README.md"] == b"# mine\n"


def test_a_card_that_the_hub_does_not_take(out: Path, hub: UploadHub) -> None:
    (out / "README.md").write_text("---\nlicense: 7\n---\n")
    with pytest.raises(CptError, match="does not take what was sent: Invalid metadata"):
        push(out, REPO)
    assert not hub.large


def test_the_command_prints_the_card_and_sends_nothing(exported: Path, hub: UploadHub) -> None:
    arguments = command(exported, "me/swallow", "--dry-run")
    done = subprocess.run(arguments, capture_output=True, text=True, env=environ(hub))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("---\nlicense: llama3.1\n")
    assert "warning: the licence llama3.1 asks that the model's name begins with 'Llama'" in done.stderr
    assert hub.repositories == {}
