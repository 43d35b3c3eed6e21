"""Softmax attention under one rule of sight: the oracle, and what each platform computes.

A query sees the keys of its own segment whose places lie between two ends (`sight`). Whole sequences, packed ones,
windows, chunks, a prompt's part over a cache, a decoded token over a ring: all are that rule, and all go through
`platforms.attention`, which chooses when a program is lowered:

| where  | forward                                                              | backward    |
|--------|----------------------------------------------------------------------|-------------|
| CPU    | `native` in f32 and bf16, without a C++ compiler `blockwise` in f32  | `blockwise` |
| CUDA   | `triton`                                                             | `blockwise` |
| others | `blockwise` in the values' type                                      | `blockwise` |

- `blockwise`, plain XLA, walks over pairs of blocks of queries and keys with a running softmax and leaves out those of
  which nobody sees anything, so that a window costs its band and temporaries are those of one pair. On CPU it widens a
  block of a narrow type to f32 first, since XLA multiplies bfloat16 there several times slower; then powers are not
  rounded either, which is closer to exact than what transformers does. Its backward rule computes the scores again
  from one number that the forward pass keeps for each query.
- `native`, a C++ handler, walks over the same blocks on the caches as they lie, with the matrix products of the
  experts' kernel: XLA copies each block that it cuts out of a cache, and widening it is another copy.
- `triton`, a Pallas kernel, takes every width and type, sinks, windows, chunks and segments, latent attention written
  out and over latents. cuDNN's attention, as JAX offers it, has no sinks and no heads wider than 128 (those of latent
  attention are 192 and 576): it would be a second way for some of the models.
- TPUs take the blocks too: their matrix units multiply narrow types as they are, and a block is large enough to fill
  them.

`reference` is the oracle of all: every score at once, and a table of who sees whom.
"""
