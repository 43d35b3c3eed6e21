"""What CPUs compute by C++ handlers that XLA calls: grouped products, attention, moving rows, compiled on first use by the system's compiler.

XLA:CPU multiplies groups by a dense expansion and bfloat16 vectors at a twentieth of the memory's bandwidth. The
handlers read each matrix that has rows once, and share their work through XLA's own threads.
"""

from moejax.kernels.native.calls import products, put, take, weight_gradient
from moejax.kernels.native.library import available

__all__ = ["available", "products", "put", "take", "weight_gradient"]
