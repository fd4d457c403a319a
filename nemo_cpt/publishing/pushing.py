"""From an export to a repository on the hub, in one commit: everybody sees all of it or nothing."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemo_cpt.arguments import checked
from nemo_cpt.checkpoint.architecture import read_json
from nemo_cpt.checkpoint.downloading import is_weights
from nemo_cpt.checkpoint.folders import ADAPTER, TEMPLATES, has_tokenizer
from nemo_cpt.checkpoint.provenance import Provenance, read_provenance
from nemo_cpt.checkpoint.safetensors_files import HFWeights
from nemo_cpt.conversations.templates import own_template
from nemo_cpt.corpus.tokenization.tokenizer_files import FILES
from nemo_cpt.errors import CptError, near_paths
from nemo_cpt.hub import SET_A_TOKEN, TOKEN_PAGE, explained
from nemo_cpt.publishing.card import LANGUAGE, TAG, Subject, languages_of, model_card
from nemo_cpt.publishing.licences import Licence, breaches, licence, licence_of_card, licence_of_texts
from nemo_cpt.quiet import bars_of_the_hub
from nemo_cpt.records import AsDict

CARD = "README.md"
_KINDS = (".json", ".safetensors", ".model", ".jinja", ".txt", ".tiktoken")
_TEXTS = ("LICEN", "NOTICE", "USE_POLICY")  # how the names of files begin that go with them, whatever their kind
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# What a model is loaded from beside its weights: what an earlier push left of these would be a part of this one.
_OF_A_MODEL = {
    *FILES, "config.json", "generation_config.json", "chat_template.jinja", "chat_template.json", ADAPTER,
}  # fmt: skip
_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt")  # some have `/root` or `/home` among their tokens
_OF_NO_COUNTRY = ("multilingual", "code")  # what the hub knows beside codes
_SHORT = 4  # a folder's path of so many characters, such as `/` or `/tmp`, gives nothing away


@dataclass(frozen=True)
class PushReport(AsDict):
    """What a push did, or would do.

    Attributes:
        repo_id: the repository.
        url: of the commit; of the repository where nothing was sent.
        private: whether only you and your organisation see it.
        files: names of the files that it has.
        left_out: names of those in the folder that do not belong to a model.
        bytes_total: of the files.
        licence: the base's; of a model that was trained from scratch, its own.
        card: the model card.
        warnings: what else to know.
        seconds: wall time.
    """

    repo_id: str
    url: str
    private: bool
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    bytes_total: int
    licence: str
    card: str
    warnings: tuple[str, ...]
    seconds: float


@checked
def push(
    folder: str | Path,
    repo_id: str,
    *,
    public: bool = False,
    base_model: str | None = None,
    base_licence: str | None = None,
    languages: Sequence[str] = (),
    replace: bool = False,
    dry_run: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> PushReport:
    """Publish an export on the Hugging Face hub, with a model card written from its trainings.

    The files become one commit, so that nobody ever loads half a model. A push that broke off or was killed sends only
    what had not arrived; one of what is there already does nothing. (huggingface_hub's `upload_large_folder` was not
    taken: it makes many commits, tries again for ever where a token is refused, and writes into the folder.) The
    variable HF_ENDPOINT names another hub than https://huggingface.co.

    Args:
        folder: what `export_hf` made, of a model or an adapter. A README.md in it is the card instead of ours.
        repo_id: OWNER/NAME; made if it is not there.
        public: let everybody see it; by default it is private.
        base_model: OWNER/NAME of the base on the hub, with `@REVISION` if wanted; by default the one that was
            downloaded with `download`.
        base_licence: the hub's name of the base's licence, where neither the folder nor the base's card says it; of a
            model that was trained from scratch, its own.
        languages: codes for the card; by default those that the datasets are called by.
        replace: overwrite a repository that holds something that this function did not push.
        dry_run: send nothing; the report has the card and the files.
        say: told what is going to be sent.

    Raises:
        CptError: the folder is no whole export, holds paths of this machine or the token; the base or its licence is
            not known, or the licence asks something that is not given; the hub refuses the token or the repository;
            the repository holds something else or has another visibility; the network broke off.
    """
    from huggingface_hub import HfApi

    start, folder = time.monotonic(), Path(folder)
    check_options(repo_id, languages)
    api = HfApi(library_name="nemo-cpt")
    files, left_out = _files(folder)
    origin = _origin(folder, base_model)
    terms, card_languages = _licence(api, folder, origin, base_licence)
    # In private a name may break them, which nobody else sees; it is said all the same.
    broken = list(breaches(terms, repo_id, folder))
    if broken and public:
        raise CptError(f"{'; '.join(broken)}. Nothing was sent")
    subject = Subject(
        repo_id, origin, terms, list(languages) or languages_of(origin) or card_languages,
        is_adapter=ADAPTER in files, has_template=own_template(folder) is not None,
    )  # fmt: skip
    contents = _contents(folder, files, subject)
    _refuse_private(folder, contents, api)
    url, private = f"{api.endpoint}/{repo_id}", not public
    size = sum(len(each) if isinstance(each, bytes) else each.stat().st_size for each in contents.values())
    # All that can be refused has been by now: what is sent stays in the repository's history.
    if not dry_run:
        visible = "public" if public else "private"
        say(f"{len(contents)} files, {size / 1e9:.2f} GB, to {url}, {visible}")
        # `_refusals` within: what only a push meets is said before `explained` says it of any request.
        with explained("model", repo_id, url), _refusals(repo_id, url), bars_of_the_hub(sys.stderr.isatty()):
            url = _send(api, repo_id, contents, private=private, replace=replace)
    return PushReport(
        repo_id, url, private, tuple(sorted(contents)), left_out, size, terms.name or terms.id,
        _text(contents[CARD]), tuple(f"{each}, before it becomes public" for each in broken),
        round(time.monotonic() - start, 3),
    )  # fmt: skip


def check_options(repo_id: str, languages: Sequence[str]) -> None:
    """Check the options of `push` that need neither folder nor hub.

    Raises:
        CptError: one is unusable.
    """
    if not _REPOSITORY.fullmatch(repo_id):
        raise CptError(f"{repo_id!r} is no repository's name: give OWNER/NAME, OWNER being you or your organisation")
    if wrong := [each for each in languages if not LANGUAGE.fullmatch(each.lower()) and each not in _OF_NO_COUNTRY]:
        raise CptError(f"{wrong[0]!r} is no language's code: give one of ISO 639, such as ja or zh-tw")


def _files(folder: Path) -> tuple[list[str], tuple[str, ...]]:
    """The names of a model's files in a folder, and of what else lies there.

    Raises:
        CptError: it is no whole export.
    """
    if not folder.is_dir():
        raise CptError(f"{folder} is no folder{near_paths(folder)}. Give what `nemo-cpt export` made")
    if not (folder / "config.json").exists() and any((folder / name).is_dir() for name in ("checkpoints", "weights")):
        raise CptError(
            f"{folder} is a run or a NeMo checkpoint: `nemo-cpt export {folder} FOLDER` makes what is pushed"
        )
    found = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    files = [name for name in found if name.endswith(_KINDS) or name.upper().startswith(_TEXTS) or name == CARD]
    files += [f"{TEMPLATES}/{path.name}" for path in sorted(folder.glob(f"{TEMPLATES}/*.jinja"))]
    if ADAPTER in files:
        whole = "adapter_model.safetensors" in files
    else:
        whole = "config.json" in files and has_tokenizer(folder)
        HFWeights(folder)  # every shard of the index is there, with all of its bytes
    if not whole:
        raise CptError(f"{folder} holds no whole model or adapter. Give what `nemo-cpt export` made")
    others = {path.name for path in folder.iterdir() if not path.name.startswith(".")} - set(files) - {TEMPLATES}
    return files, tuple(sorted(others))


def _origin(folder: Path, base_model: str | None) -> Provenance:
    known = read_provenance(folder)
    if base_model is None:
        return known
    if known.from_scratch:
        raise CptError(f"--base-model {base_model}: {folder} was trained from random weights; leave it away")
    name, _, revision = base_model.partition("@")
    if not _REPOSITORY.fullmatch(name):
        raise CptError(f"--base-model {base_model}: give OWNER/NAME of the base on the hub, or OWNER/NAME@REVISION")
    if known.repo_id and known.repo_id != name:
        raise CptError(f"--base-model {name}: the base of {folder} was downloaded as {known.repo_id}; leave it away")
    return replace(known, repo_id=name, commit=revision or known.commit)


def _licence(api: Any, folder: Path, origin: Provenance, given: str | None) -> tuple[Licence, list[str]]:
    """The base's licence, by its text in the folder, else by the base's card on the hub; and that card's languages."""
    stated = licence_of_texts(folder)
    # The text that goes with the model decides: it is what the licence's owner wrote.
    if stated and given and given not in (stated.id, stated.name):
        raise CptError(f"--license {given}: the text in {folder} is that of {stated.name or stated.id}; leave it away")
    if found := stated or (licence(given) if given else None):
        return found, []
    if origin.from_scratch:
        raise CptError(f"{folder} was trained from random weights: under which licence is it published? Give --license")
    if origin.repo_id is None:
        raise CptError(
            f"{folder} does not say which model its training began with, and so not under which licence it may be "
            "published: give --base-model OWNER/NAME, or --license for a base that is not on the hub"
        )
    page = f"{api.endpoint}/{origin.repo_id}"
    with explained("model", origin.repo_id, page, origin.commit or "main"):
        card = api.model_info(origin.repo_id, revision=origin.commit).card_data
    if (found := licence_of_card(card)) is None:
        raise CptError(f"{page} names no licence. Read what its author grants, and give that as --license")
    spoken = card.get("language") or []
    return found, [spoken] if isinstance(spoken, str) else list(spoken)


