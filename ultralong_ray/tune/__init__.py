"""Trials of a recipe: [tune] in, one short run for each combination of values, a table of what they came to out."""
