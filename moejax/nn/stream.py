"""How the residual stream lies on the mesh during one call."""

from dataclasses import dataclass

from jax.sharding import Mesh, PartitionSpec

from moejax.sharding import live_axes, live_spec


@dataclass(frozen=True, slots=True)
class Stream:
    """The residual stream `[B, S, D]`: replicated over `tp`, and over `ep` either cut by rows (`cut`) or replicated
    too.

    Where it is replicated, the devices along `ep` divide each tensor-parallel rank's heads and vocabulary between them
    as far as these divide, so that they do not all compute the same.
    """

    mesh: Mesh
    cut: bool
    ep: str = "ep"
    tp: str = "tp"

    @property
    def ep_size(self) -> int:
        return self.mesh.shape[self.ep]

    @property
    def tp_size(self) -> int:
        return self.mesh.shape[self.tp]

    @property
    def tp_axes(self) -> tuple[str, ...]:
        """The tensor axis as collectives take it: none where it has one device."""
        return live_axes(self.mesh, self.tp)

    @property
    def rows(self) -> str | None:
        """The mesh axis that cuts the batch."""
        return self.ep if self.cut else None

    def helpers(self, parts: int) -> int:
        """Among how many devices along `ep` a tensor-parallel rank's `parts` heads (or vocabulary rows) are divided."""
        return 1 if self.cut or parts % self.ep_size else self.ep_size

    def spec(self, *dims: str | tuple[str, ...] | None) -> PartitionSpec:
        """A PartitionSpec on this mesh, axes of one device left out."""
        return live_spec(self.mesh, *dims)

    @property
    def batch_spec(self) -> PartitionSpec:
        """That of any array whose first axis is the batch."""
        return self.spec(self.rows)
