"""Recipes: one module a model; each public function returns a complete, editable run.Partial."""
