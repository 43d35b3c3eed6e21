"""Number formats that checkpoints pack weights into: MXFP4 (GPT-OSS) and FP8 in blocks (DeepSeek)."""
