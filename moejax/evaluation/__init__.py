"""How well a model predicts texts: loss, bits per byte, and where its experts' load goes, file by file."""