def _contents(folder: Path, files: Sequence[str], subject: Subject) -> dict[str, Path | bytes]:
    """What to send by name: files of the folder, or the bytes of what is made here."""
    contents: dict[str, Path | bytes] = {name: folder / name for name in files}
    contents.setdefault(CARD, model_card(subject).encode())
    if subject.licence.notice and "NOTICE" not in {Path(name).stem.upper() for name in files}:
        contents["NOTICE"] = f"{subject.licence.notice}\n".encode()
    if subject.is_adapter:
        if subject.origin.repo_id is None:
            raise CptError(f"{folder} is an adapter, which is of no use without its base: give --base-model OWNER/NAME")
        # The export has the base's folder there, which is nobody else's.
        config = read_json(folder / ADAPTER) | {"base_model_name_or_path": subject.origin.repo_id}
        contents[ADAPTER] = json.dumps(config, indent=2).encode() + b"\n"
    return contents


def _refuse_private(folder: Path, contents: dict[str, Path | bytes], api: Any) -> None:
    """Raise CptError where a text holds the token, or the path of a folder that this user works in."""
    from huggingface_hub import get_token

    # Not every path: /usr and the like stand in ordinary texts, and tell nothing.
    places = {str(path) for path in (Path.home(), Path.cwd(), folder.resolve().parent)}
    paths = {f"{place}/": "a path of this machine" for place in places if len(place) > _SHORT}
    tokens = {token: "your token" for token in (api.token, get_token()) if token}
    for name, content in contents.items():
        # Binary, with no text of ours in them, and of many gigabytes.
        if name.endswith((".safetensors", ".model")):
            continue
        text = _text(content)
        for private, what in (tokens if name in _VOCABULARIES else tokens | paths).items():
            if private in text:
                raise CptError(f"{name} in {folder} holds {what}: take it out, and push again. Nothing was sent")


