"""verify finds the newer families sound, on meshes that divide nothing of their tiny models."""

import jax
import pytest
from test_golden_families import load_golden
from tiny_families import CONFIGS, FIRST

from moejax import make_mesh
from moejax.twins.writing import write_checkpoint
from moejax.verification.run import Verifier


@pytest.mark.slow
@pytest.mark.parametrize("name", FIRST)
def test_first_config_of_each_family(name, tmp_path):
    write_checkpoint(tmp_path, CONFIGS[name], seed=int(load_golden(name)["seed"]))
    verifier = Verifier(tmp_path)
    rows = [
        *verifier.rows([make_mesh("ep=4,tp=2")], ["all_to_all"]),
        *verifier.rows([make_mesh("ep=2,tp=4")], ["all_reduce"]),
    ]
    jax.clear_caches()
    assert [row.ok for row in rows] == [True] * 2, rows
    assert max(row.max_rel_err for row in rows) <= 1e-5
