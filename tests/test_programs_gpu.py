"""The real steps as 8 H100s would run them, read from the schedule that the compiler made for them."""

import re

import pytest
from program_cases import EP, TP, WIDTH, Case, compiled, documented_bytes, moved_bytes

from moejax.planning.flops import dot_flops
from moejax.planning.schedule import flights

pytest.importorskip("jax_cuda12_plugin", reason="compiles for GPUs with JAX's CUDA plugin")
pytestmark = pytest.mark.deviceless

MIXTRAL, GPT_OSS, DEEPSEEK = "mixtral-8x7b", "gpt-oss-120b", "deepseek-v3"
PREFILL = [Case(MIXTRAL), Case(GPT_OSS, slices=4), Case(DEEPSEEK, chunk=256)]
DECODE = [Case(MIXTRAL, chunk=1), Case(GPT_OSS, chunk=1), Case(DEEPSEEK, chunk=1), Case(MIXTRAL, batch=1, chunk=1)]
SHARES = 32
"""The most programs of the attention kernel that share out the keys of one query, at 8k places."""
KERNELS = {"__gpu$xla.gpu.triton"}
"""Custom calls of our own kernels; all else must be visible to `dot_flops`."""


def all_cases(test):
    return pytest.mark.parametrize("case", [*PREFILL, *DECODE], ids=lambda case: case.name)(test)


@all_cases
def test_bytes_on_each_axis_are_the_documented_ones(case):
    """To the byte, so no weight is gathered, and no token that a strategy says stays where it is."""
    assert moved_bytes(compiled(case).moved) == documented_bytes(case)


@all_cases
def test_experts_are_not_expanded_densely(case):
    """Dense products count no more than one matrix for each row, loops once: not every row times every expert."""
    config, program = case.config, compiled(case).program
    assert {line.target for line in program.instructions() if line.opcode == "custom-call"} <= KERNELS
    rows, width = case.exchanged * case.slices, config.hidden_size
    waves = 2 if case.cut else 1
    experts = waves * 2 * rows * 3 * width * case.hidden
    dense = 2 * case.tokens * 3 * width * case.moe.shared_intermediate_size // TP
    head = 2 * case.rows * width * case.vocabulary
    attention = 2 * case.tokens * (parameters_of_attention(case) + 2 * width * case.moe.num_experts)
    assert dot_flops(program) <= experts + dense + head + attention + scores(case)


def parameters_of_attention(case):
    """Weights of one device that each token is multiplied by."""
    mixer, width = case.config.layers[0].mixer, case.config.hidden_size
    if not hasattr(mixer, "kv_rank"):
        return width * mixer.head_dim * (2 * mixer.num_heads + 2 * mixer.num_kv_heads) // TP
    query, head = mixer.nope_dim + mixer.rope.dim, mixer.nope_dim + mixer.value_dim
    whole = width * (mixer.query_rank + mixer.kv_rank + mixer.rope.dim)
    return whole + mixer.num_heads * (mixer.query_rank * query + mixer.kv_rank * head + mixer.value_dim * width) // TP


def scores(case):
    """Of attention over the whole cache."""
    mixer = case.config.layers[0].mixer
    heads = mixer.num_heads // TP
    if hasattr(mixer, "kv_rank"):
        return 2 * case.tokens * heads * case.room * 2 * (mixer.kv_rank + mixer.rope.dim)
    return 2 * case.tokens * heads * case.room * 2 * mixer.head_dim


@all_cases
def test_temporaries(case):
    """At most w (P C (2 D + 3 F) + 6 T D) for the rows of a slice on their way through the experts and the stream, four
    times the logits in f32, and when queries are few the partial results of those that share out the keys, also f32.
    Nothing grows with the experts, the weights or the cache."""
    width, mixer = case.config.hidden_size, case.config.layers[0].mixer
    rows = case.exchanged * (2 * width + 3 * case.hidden)
    heads = mixer.num_heads // TP // (1 if case.cut else EP)
    value = mixer.kv_rank + mixer.rope.dim if hasattr(mixer, "kv_rank") else mixer.head_dim
    partial = SHARES * case.tokens * heads * (value + 1) if case.chunk == 1 else 0
    logits = 4 * case.rows * case.config.vocab_size
    bound = WIDTH * (rows + 6 * case.tokens * width) + 4 * (logits + partial)
    assert compiled(case).executable.memory_analysis().temp_size_in_bytes <= bound


@all_cases
def test_weights_of_experts_are_read_where_they_are(case):
    """No kernel makes an array of the form of an expert's matrices: not gathered, sliced, transposed or unpacked."""
    width, hidden = case.config.hidden_size, case.hidden
    assert hidden not in (case.tokens, case.exchanged), "what rows make could not be told from matrices"
    matrices = {(width, 2 * hidden), (2 * hidden, width), (width, hidden), (hidden, width), (width, 2, hidden)}
    for line in compiled(case).program.kernels():
        for made in line.result:
            assert made.shape[-2:] not in matrices and made.shape[-3:] not in matrices, line


@all_cases
def test_nothing_passes_through_the_host(case):
    for line in compiled(case).program.instructions():
        assert line.opcode not in ("send", "recv", "infeed", "outfeed"), line
        assert "callback" not in line.target, line
    assert "S(5)" not in compiled(case).executable.as_text(), "an array in the host's memory"


@all_cases
def test_caches_are_updated_in_place(case):
    """All of a step is donated and aliased, and no copy has the size of a cache."""
    run = compiled(case)
    memory = run.executable.memory_analysis()
    caches = [buffer.bytes for line in run.program.computations[run.program.entry] for buffer in cache_of(line)]
    assert caches
    assert memory.alias_size_in_bytes >= sum(caches)
    assert not [line for line in run.program.kernels() if line.opcode == "copy" and line.bytes >= min(caches)]


def cache_of(line):
    """The caches among the arguments, which go by their names in the step."""
    return line.result if line.opcode == "parameter" and re.match(r"step\.caches", line.scope) else ()


@pytest.mark.parametrize("case", PREFILL, ids=lambda case: case.name)
def test_long_prompts_hold_no_scores(case):
    """A block of queries meets the cache block by block: nothing holds a score for each query and place."""
    heads = case.config.layers[0].mixer.num_heads // TP
    for line in compiled(case).program.kernels():
        if "attention" in line.scope.split("/"):
            assert all(made.size < heads * case.tokens * case.room // 4 for made in line.result), line


def test_slices_of_the_exchange_travel_behind_the_experts():
    """With 4 slices 6 of 8 exchanges: all but the first arrival and the last return have experts to run meanwhile."""
    program = compiled(Case(GPT_OSS, slices=4)).program
    hidden = [flight.hides_behind("experts") for flight in flights(program, "all-to-all")]
    assert len(hidden) == 16, "a wave, and the loop of further waves"
    assert sum(hidden[:8]) >= 5 and sum(hidden[8:]) >= 5


def test_one_row_reads_its_part_of_the_head_where_it_is():
    """Replicated rows divide the vocabulary over ep: each device reads its block of the head, copying nothing."""
    case = Case(MIXTRAL, batch=1, chunk=1)
    for line in compiled(case).program.kernels():
        if "lm_head" in line.scope.split("/"):
            assert line.bytes <= 4 * case.config.vocab_size, line
