"""Recipes copied into scripts: a recipe's whole module, with lines that run it."""

from pathlib import Path

from nemo_cpt.catalog import Function, data_example
from nemo_cpt.corpus.atomic_files import write_whole
from nemo_cpt.errors import CptError


def write_script(recipe: Function, file: Path) -> None:
    """Write a recipe's module and a call of it to `file`; see `write_new`."""
    # By its name it would be the library's model, whatever the user makes of the one in the script.
    module = recipe.path.read_text().replace(f'"model": "{recipe.path.stem}"', '"model": model')
    write_new(module + _call(recipe), file)


def write_new(text: str, file: Path) -> None:
    """Write a text file, whole or not at all.

    Raises:
        CptError: the file exists, or its folder does not.
    """
    # Edited scripts are work: nothing is overwritten.
    if file.exists():
        raise CptError(f"{file} exists; copy to another name, or remove it")
    if not file.parent.is_dir():
        raise CptError(f"{file.parent} is no folder; make it first")
    write_whole(file, text.encode())


def _call(recipe: Function) -> str:
    function = recipe.name.rpartition(".")[2]
    base = recipe.parameters["base"].default if "base" in recipe.parameters else None
    examples = {"base": (base or "'checkpoints/base'").replace("'", '"'), "data": data_example(recipe)}
    lines = [
        f"        {name}={value},  # edit" for name, value in examples.items() if value and name in recipe.parameters
    ]
    return "\n".join(
        [
            "",
            "",
            'if __name__ == "__main__":',
            "    from nemo_cpt.executors import local  # or slurm, docker, skypilot, kubernetes",
            "",
            f"    recipe = {function}(",
            *lines,
            "    )",
            f"    run.run(recipe, executor=local(processes={recipe.processes({})}))",
            "",
        ]
    )
