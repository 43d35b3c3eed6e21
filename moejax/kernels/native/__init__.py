"""What CPUs compute by C++ handlers that XLA calls: grouped products, attention, moving rows.

They are compiled on first use by the system's compiler and share their work through XLA's own threads. XLA:CPU
multiplies groups by a dense expansion, bfloat16 vectors at a twentieth of the memory's bandwidth, and widens a bfloat16
array whole to read or write some of its rows.
"""

from moejax.kernels.native.calls import gated_products, products, put, take, weight_gradient
from moejax.kernels.native.library import available

__all__ = ["available", "gated_products", "products", "put", "take", "weight_gradient"]
