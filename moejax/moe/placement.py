"""Which physical slot holds which expert: the only place that knows.

Experts live in stacked arrays of `slots` entries, cut into equal parts over the expert axis. When that axis does not
divide the experts, the last slots stay empty: they hold zeros and no token is ever sent there.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Placement:
    """Experts in slots, `slots_per_device` of them on each device of the expert axis; expert e is in slot e."""

    num_experts: int
    devices: int

    @property
    def slots(self) -> int:
        """Experts, filled up to a multiple of the devices."""
        return self.slots_per_device * self.devices

    @property
    def slots_per_device(self) -> int:
        return -(-self.num_experts // self.devices)

    @property
    def slot_of(self) -> tuple[int, ...]:
        """The slot of each expert."""
        return tuple(range(self.num_experts))

    def experts_on(self, device: int) -> range:
        """The experts whose slots are on one device of the expert axis."""
        first = device * self.slots_per_device
        return range(min(first, self.num_experts), min(first + self.slots_per_device, self.num_experts))
