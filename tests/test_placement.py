"""Every expert has one slot, and devices agree with the slots."""

import pytest

from moejax.moe.placement import Placement


@pytest.mark.parametrize("devices", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("experts", [1, 2, 5, 6, 8, 60])
def test_slots_hold_each_expert_once(experts, devices):
    placement = Placement(experts, devices)
    assert placement.slots % devices == 0
    assert experts <= placement.slots < experts + devices
    assert len(set(placement.slot_of)) == experts
    owners = [expert for device in range(devices) for expert in placement.experts_on(device)]
    assert owners == list(range(experts))
    for device in range(devices):
        for expert in placement.experts_on(device):
            assert placement.slot_of[expert] // placement.slots_per_device == device


def test_six_experts_on_four_devices_leave_the_last_one_empty():
    placement = Placement(6, 4)
    assert (placement.slots, placement.slots_per_device) == (8, 2)
    assert [list(placement.experts_on(device)) for device in range(4)] == [[0, 1], [2, 3], [4, 5], []]
