"""FP8 weights (E4M3) with one scale a block of rows and columns, as DeepSeek-V3 publishes them.

W = q * scale_inv, each scale for a block of 128 x 128; blocks at the lower and right edges may be cut short. The
product is formed in float32 and rounded once, to the parameter's dtype, as transformers does.

Source: DeepSeek-V3 technical report, section 3.3.2; transformers 5.23, `Fp8Dequantize`, which derives the block from
the number of scales and so refuses, or misreads, what has cut blocks. There the published block size decides.
"""

import ml_dtypes
import numpy as np

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)

_LARGEST = float(ml_dtypes.finfo(E4M3).max)
# A table is faster than the conversion and, unlike it, lets other threads run.
_VALUES = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)


def dequantise(q: np.ndarray, scales: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """float8_e4m3fn `[..., R, C]` times the scale of each value's block, in float32.

    Args:
        q: the quantised values.
        scales: `[..., r, c]`, of a dtype that float32 holds exactly.
        rows: `[R]`, the row of `scales` that each row of `q` has.
        columns: `[C]`, the same for columns.
    """
    values = _VALUES.take(q.view(np.uint8))
    wide = scales.astype(np.float32).take(columns, -1)
    values *= wide.take(rows, -2)
    return values


def quantise(values: np.ndarray, block: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Quantises `[..., R, C]` to float8_e4m3fn and float32 scales `[..., ceil(R / rows), ceil(C / columns)]`.

    The largest magnitude of a block becomes 448, E4M3's largest number; a block of zeros has scale 1.
    """
    rows, columns = (np.arange(extent) // size for extent, size in zip(values.shape[-2:], block, strict=True))
    sizes = np.abs(values).astype(np.float32)
    for axis, size in zip((-2, -1), block, strict=True):
        sizes = np.maximum.reduceat(sizes, np.arange(0, values.shape[axis], size), axis)
    scales = np.where(sizes > 0, sizes / np.float32(_LARGEST), np.float32(1))
    wide = scales.take(rows, -2).take(columns, -1)
    return np.clip(values.astype(np.float32) / wide, -_LARGEST, _LARGEST).astype(E4M3), scales
