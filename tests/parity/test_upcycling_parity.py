"""Dense models in transformers against the mixtures they become, there and here. Needs the `parity` extra."""

import importlib
import warnings
from types import ModuleType

import numpy as np
import pytest
from dense_cases import CONFIGS, write_dense

import moejax
from moejax.upcycling.copying import upcycle

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore:::torch|transformers")]

TOKENS = np.random.RandomState(0).randint(0, 96, (2, 24))


@pytest.fixture(scope="module")
def make() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("golden.make")


def relative_error(a, b) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_mixture_without_noise_has_the_dense_model_s_logits(make, name, tmp_path):
    source = write_dense(tmp_path / "dense", name)
    expected = make.forward(make.load_reference(source), TOKENS).logits.numpy()
    upcycle(source, tmp_path / "moe", experts=4, top_k=2)
    theirs = make.forward(make.load_reference(tmp_path / "moe"), TOKENS).logits.numpy()
    ours = moejax.load(tmp_path / "moe", mesh=moejax.make_mesh("ep=2,tp=1"))(TOKENS.astype(np.int32))
    assert relative_error(theirs, expected) <= 1e-4
    assert relative_error(ours, expected) <= 1e-4
