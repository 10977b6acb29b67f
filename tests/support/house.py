"""The order of the house: an arrow from a folder to one above it would make the project a ball of wool."""

from interp_assets.graph.stages import STAGES

LAYERS = ("terminal", "graph", "lab", *reversed(STAGES), "garcon", "planning", "storage", "compute", "errors")
"""Folders of `interp_assets`, from the top: each imports only what stands below it."""
