"""The package against the transformers that is installed now. Needs the `parity` extra; run with `-m parity`.

`golden.make` runs transformers; it is imported by a fixture, so that collecting these tests needs no torch.
"""

import importlib
import json
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from test_golden import load_golden, relative_error
from tiny import CONFIGS, sparse_layers, tensor_shapes, write_checkpoint

import moejax
from moejax.inference.chat import render_chat
from moejax.inference.sampling import Filters, filtered, repetition_penalty

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore:::torch|transformers")]

# The three meshes that matter, each family on all of them; `test_golden` has more.
MESHES = ("ep=4,tp=2", "ep=1,tp=1", "ep=2,tp=4")
MESH_OF = {name: MESHES[index % 3] for index, name in enumerate(CONFIGS)}
DEMO = Path(moejax.__file__).parent / "demo"


@pytest.fixture(scope="session")
def make() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("golden.make")


@pytest.fixture(scope="module", params=CONFIGS)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def now(make, name) -> dict[str, np.ndarray]:
    """What the installed transformers gives for the golden's seed."""
    return make.compute(name, int(load_golden(name)["seed"]))[0]


@pytest.fixture(scope="module")
def folder(name, tmp_path_factory) -> Path:
    raw = CONFIGS[name] | {"eos_token_id": None}
    return write_checkpoint(tmp_path_factory.mktemp(name), raw, seed=int(load_golden(name)["seed"]), shards=2)


@pytest.fixture(scope="module")
def model(name, folder):
    return moejax.load(str(folder), mesh=moejax.make_mesh(MESH_OF[name]), dtype="float32")


def test_goldens_are_what_the_installed_transformers_gives(name, now):
    golden = load_golden(name)
    assert set(golden) == set(now)
    for key, stored in golden.items():
        if stored.dtype == np.float32 and key != "margins":
            assert relative_error(now[key], stored) <= 1e-5, key
        elif key != "margins":
            assert np.array_equal(now[key], stored), key


def test_logits_and_routing(name, model, now):
    out = model(now["tokens"].astype(np.int32), output_router_logits=True, output_hidden_states=True)
    logits = np.asarray(out.logits)
    assert relative_error(np.concatenate([logits[0], logits[1, -4:]]), now["logits"]) <= 1e-4
    for layer in range(len(sparse_layers(CONFIGS[name]))):
        assert relative_error(out.router_logits[layer], now["router_logits"][layer]) <= 1e-4
        chosen = np.sort(np.asarray(out.routed_experts[layer]), axis=-1)
        assert np.array_equal(chosen, np.sort(now["routed_experts"][layer], axis=-1))
    for hidden, expected in zip(out.hidden_states, now["hidden_states"], strict=True):
        assert relative_error(np.asarray(hidden)[0, ::4], expected) <= 1e-4


def test_greedy_tokens(model, now):
    prompts = [part.tolist() for part in np.split(now["prompts"], np.cumsum(now["prompt_lengths"])[:-1])]
    outs = moejax.generate(model, prompts, max_new_tokens=64, temperature=0.0)
    assert [list(out.tokens) for out in outs] == now["greedy"].tolist()


def test_attention_mask(make, model, now):
    for variant, (mask, with_positions) in make.mask_variants().items():
        positions = np.maximum(np.cumsum(mask, axis=-1) - 1, 0).astype(np.int32)
        options = {"positions": positions} if with_positions else {}
        logits = np.asarray(model(now["mask_tokens"].astype(np.int32), attention_mask=mask.astype(np.int32), **options))
        compared = np.concatenate([logits[0, -1:], logits[1, mask[1] == 1]])
        assert relative_error(compared, now[f"masked_{variant}"]) <= 1e-4, variant


def test_save_pretrained_loads_in_transformers_to_the_same_logits(make, name, model, now, tmp_path):
    moejax.save_pretrained(model, tmp_path)
    logits = make.forward(make.load_reference(tmp_path), now["tokens"]).logits.numpy()
    assert relative_error(np.concatenate([logits[0], logits[1, -4:]]), now["logits"]) <= 1e-5
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == CONFIGS[name]["model_type"]


def test_transformers_own_files_load(make, name, folder, now, tmp_path):
    """The other direction, and the other spelling: transformers 5 rewrites the hub's as rope_parameters and dtype."""
    make.load_reference(folder).save_pretrained(tmp_path)
    assert "rope_parameters" in json.loads((tmp_path / "config.json").read_text())
    model = moejax.load(str(tmp_path), mesh=moejax.make_mesh("ep=2,tp=2"), dtype="float32")
    logits = np.asarray(model(now["tokens"].astype(np.int32)))
    assert relative_error(np.concatenate([logits[0], logits[1, -4:]]), now["logits"]) <= 1e-4


def test_the_tensors_described_are_those_transformers_saves(make, name, folder, tmp_path):
    safetensors = importlib.import_module("safetensors")
    make.load_reference(folder).save_pretrained(tmp_path)
    with safetensors.safe_open(tmp_path / "model.safetensors", "np") as file:
        saved = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    assert saved == tensor_shapes(CONFIGS[name])


@pytest.fixture(scope="module")
def demo_reference(make):
    return make.load_reference(DEMO)


@pytest.fixture(scope="module")
def demo():
    return moejax.load("demo", mesh=moejax.make_mesh("ep=4,tp=2"), dtype="float32")


