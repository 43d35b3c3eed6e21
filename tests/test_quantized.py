"""Regions of quantised tensors against the whole tensor dequantised by hand, and what is wrong with a checkpoint."""

import json
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.checkpoint.quantized import dequantised
from moejax.checkpoint.safetensors import DTYPES, ENCODED, CheckpointFiles
from moejax.errors import MoejaxError
from moejax.quantization import fp8, mxfp4

MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
FP8 = {"quant_method": "fp8", "weight_block_size": [4, 8], "activation_scheme": "dynamic"}
SPELLED = {dtype: name for name, dtype in (DTYPES | ENCODED).items()}


def write(folder: Path, tensors) -> Path:
    """A checkpoint of any dtypes; safetensors' own writer knows no float8 of numpy."""
    header, data = {}, b""
    for name, value in tensors.items():
        start, data = len(data), data + value.tobytes()
        header[name] = {
            "dtype": SPELLED[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [start, len(data)],
        }
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return folder


def mxfp4_tensors():
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (3, 6, 4, 16), np.uint8)
    scales = rng.integers(120, 130, (3, 6, 4), np.uint8)
    want = np.stack([mxfp4.unpack_host(b, s).T for b, s in zip(blocks, scales, strict=True)])
    return {"e.w_blocks": blocks, "e.w_scales": scales, "e.w_bias": np.ones(6, np.float32)}, "e.w", want


def fp8_tensors(lead=()):
    """By hand: every block times its scale."""
    q, scales = fp8.quantise(np.random.default_rng(0).standard_normal((*lead, 10, 21)), (4, 8))
    want = q.astype(np.float32)
    for row, column in np.ndindex(3, 3):
        part = np.s_[..., 4 * row : 4 * row + 4, 8 * column : 8 * column + 8]
        want[part] *= scales[..., row, None, column, None]
    return {"m.weight": q, "m.weight_scale_inv": scales, "norm": np.ones(6, np.float32)}, "m.weight", want


CASES = [(MXFP4, *mxfp4_tensors()), (FP8, *fp8_tensors()), (FP8, *fp8_tensors((2,)))]


@pytest.fixture(scope="module", params=CASES, ids=["mxfp4", "fp8", "stacked fp8"])
def case(request, tmp_path_factory):
    config, tensors, name, want = request.param
    with dequantised(CheckpointFiles.open(write(tmp_path_factory.mktemp("q"), tensors)), config) as files:
        yield files, name, want


def regions(shape):
    def part(extent):
        return st.tuples(st.integers(0, extent - 1), st.integers(1, extent), st.sampled_from([None, 1, 2, 3, 40])).map(
            lambda t: slice(t[0], min(t[0] + t[1], extent), t[2])
        )

    return st.tuples(*map(part, shape))


def test_tensors_are_those_of_the_unquantised_checkpoint(case):
    files, name, want = case
    assert len(files.tensors) == 2 and name in files.tensors
    assert files.tensors[name].shape == want.shape
    assert DTYPES[files.tensors[name].dtype] == want.dtype


@settings(deadline=None)
@given(st.data())
def test_any_region(case, data):
    files, name, want = case
    region = data.draw(regions(want.shape))
    got = files.read(name, region)
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, want[region], strict=True)


@settings(deadline=None)
@given(st.data())
def test_any_region_of_what_is_stored(tmp_path_factory, data):
    shape = data.draw(st.sampled_from([(), (5,), (4, 6), (2, 3, 4), (1, 3, 2, 5)]))
    region = data.draw(regions(shape))
    stored = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
    folder = tmp_path_factory.getbasetemp()
    with CheckpointFiles.open(write(folder, {"t": stored})) as files:
        np.testing.assert_array_equal(files.read("t", region), stored[region], strict=True)


def read_bytes(monkeypatch, files, name, region) -> int:
    preadv, counts = os.preadv, []

    def counting(*args):
        counts.append(preadv(*args))
        return counts[-1]

    monkeypatch.setattr(os, "preadv", counting)
    files.read(name, region)
    return sum(counts)


@pytest.mark.parametrize(
    ("config", "make", "region", "count"),
    [
        # One expert of three: two blocks of each of two outputs, 16 bytes and a scale a block.
        (MXFP4, mxfp4_tensors, np.s_[1:2, 40:90, 3:5], 2 * 2 * 17),
        # Every second output of all six, whole rows.
        (MXFP4, mxfp4_tensors, np.s_[1:2, 0:64, 0:6:2], 3 * 2 * 16 + 3 * 2),
        # Two rows of five columns; 2 x 1 scales of four bytes.
        (FP8, fp8_tensors, np.s_[3:5, 1:6], 10 + 2 * 4),
    ],
)
def test_only_the_regions_bytes_are_read(tmp_path, monkeypatch, config, make, region, count):
    tensors, name, _ = make()
    with dequantised(CheckpointFiles.open(write(tmp_path, tensors)), config) as files:
        assert read_bytes(monkeypatch, files, name, region) == count