def _text(content: Path | bytes) -> str:
    return (content if isinstance(content, bytes) else content.read_bytes()).decode(errors="replace")


def _send(api: Any, repo_id: str, contents: dict[str, Path | bytes], *, private: bool, replace: bool) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.errors import RepositoryNotFoundError

    api.whoami()  # a refused token is told apart from a repository that is not there
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=private)
        there = set[str]()
    else:
        there = {file.rfilename for file in info.siblings or []}
        _check_repository(api, info, private=private, replace=replace)
    # In one commit what comes and what goes: at no moment are two models' weights there.
    operations: list[Any] = [CommitOperationAdd(name, content) for name, content in contents.items()]
    # Of an earlier push: transformers takes a model.safetensors before the shards of an index, and a template that the
    # model has no more. Other files there may be the user's own, in an adapter's repository also a tokenizer.
    old = {name for name in there - set(contents) if is_weights(name) or (ADAPTER not in contents and _is_read(name))}
    operations += [CommitOperationDelete(name) for name in sorted(old)]
    return str(api.create_commit(repo_id, operations, commit_message="Push with nemo-cpt").commit_url)


def _is_read(name: str) -> bool:
    return name in _OF_A_MODEL or name.startswith(f"{TEMPLATES}/")


def _check_repository(api: Any, info: Any, *, private: bool, replace: bool) -> None:
    page = f"{api.endpoint}/{info.id}"
    if bool(info.private) != private:
        raise CptError(
            f"{page} is {'private' if info.private else 'public'} already: "
            f"{'leave --public away' if info.private else 'give --public'}, or change it in {page}/settings"
        )
    # The hub itself puts that one into a new repository.
    others = {file.rfilename for file in info.siblings or []} - {".gitattributes"}
    if others and not replace and TAG not in ((info.card_data and info.card_data.get("tags")) or []):
        raise CptError(
            f"{page} holds files that this command did not push ({', '.join(sorted(others)[:4])}): give another name, "
            "or --replace"
        )


@contextmanager
def _refusals(repo_id: str, page: str) -> Iterator[None]:
    """Turn what only a push meets into CptErrors, before the rest is `explained`."""
    from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError
    from requests.exceptions import HTTPError

    try:
        yield
    except HTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status == 401 and not isinstance(error, RepositoryNotFoundError):
            raise CptError(f"The hub does not know your token: {SET_A_TOKEN} that may write.") from None
        if status == 403:
            owner = repo_id.partition("/")[0]
            raise CptError(
                f"Your token may not write to {repo_id}: take an owner that is you or an organisation of yours instead "
                f"of {owner}, or a token from {TOKEN_PAGE} with write access to it."
            ) from None
        raise
    except OfflineModeIsEnabled:
        raise CptError("HF_HUB_OFFLINE is set, so nothing can be sent. Unset it.") from None
    except ValueError as error:  # of a card's metadata, or a file that is too large
        raise CptError(f"{page} does not take what was sent: {error}") from None
    except RuntimeError as error:  # how huggingface_hub wraps a file's upload
        raise CptError(f"{page}: {error} Check the network. A rerun sends only what has not arrived.") from error