def test_demo_generates_what_transformers_generates(make, demo, demo_reference):
    prompts = [[17], list(range(300, 340)), [4000, 5, 1234, 77, 801]]
    outs = moejax.generate(demo, prompts, max_new_tokens=32, temperature=0.0)
    for prompt, out in zip(prompts, outs, strict=True):
        expected, margins = make.greedy(demo_reference, np.array(prompt), new_tokens=32)
        tie = int(np.argmax(np.append(margins < 1e-5, True)))
        # moejax stops at <|endoftext|>; the reference goes past it.
        compared = min(tie, len(out.tokens))
        assert compared >= 5
        assert list(out.tokens[:compared]) == expected[:compared].tolist()


def test_demo_text_is_that_of_the_tokenizer(demo):
    transformers = importlib.import_module("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(DEMO / "tokenizer.json"))
    prompt = "Once upon a time, café — 你好!\n\n  def f(x):"
    by_text, by_ids = (
        moejax.generate(demo, [p], max_new_tokens=12, temperature=0.0)[0] for p in (prompt, tokenizer(prompt).input_ids)
    )
    assert list(by_text.tokens) == list(by_ids.tokens)
    assert by_text.text == tokenizer.decode(by_text.tokens, skip_special_tokens=True)


TRICKY = """{%- set ns = namespace(system='', n=0) -%}
{%- for message in messages if message.role == 'system' -%}
    {%- set ns.system = message.content -%}
{%- endfor -%}
{{ bos_token }}{% if ns.system %}<<SYS>>{{ ns.system | trim }}<</SYS>>
{% endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- if (message.role == 'user') != (ns.n % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- set ns.n = ns.n + 1 %}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
    {%- else %}
[INST] {{ message.content.split('</think>')[-1].lstrip('\\n') }}
    {{- {'n': ns.n, 'é': '<&>'} | tojson(indent=2) }} [/INST]
    {%- endif %}
{%- endfor %}
{%- if tools is not none or documents is defined and documents %}tools{% endif %}
{%- if add_generation_prompt %}
<|assistant|>{% endif %}
"""
CHATML = """{% for message in messages %}
    {% if loop.first and messages[0]['role'] != 'system' %}
<|im_start|>system
You are a helpful assistant.<|im_end|>
    {% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{% endfor %}
  {% if add_generation_prompt %}
    {{ '<|im_start|>assistant\\n' }}
  {% endif %}
"""
CHATS = (
    [{"role": "user", "content": "Hi <b>'you'</b> & \n\n  more  "}],
    [
        {"role": "system", "content": " Be brief. \n"},
        {"role": "user", "content": "old</think>\n\nnew é"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "{{ 7 * 7 }}"},
    ],
)


@pytest.mark.parametrize("template", [TRICKY, CHATML], ids=["tricky", "chatml"])
@pytest.mark.parametrize("messages", CHATS, ids=["one", "several"])
def test_chat_templates_render_as_apply_chat_template(template, messages):
    transformers = importlib.import_module("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(DEMO / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )
    expected = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert render_chat(template, messages, {"bos_token": "<s>", "eos_token": "</s>"}) == expected


@pytest.mark.parametrize(
    "filters",
    [
        Filters(temperature=0.7),
        Filters(temperature=1.0, top_k=5),
        Filters(temperature=1.0, top_k=1),
        Filters(temperature=1.3, top_p=0.8),
        Filters(temperature=1.0, top_p=0.05),
        Filters(temperature=0.9, min_p=0.1),
        Filters(temperature=1.1, top_k=20, top_p=0.9, min_p=0.05),
    ],
    ids=str,
)
def test_filters_keep_what_transformers_warpers_keep(filters):
    torch = importlib.import_module("torch")
    process = importlib.import_module("transformers.generation.logits_process")
    logits = 3 * np.random.RandomState(0).standard_normal((64, 96)).astype(np.float32)
    warpers = [process.TemperatureLogitsWarper(filters.temperature)]
    if filters.top_k:
        warpers.append(process.TopKLogitsWarper(filters.top_k))
    if filters.top_p < 1:
        warpers.append(process.TopPLogitsWarper(filters.top_p))
    if filters.min_p:
        warpers.append(process.MinPLogitsWarper(filters.min_p))
    scores = torch.tensor(logits)
    for warper in warpers:
        scores = warper(torch.zeros((64, 1), dtype=torch.long), scores)
    ours, theirs = np.asarray(filtered(logits, filters)), scores.numpy()
    assert np.array_equal(np.isfinite(ours), np.isfinite(theirs))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize("penalty", [1.3, 0.6])
def test_repetition_penalty_is_that_of_transformers(penalty):
    torch = importlib.import_module("torch")
    process = importlib.import_module("transformers.generation.logits_process")
    random = np.random.RandomState(1)
    logits, ids = random.standard_normal((8, 96)).astype(np.float32), random.randint(0, 96, (8, 30))
    expected = process.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(ids), torch.tensor(logits)).numpy()
    seen = np.zeros(logits.shape, bool)
    seen[np.arange(8)[:, None], ids] = True
    np.testing.assert_allclose(np.asarray(repetition_penalty(logits, seen, penalty)), expected, rtol=1e-6)
