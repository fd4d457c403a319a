"""Workflows to begin with, as YAML with comments: `nemo-cpt workflow new KIND FILE` writes one."""

from importlib.resources import files

CORPUS = "$CORPUS"  # stands for the folder of the corpus that ships with the package


def templates() -> list[str]:
    """Names of the kinds."""
    return sorted(path.name.removesuffix(".yaml") for path in files(__name__).iterdir() if path.name.endswith(".yaml"))


def template(kind: str) -> str:
    """One kind's text."""
    text = (files(__name__) / f"{kind}.yaml").read_text("utf-8")
    return text.replace(CORPUS, str(files("nemo_cpt.demo") / "corpus"))
