"""What transformers computed, and the programs that asked it."""
