"""Run of a recipe: its parts, its steps, its measures and its folder."""
