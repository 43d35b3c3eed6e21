"""Checkpoints of training runs: kept by orbax, independent of the mesh, turned into Hugging Face folders and back."""
