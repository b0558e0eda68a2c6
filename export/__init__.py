"""Checkpoint to bundle: safetensors, graphs, recipes, variants, and the folder that is published."""
