"""Which room may import which: arrows run down, none in a circle, and private names stay at home."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]

# From the bottom up: a room imports rooms of the lines above it alone.
LAYERS = (
    ("checksums", "constants", "moved", "records", "rounding", "urls"),
    ("importing", "installed", "output", "page", "quiet", "signals"),
    ("errors", "cpu_stack"),
    ("arguments", "cache", "hub", "made", "python_files", "recipe_models", "strict_yaml"),
    ("corpus",),
    ("cleaning", "conversations", "vocabulary"),
    ("checkpoint",),  # an export of a tuned model carries the chat template of its conversations
    ("compatibility",),
    ("training",),
    ("planning", "inference"),
    ("evaluation", "doctor", "publishing"),
    ("synthesis", "monitoring"),
    ("executors",),
    ("recipes",),
    ("catalog",),
    ("launching",),
    ("watching",),
    ("workflow",),
    ("demo",),
    ("cli",),
)


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Every module of the package by its dotted name."""
    for folder in ("nemo_cpt", "recipes", "executors"):
        for path in (CHECKOUT / folder).rglob("*.py"):
            parts = path.relative_to(CHECKOUT).with_suffix("").parts
            if parts[:2] in (("nemo_cpt", "recipes"), ("nemo_cpt", "executors")):  # links to the folders at the top
                continue
            yield ".".join(parts if folder == "nemo_cpt" else ("nemo_cpt", *parts)), ast.parse(path.read_text())


def imports() -> Iterator[tuple[str, str, str]]:
    """(importing module, imported module, name) of each import within the package, those in functions too."""
    for name, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "nemo_cpt":
                for alias in node.names:
                    yield name, str(node.module), alias.name
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.startswith("nemo_cpt."):
                        yield name, alias.name, ""


def room(module: str, name: str = "") -> str:
    """The room of a module, or of what `from nemo_cpt import NAME` names; empty for the package itself."""
    parts = module.removesuffix(".__init__").split(".")
    return parts[1] if len(parts) > 1 else (name if any(name in layer for layer in LAYERS) else "")


def test_no_arrow_runs_up() -> None:
    height = {each: number for number, layer in enumerate(LAYERS) for each in layer}
    wrong = {
        f"{importer} imports {imported} ({name})"
        for importer, imported, name in imports()
        if room(importer) not in ("", room(imported, name))
        and room(imported, name)
        and height[room(importer)] <= height[room(imported, name)]
    }
    assert not wrong


def test_no_modules_import_each_other_in_a_circle() -> None:
    known = {name.removesuffix(".__init__") for name, _ in modules()}
    arrows = defaultdict(set)
    for importer, imported, name in imports():
        target = f"{imported}.{name}" if f"{imported}.{name}" in known else imported
        if not importer.endswith("__init__") and target in known:
            arrows[importer].add(target)
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle: {' -> '.join((*path[path.index(module) :], module))}"
        if module not in done:
            for target in sorted(arrows[module]):
                visit(target, (*path, module))
            done.add(module)

    for module in sorted(arrows):
        visit(module, ())


def test_private_names_stay_in_their_module() -> None:
    assert not [
        f"{importer} imports {imported}.{name}"
        for importer, imported, name in imports()
        if name.startswith("_") and name != "__version__"
    ]
