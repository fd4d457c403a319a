"""Recipes: one module a model; each public function returns a complete, editable run.Partial."""

from nemo_cpt.quiet import quiet_imports

quiet_imports()
