"""Parameters as one device stores them and as a mesh does: both ways, for what every kind of layer holds."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import write_checkpoint
from tiny_configs import CONFIGS

import moejax
from moejax.stored_forms import PADDING, StoredForm, stored_forms

# Experts, heads, widths and vocabularies that the meshes do not divide.
UNEVEN = ("qwen2_sparse_step", "qwen3_yarn", "olmoe_clip")


@pytest.mark.parametrize("name", UNEVEN)
def test_loaded_parameters_go_both_ways(name, tmp_path, mesh):
    folder = write_checkpoint(tmp_path / "model", CONFIGS[name])
    here = moejax.load(folder, mesh=mesh("ep=1,tp=1")).parameters()
    for spec in ("ep=4,tp=2", "ep=1,tp=8"):
        model = moejax.load(folder, mesh=mesh(spec))
        forms = stored_forms(model.config, model.mesh)
        assert any(form.axes for form in forms.values())
        for role, there in model.parameters().items():
            np.testing.assert_array_equal(forms[role].expand(here[role]), there, err_msg=role)
            np.testing.assert_array_equal(forms[role].contract(there), here[role], err_msg=role)


def test_copies_share_their_gradient_and_count_once():
    form = StoredForm({1: np.array([0, 0, 1, PADDING], np.int32)})
    gradient = jnp.array([[1.0, 2, 3, 0], [4, 5, 6, 0]])
    summed = form.summed(gradient)
    np.testing.assert_array_equal(summed, [[3, 3, 3, 0], [9, 9, 6, 0]])
    assert form.square_sum(summed) == 3**2 + 3**2 + 9**2 + 6**2
