"""Verification: sound models pass on every mesh, and whatever is broken in one is found where it is."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import CONFIGS, write_checkpoint

from moejax.language_model import LanguageModel
from moejax.loading import load
from moejax.verification.compare import Observed, Row, judge, relative_error
from moejax.verification.oracle import Reference
from moejax.verification.run import Verifier, verification_prompts

Meshes = Callable[[str], jax.sharding.Mesh]

MESHES = ("ep=1,tp=1", "ep=2", "tp=2", "ep=4", "tp=4", "ep=4,tp=2", "ep=2,tp=4", "ep=8", "tp=8", "ep=3,tp=2")
STRATEGIES = ("auto", "all_to_all", "all_reduce")
ONE_LAYER: dict[str, Any] = {"num_hidden_layers": 1}


def check(raw: dict[str, Any], folder: Path, mesh: jax.sharding.Mesh, strategy: str = "auto") -> Row:
    (row,) = Verifier(write_checkpoint(folder, raw)).rows([mesh], [strategy])
    return row


@pytest.mark.parametrize(
    ("name", "changes", "spec", "strategy"),
    [
        ("mixtral_dynamic", ONE_LAYER, "ep=4", "all_reduce"),  # 6 experts, dynamic rope, odd vocabulary
        ("qwen2_dynamic", ONE_LAYER, "ep=3,tp=2", "all_reduce"),  # 8 experts on ep=3, a gated shared expert
        ("qwen3_bias", ONE_LAYER, "tp=4", "auto"),
        ("olmoe_plain", ONE_LAYER | {"num_experts": 4, "num_experts_per_tok": 4}, "ep=2,tp=2", "all_reduce"),  # K = E
        # A context of 8 tokens, shorter than any prompt wants to be; no sparse layer at all.
        ("qwen3_llama3", ONE_LAYER | {"num_experts": 0, "max_position_embeddings": 8}, "ep=2,tp=2", "auto"),
    ],
)
def test_each_family_is_sound(
    name: str, changes: dict[str, Any], spec: str, strategy: str, tmp_path: Path, mesh: Meshes
):
    row = check(CONFIGS[name] | changes, tmp_path, mesh(spec), strategy)
    assert (row.ok, row.greedy_match, row.dropped, row.first_bad_layer) == (True, True, 0, None), row
    assert row.max_rel_err <= 1e-5
    assert row.strategy == strategy


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_every_mesh_and_strategy_is_sound(name: str, tmp_path: Path, mesh: Meshes):
    rows = list(Verifier(write_checkpoint(tmp_path, CONFIGS[name])).rows(list(map(mesh, MESHES)), STRATEGIES))
    assert len(rows) == len(MESHES) * len(STRATEGIES)
    assert [row for row in rows if not row.ok] == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_demo_is_sound_in_every_dtype(dtype: str, mesh: Meshes):
    from moejax.checkpoint.source import resolve

    rows = list(Verifier(resolve("demo"), dtype).rows(list(map(mesh, MESHES)), STRATEGIES))
    assert [row for row in rows if not row.ok] == []


def change_router(folder: Path, layer: int, change: Callable[[np.ndarray], None]) -> Path:
    """Changes the rows, one an expert, of a Mixtral layer's router in the file."""
    file, name = folder / "model.safetensors", f"model.layers.{layer}.block_sparse_moe.gate.weight"
    tensors = load_file(file)
    tensors[name] = tensors[name].copy()
    change(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def never_choose_expert_6(rows: np.ndarray) -> None:
        # Of two opposite logits one is not negative, so that two experts of lower index always stand before 6.
        rows[1], rows[3], rows[6] = -rows[0], -rows[2], 0

    folder = write_checkpoint(tmp_path_factory.mktemp("two"), CONFIGS["mixtral_plain"])
    return change_router(folder, 1, never_choose_expert_6)


@pytest.fixture(scope="module")
def verifier(two_layers: Path) -> Verifier:
    return Verifier(two_layers)


@pytest.fixture(scope="module")
def model(two_layers: Path, mesh: Meshes) -> LanguageModel:
    """One model for all damages, so that its programs are compiled once."""
    return load(two_layers, mesh=mesh("ep=2,tp=2"), strategy="all_to_all")


@contextmanager
def damaged(
    model: LanguageModel, role: str, change: Callable[[np.ndarray], None], device: int | None
) -> Iterator[None]:
    """Changes a parameter's shards in place, all alike or, of one device, its own alone; puts it back at the end."""
    leaf: Any = functools.reduce(
        lambda at, name: at[int(name)] if name.isdigit() else getattr(at, name), role.split("."), model.decoder
    )
    sound = leaf[...]
    parts = [np.array(shard.data) for shard in sound.addressable_shards]
    for part in parts if device is None else parts[device : device + 1]:
        change(part)
    placed = [jax.device_put(part, shard.device) for part, shard in zip(parts, sound.addressable_shards, strict=True)]
    leaf[...] = jax.make_array_from_single_device_arrays(sound.shape, sound.sharding, placed)
    try:
        yield
    finally:
        leaf[...] = sound


def flip(*index: int | slice) -> Callable[[np.ndarray], None]:
    def change(part: np.ndarray) -> None:
        part[index] *= -1

    return change


def test_a_sound_model_passes_and_its_margin_is_told(verifier: Verifier, model: LanguageModel):
    row = verifier.check(model)
    assert (row.mesh, row.strategy, row.ok, row.ties, row.first_bad_layer) == ("ep=2,tp=2", "all_to_all", True, 0, None)
    assert row.min_margin is not None and 1e-5 < row.min_margin < 1
    assert (row.argmax_agreement, row.kl) == (None, None)


@pytest.mark.parametrize(
    ("role", "change", "device", "layer"),
    [
        # A device holds 4 of the 8 experts; gate and up are [4, 32, 2, 24] there and down is [4, 24, 32].
        ("layers.0.moe.gate_up", flip(3, 5), 0, 0),
        ("layers.1.moe.gate_up", flip(0, slice(None), 1, 7), 3, 1),
        ("layers.0.moe.down", flip(2, 11), 2, 0),
        ("layers.1.moe.down", flip(1, 0), 1, 1),
        ("layers.1.moe.router", flip(slice(None), 3), None, 1),
        ("layers.0.attention.k", flip(3), None, 0),
        ("layers.1.attention.o", flip(1, 2), None, 1),
        # One replica: ep device 1 computes prompts 2 and 3 with it.
        ("layers.1.attention.q", flip(4), 2, 1),
        ("layers.1.mlp_norm.weight", flip(9), None, 1),
        ("lm_head", flip(17), 1, "head"),
    ],
)
def test_one_flipped_row_is_found_in_its_layer(
    role: str,
    change: Callable[[np.ndarray], None],
    device: int | None,
    layer: int | str,
    verifier: Verifier,
    model: LanguageModel,
):
    with damaged(model, role, change, device):
        row = verifier.check(model)
    assert (row.ok, row.first_bad_layer) == (False, layer), row


def test_a_flipped_row_of_an_expert_that_no_prompt_chooses_is_found(verifier: Verifier, model: LanguageModel):
    assert verifier.check(model).ok
    chosen = {int(expert) for reference in verifier._references.values() for expert in reference.experts[1].ravel()}
    assert 6 not in chosen
    # Expert 6 is the third of ep device 1, and its last hidden columns lie on that device's tp device 1.
    with damaged(model, "layers.1.moe.down", flip(2, 3), 3):
        row = verifier.check(model)
    assert (row.ok, row.first_bad_layer, row.greedy_match) == (False, 1, True)
    assert row.max_rel_err <= 1e-5  # the logits alone would have shown nothing


def test_a_flipped_embedding_row_is_found(verifier: Verifier, model: LanguageModel):
    # Of a token that a prompt holds; the table is cut over tp, half of it a device.
    token = verifier.prompts[2][4]
    with damaged(model, "embed", flip(token % 48), token // 48):
        row = verifier.check(model)
    assert (row.ok, row.first_bad_layer) == (False, "embedding"), row


def test_a_weight_that_is_not_a_number_is_not_ok(verifier: Verifier, model: LanguageModel):
    def spoil(part: np.ndarray) -> None:
        part[1, 2, 3] = np.nan

    with damaged(model, "layers.1.moe.down", spoil, 0):
        row = verifier.check(model)
    assert (row.ok, row.first_bad_layer) == (False, 1)


TIED = CONFIGS["mixtral_plain"] | ONE_LAYER


def tied_experts(folder: Path) -> Path:
    def duplicate(rows: np.ndarray) -> None:
        rows[5] = rows[0]

    return change_router(write_checkpoint(folder, TIED), 0, duplicate)


def test_exact_router_ties_end_the_comparison_and_are_counted(tmp_path: Path, mesh: Meshes):
    (row,) = Verifier(tied_experts(tmp_path)).rows([mesh("ep=4,tp=2")], ["all_reduce"])
    assert (row.ok, row.greedy_match) == (True, True), row
    assert 1 <= row.ties <= 4


@pytest.mark.slow
def test_exact_router_ties_are_sound_on_every_mesh(tmp_path: Path, mesh: Meshes):
    rows = list(Verifier(tied_experts(tmp_path)).rows(list(map(mesh, MESHES)), STRATEGIES))
    assert [row for row in rows if not row.ok] == []
    # The greedy tokens are the same up to the ties, and so are the prompts that hold one.
    assert min(row.ties for row in rows) >= 1


def test_prompts_leave_room_to_generate_and_stay_in_the_trained_length():
    from moejax.families import read_config

    for length, lengths in ((128, [1, 7, 12, 24]), (24, [1, 7, 12, 12]), (8, [1, 4, 4, 4]), (1, [1, 1, 1, 1])):
        prompts = verification_prompts(read_config(CONFIGS["mixtral_plain"] | {"max_position_embeddings": length}))
        assert [len(prompt) for prompt in prompts] == lengths
        assert all(0 <= token < 96 for prompt in prompts for token in prompt)


# Two sequences of six tokens, three of them prompts, through two layers of which the second has four experts.
B, S, V, E, D = 2, 6, 5, 4, 3


def reference() -> Reference:
    random = np.random.default_rng(0)
    logits = random.permuted(np.tile(np.arange(V, dtype=np.float32), (B, S, 1)), axis=-1)
    scores = random.permuted(np.tile(np.float32([0.1, 0.2, 0.3, 0.4]), (B, S, 1)), axis=-1)
    states = [random.standard_normal((B, S, D)).astype(np.float32) for _ in range(3)]
    margins = np.full((B, S), 0.25, np.float32)  # 0.3 against 0.2, of 0.4
    return Reference(logits, states, [margins], [np.argsort(-scores, -1)[..., :2]])


def verdict(
    change_reference: Callable[[Reference], None] = lambda _: None,
    change_observed: Callable[[Observed], None] = lambda _: None,
    *,
    dropped: int = 0,
    expert_error: float = 0.0,
    narrow: bool = False,
) -> Row:
    """The verdict on a model that computes the reference, then changed; its tokens are its own best."""
    wanted = reference()
    observed = Observed(
        wanted.logits.copy(), [x.copy() for x in wanted.hidden_states], [wanted.experts[0][..., ::-1].copy()], dropped
    )
    change_reference(wanted)
    change_observed(observed)
    tokens = np.zeros((B, S), np.int32)
    tokens[:, 3:] = observed.logits.argmax(-1)[:, 2:-1]
    lengths, prompts = np.full(B, S), np.full(B, 3)
    errors = {1: expert_error}
    return judge("ep=2", "auto", wanted, observed, tokens, prompts, lengths, errors, [1], narrow)


def at(array: str, *index: Any, add: Any = 1.0) -> Callable[[Any], None]:
    """Adds to one place of an array of a Reference or of an Observed."""

    def change(what: Any) -> None:
        target = getattr(what, array)
        place = index[isinstance(target, list) :]
        whole = target[index[0]] if isinstance(target, list) else target
        whole[place] = whole[place] + add

    return change


def test_the_same_figures_are_ok_whatever_the_order_of_the_experts():
    row = verdict()
    assert (row.ok, row.max_rel_err, row.greedy_match, row.ties, row.first_bad_layer) == (True, 0, True, 0, None)
    assert row.min_margin == pytest.approx(0.25)  # the logits 4 and 3 of 4; the scores 0.3 and 0.2 of 0.4 as well


@pytest.mark.parametrize(
    ("change", "layer"),
    [
        (at("hidden_states", 0, 0, 0), "embedding"),
        (at("hidden_states", 1, 1, 5), 0),
        (at("hidden_states", 2, 0, 3, 1, add=np.nan), 1),
        (at("experts", 0, 1, 2, 0), 1),
        (at("logits", 0, 1, 0), "head"),
        (at("logits", 0, 1, 0, add=np.nan), "head"),
        (at("logits", 0, 1, 0, add=np.inf), "head"),
    ],
)
def test_a_difference_without_a_tie_fails_and_is_located(change: Callable[[Observed], None], layer: int | str):
    row = verdict(change_observed=change)
    assert (row.ok, row.first_bad_layer) == (False, layer)


def test_other_greedy_tokens_fail_even_where_logits_are_close():
    def swap(observed: Observed) -> None:
        observed.logits[0, 4] = observed.logits[0, 4, ::-1]

    row = verdict(change_observed=swap)
    assert (row.ok, row.greedy_match) == (False, False)


def test_dropped_pairs_fail():
    row = verdict(dropped=1)
    assert (row.ok, row.dropped, row.first_bad_layer) == (False, 1, None)


def test_experts_that_fail_alone_fail_the_row():
    assert verdict(expert_error=1e-4).first_bad_layer == 1
    assert verdict(expert_error=float("inf")).first_bad_layer == 1
    assert verdict(expert_error=1e-6).ok


def tie_scores(wanted: Reference) -> None:
    """Sequence 0 has a routing tie at token 2."""
    wanted.margins[0][0, 2] = 1e-6


def test_a_sequence_is_compared_up_to_its_first_tie():
    for late in (at("logits", 0, 2, add=50), at("experts", 0, 0, 5), at("hidden_states", 2, 0, 4, add=9)):
        row = verdict(tie_scores, late)
        assert (row.ok, row.ties, row.greedy_match) == (True, 1, True), row
    for early in (at("logits", 0, 1, 0), at("logits", 1, 4, 0), at("experts", 0, 1, 5)):
        row = verdict(tie_scores, early)
        assert (row.ok, row.ties) == (False, 1), row


def test_a_tie_of_logits_counts_only_where_a_token_was_drawn_from_them():
    def tie(token: int) -> Callable[[Reference], None]:
        def change(wanted: Reference) -> None:
            wanted.logits[1, token] = [4, 4, 0, 1, 2]

        return change

    assert verdict(tie(0), tie(0)).ties == 0
    assert verdict(tie(3), tie(3)).ties == 1


def test_a_16_bit_dtype_is_judged_by_agreement_and_divergence():
    near = verdict(change_observed=at("logits", slice(None), add=np.float32(0.5)), narrow=True)
    assert (near.ok, near.argmax_agreement, near.first_bad_layer) == (True, 1.0, None)
    assert near.kl == pytest.approx(0, abs=1e-6)
    far = verdict(change_observed=at("logits", 0, 1, 0, add=3), narrow=True)
    assert far.ok is False
    assert verdict(change_observed=at("logits", 0, 1, 0, add=np.nan), narrow=True).ok is False
    assert verdict(narrow=True, dropped=1).ok is False
    assert verdict(narrow=True, expert_error=0.01).ok
    experts = verdict(narrow=True, expert_error=0.02)
    assert (experts.ok, experts.first_bad_layer) == (False, 1)


def test_an_error_is_relative_to_the_largest_and_infinite_when_not_finite():
    a, b = np.float32([[[1, -4], [9, 9]]]), np.float32([[[2, -4], [0, 0]]])
    assert relative_error(a, b, np.array([[True, False]])) == 0.25
    assert relative_error(a, b, np.array([[False, False]])) == 0.0
    assert relative_error(a + np.nan, b, np.array([[True, True]])) == float("inf")
