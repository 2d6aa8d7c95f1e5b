"""Recipes, and one training run from a recipe."""
