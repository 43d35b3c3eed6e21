"""Runs as one HTML page: their recipes, curves, and where their experts' load went."""
