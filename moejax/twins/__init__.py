"""Tiny twins: random checkpoints of a published model's family that take every special path of its config."""
