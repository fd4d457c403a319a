"""What the pages of docs/ tell to type exists: commands, options, recipes, their parameters, imported names."""

import ast
import builtins
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from nemo_cpt import CptError, catalog, cli
from nemo_cpt.cli import app
from nemo_cpt.launching.config_file import read_config
from nemo_cpt.launching.description import describe

CHECKOUT = Path(__file__).parents[1]
PAGES = {
    path.stem: path.read_text("utf-8") for path in (CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md")))
}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NOT_OF_THE_RECIPE = ("key", "executor", "name", "NAME")  # "key=value" stands for any
OF_THE_READER = {"MyCallback"}
OF_TYPER = {"--help", "-h", "--version", "--install-completion", "--show-completion"}


@pytest.fixture(scope="module")
def commands() -> dict[str, typer.core.TyperCommand]:
    for module in Path(cli.__file__).parent.glob("[!_]*.py"):
        if module.stem != "plugin":  # which registers executors with NeMo-Run
            importlib.import_module(f"nemo_cpt.cli.{module.stem}")
    return dict(typer.main.get_command(app).commands)


def told(text: str) -> Iterator[list[str]]:
    """The words of each nemo-cpt command in a page's blocks, and of those within its sentences."""
    blocks = "\n".join(block for kind, block in BLOCK.findall(text) if kind in ("", "bash"))
    lines = blocks.replace("\\\n", " ").splitlines()
    sentences = re.findall(r"`(nemo-cpt [^`]+)`", BLOCK.sub("", text).replace("\n", " "))
    for line in (*lines, *sentences):
        for part in re.split(r"&&|\s\|\s|;", line.partition(" #")[0]):
            words = re.sub(r"['\"\[\]]", " ", part).split()
            if words[:1] == ["nemo-cpt"] and len(words) > 1:
                yield words[1:]


@pytest.mark.parametrize("page", PAGES)
def test_its_links_and_the_files_that_it_names_lead_somewhere(page: str) -> None:
    folder, text = CHECKOUT / ("" if page == "README" else "docs"), BLOCK.sub("", PAGES[page])
    wrong = []
    for file, anchor in re.findall(r"\]\((?!https?:)([^)\s#]*)#?([^)\s]*)\)", text):
        if not (folder / file).exists() or anchor not in {"", *anchors(PAGES.get(Path(file or page).stem, ""))}:
            wrong.append(f"{file}#{anchor}")
    if page != "guarantees":  # which names tests from the folder of tests, and has a test of its own
        named = re.findall(r"\b(?:tests|nemo_cpt|executors|recipes|benchmarks|examples)/[\w./*]+\.\w+\b", PAGES[page])
        wrong += [file for file in named if not list(CHECKOUT.glob(file))]
    assert not wrong


@pytest.mark.parametrize("page", PAGES)
def test_the_options_of_its_scripts_exist(page: str) -> None:
    text = re.sub(r"\\\n\s*", "", PAGES[page]).replace("\n    --", " --")
    for file, rest in re.findall(r"python ((?:benchmarks|examples)/\w+\.py)([^`\n#]*)", text):
        options = re.findall(r"[\"'](--[a-z][\w-]*)[\"']", (CHECKOUT / file).read_text("utf-8"))
        unknown = set(re.findall(r"--[a-z][\w-]*", rest)) - set(options)
        assert not unknown, f"{file} has no {unknown}"


def anchors(text: str) -> set[str]:
    """Of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_its_commands_exist(page: str, commands: dict[str, typer.core.TyperCommand]) -> None:
    wrong = [f"{' '.join(words)}: {fault}" for words in told(PAGES[page]) if (fault := _fault(words, commands))]
    assert not wrong, "\n".join(wrong)


def _fault(words: list[str], commands: dict[str, typer.core.TyperCommand]) -> str:
    if words[0].startswith("-"):
        return "" if set(words) <= OF_TYPER else "no such option"
    for name in re.split(r"[|/]", words[0]):  # logs|cancel
        if name in ("...", "…") or name.isupper():
            continue
        if name not in commands:
            return f"there is no command {name}"
        if within := getattr(commands[name], "commands", None):
            return _fault(words[1:], within)
        options = {each for parameter in commands[name].params for each in (*parameter.opts, *parameter.secondary_opts)}
        given = {word.partition("=")[0] for word in words[1:] if re.match(r"--?[a-z]", word)}
        if unknown := given - options - OF_TYPER:
            return f"{name} has no option {', '.join(unknown)}"
        if any(parameter.name == "overrides" for parameter in commands[name].params):
            return _fault_of_recipe(words[1:])
    return ""


def _fault_of_recipe(words: list[str]) -> str:
    """Of a recipe that is named, and not by a placeholder: that it exists, and the keys given to it."""
    name = words[0] if words else ""
    if not re.fullmatch(r"[a-z][\w.]*", name) or name.endswith(".yaml"):
        return ""
    try:
        recipe = catalog.recipe(name)
    except CptError as error:
        return error.message
    keys = [match[1] for word in words[1:] if (match := re.match(r"(\w+)=", word))]
    unknown = [key for key in keys if key not in recipe.parameters and key not in NOT_OF_THE_RECIPE]
    return f"{name} has no parameter {', '.join(unknown)}" if unknown else ""


def test_nothing_installs_nemo_cpt_by_its_name_which_no_index_has() -> None:
    texts = [*PAGES.values(), *(path.read_text("utf-8") for path in (CHECKOUT / "nemo_cpt").rglob("*.py"))]
    for text in (*texts, (CHECKOUT / "README.md").read_text("utf-8")):
        assert not re.search(r"pip install [^`]{0,60}nemo[_-]cpt\[", " ".join(text.split()))


def test_its_configuration_file_is_one(tmp_path: Path) -> None:
    (text,) = (block for kind, block in BLOCK.findall(PAGES["launching"]) if kind == "yaml")
    (tmp_path / "my.yaml").write_text(text)
    config = read_config(tmp_path / "my.yaml")
    function, arguments, _, options = catalog.split(config.recipe, config.pairs)
    assert describe(function, arguments, [], str(config.executor), options).logs_to_wandb


def test_commands_are_found() -> None:
    assert sum(len(list(told(text))) for text in PAGES.values()) > 80


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if "```python" in text])
def test_its_python_is_python_and_imports_what_there_is(page: str) -> None:
    for kind, block in BLOCK.findall(PAGES[page]):
        for node in ast.walk(ast.parse(block)) if kind == "python" else ():
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("nemo_cpt"):
                missing = {alias.name for alias in node.names} - names_in(str(node.module))
                assert not missing, f"{node.module} has no {missing}"


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if "```python" in text])
def test_its_python_says_where_each_name_comes_from(page: str) -> None:
    for block in (block for kind, block in BLOCK.findall(PAGES[page]) if kind == "python"):
        known = {*dir(builtins), *OF_THE_READER}
        for node in ast.walk(tree := ast.parse(block)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                known |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                known.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                known.add(node.id)
        unknown = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - known
        assert not unknown, f"imported nowhere: {unknown}, in\n{block}"


def names_in(module: str) -> set[str]:
    """What can be imported from a module of ours, by its source: recipes' modules import NeMo."""
    path = CHECKOUT / module.replace(".", "/")
    folder, file = (path, path / "__init__.py") if path.is_dir() else (None, path.with_suffix(".py"))
    names = {each.stem for each in folder.iterdir()} if folder else set()
    for node in ast.parse(file.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            names |= {ast.unparse(each) for each in getattr(node, "targets", [getattr(node, "target", None)]) if each}
            # Of a package that imports when it is asked: the keys of its table.
            names |= {
                each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and file.stem == "__init__"
            }
    return names
