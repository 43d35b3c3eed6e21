"""Checkpoints in Hugging Face's layout: finding, checking, loading into sharded arrays, and writing them."""
