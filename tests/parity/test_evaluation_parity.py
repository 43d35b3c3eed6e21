"""Losses of texts against those that transformers computes. Needs the `parity` extra; run with `-m parity`."""

import math
from pathlib import Path

import pytest
from text_cases import DOCUMENTS, write_readable, write_texts

import moejax
from moejax.evaluation.evaluator import evaluate

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore:::torch|transformers")]

DEMO = Path(moejax.__file__).parent / "demo"


@pytest.mark.parametrize("spec", ["ep=1,tp=1", "ep=4,tp=2"])
@pytest.mark.parametrize("name", ["tiny", "demo"])
def test_the_loss_is_that_of_transformers(name, spec, mesh, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = write_readable(tmp_path / "model") if name == "tiny" else DEMO
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    begin, end = (1, 2) if name == "tiny" else (0, 0)
    nats, targets = [0.0, 0.0], [0, 0]
    for number, text in enumerate(DOCUMENTS):
        ids = torch.tensor([[begin, *tokenizer(text, add_special_tokens=False).input_ids, end]])
        with torch.no_grad():
            loss = peer(input_ids=ids, labels=ids).loss.item()
        nats[number // 2] += loss * (ids.shape[1] - 1)
        targets[number // 2] += ids.shape[1] - 1

    model = moejax.load(folder, mesh=mesh(spec), dtype="float32")
    length = min(model.config.context, 256)
    results = evaluate(model, write_texts(tmp_path), length=length, batch=4)
    for result, theirs, count, texts in zip(results, nats, targets, (DOCUMENTS[:2], DOCUMENTS[2:]), strict=True):
        assert result.targets == count
        if count <= length:  # otherwise a document goes on in a second row
            assert result.loss == pytest.approx(theirs / count, rel=1e-5)
            size = sum(len(text.encode()) for text in texts)
            assert result.bits_per_byte == pytest.approx(theirs / math.log(2) / size, rel=1e-5)
    assert any(count <= length for count in targets)