def test_the_major_axis_keeps_regions_contiguous(tmp_path, monkeypatch):
    """Cut along it, a whole matrix is read in two calls: blocks and scales."""
    tensors, name, _ = mxfp4_tensors()
    with dequantised(CheckpointFiles.open(write(tmp_path, tensors)), MXFP4) as files:
        assert files.tensors[name].major == (0, 2, 1)
        calls = []
        preadv = os.preadv
        monkeypatch.setattr(os, "preadv", lambda *args: calls.append(args) or preadv(*args))
        files.read(name, np.s_[1:2, 0:128, 2:5])
        assert len(calls) == 2


def test_a_view_can_be_renamed(tmp_path):
    """As settling a tied head does."""
    tensors, name, want = fp8_tensors()
    files = dequantised(CheckpointFiles.open(write(tmp_path, tensors)), FP8)
    with CheckpointFiles(files.folder, {"other": files.tensors[name]}) as renamed:
        np.testing.assert_array_equal(renamed.read("other", np.s_[0:10, 0:21]), want)


def test_packed_bytes_can_be_read_as_they_are(tmp_path):
    tensors = mxfp4_tensors()[0]
    with CheckpointFiles.open(write(tmp_path, tensors)) as files:
        got = files.read("e.w_blocks", np.s_[0:3, 1:6:2, 1:3, 0:16])
    np.testing.assert_array_equal(got, tensors["e.w_blocks"][:, 1::2, 1:3], strict=True)


def test_what_is_not_quantised_stays(tmp_path):
    tensors = {
        "a": np.ones((2, 3), np.float32),
        "b_scales": np.ones(2, np.uint8),
        "c_scale_inv": np.ones(2, np.float32),
    }
    opened = CheckpointFiles.open(write(tmp_path, tensors))
    assert dequantised(opened, None) is opened
    for config in (MXFP4, FP8):
        assert dequantised(opened, config).tensors == opened.tensors


def without(name):
    return lambda tensors: tensors.pop(name)


def replaced(name, value):
    return lambda tensors: tensors.__setitem__(name, value)


ONLY = "moejax reads mxfp4, and fp8 with a weight_block_size: take another version of the checkpoint"
FAULTS = [
    (
        MXFP4,
        mxfp4_tensors,
        without("e.w_scales"),
        "e.w_blocks in F/model.safetensors is stored as U8 and its scale e.w_scales is missing; download it again",
    ),
    (
        MXFP4,
        mxfp4_tensors,
        replaced("e.w_scales", np.zeros((3, 6, 5), np.uint8)),
        "e.w_scales is U8 [3, 6, 5] and should be U8 [3, 6, 4] for e.w_blocks [3, 6, 4, 16]; "
        "are config.json and both tensors of the same checkpoint?",
    ),
    (
        MXFP4,
        mxfp4_tensors,
        replaced("e.w_blocks", np.zeros((3, 6, 64), np.uint8)),
        "e.w_blocks is U8 [3, 6, 64]; MXFP4 blocks are U8 [experts, outputs, inputs / 32, 16]: "
        "download the checkpoint again",
    ),
    (
        MXFP4,
        mxfp4_tensors,
        replaced("e.w", np.zeros(1, np.float32)),
        "tensor e.w is there both as values and as e.w_blocks; one must go",
    ),
    (
        FP8,
        fp8_tensors,
        without("m.weight_scale_inv"),
        "m.weight in F/model.safetensors is stored as F8_E4M3 and its scale m.weight_scale_inv is missing; "
        "download it again",
    ),
    (
        FP8 | {"weight_block_size": [128, 128]},
        fp8_tensors,
        None,
        "m.weight_scale_inv is F32 [3, 3] and should be F32 [1, 1] for m.weight [10, 21]; "
        "are config.json and both tensors of the same checkpoint?",
    ),
    (
        FP8,
        fp8_tensors,
        replaced("m.weight_scale_inv", np.zeros((3, 3), np.uint8)),
        "m.weight_scale_inv is U8 [3, 3] and should be F32 [3, 3] for m.weight [10, 21]; "
        "are config.json and both tensors of the same checkpoint?",
    ),
    *(
        (
            FP8 | {"weight_block_size": size},
            fp8_tensors,
            None,
            f"quant_method='fp8' has weight_block_size={size!r}, not two sizes such as [128, 128]; {ONLY}",
        )
        for size in (None, 128, [128], [0, 128], ["a", "b"])
    ),
    *(
        ({"quant_method": method}, fp8_tensors, None, f"F is quantised with quant_method={method!r}; {ONLY}")
        for method in ("gptq", "awq", "bitsandbytes", "compressed-tensors", "fbgemm_fp8", None)
    ),
]


@pytest.mark.parametrize(("config", "make", "damage", "message"), FAULTS)
def test_faults(tmp_path, config, make, damage, message):
    tensors = make()[0]
    if damage:
        damage(tensors)
    files = CheckpointFiles.open(write(tmp_path, tensors))
    message = re.sub(r"\bF(?=/| is)", str(tmp_path), message)
    with pytest.raises(MoejaxError) as raised:
        dequantised(files, config)
    assert str(raised.value) == message
