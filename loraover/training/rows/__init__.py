"""Rows that a recipe trains and measures on."""
