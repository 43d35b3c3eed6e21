"""Softmax attention under one rule of sight: the oracle, and what each platform computes."""
