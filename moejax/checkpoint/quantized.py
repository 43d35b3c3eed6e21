"""Quantised checkpoints seen as the unquantised ones of the same model: same names, shapes and values.

MXFP4 (GPT-OSS): `X_blocks` [E, N, K/32, 16] and `X_scales` [E, N, K/32] are the tensor X [E, K, N]; packed along K,
which the matrix product sums over, and transposed, as transformers' `Mxfp4Dequantize` does.
FP8 (DeepSeek-V3): `X` of F8_E4M3 and `X_scale_inv`, one scale a block of rows and columns, are the tensor X.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moejax.checkpoint.pieces import Window
from moejax.checkpoint.safetensors import DTYPES, CheckpointFiles, Fetch, TensorInfo, ranges
from moejax.errors import MoejaxError
from moejax.quantization import fp8, mxfp4

_SUPPORTED = "moejax reads mxfp4, and fp8 with a weight_block_size: take another version of the checkpoint"


@dataclass(frozen=True, slots=True)
class Mxfp4Tensor(TensorInfo):
    """`[E, K, N]` in bfloat16, which holds every value exactly."""

    blocks: TensorInfo
    scales: TensorInfo

    @property
    def major(self) -> tuple[int, ...]:
        return 0, 2, 1

    def read(self, region: Window, fetch: Fetch) -> np.ndarray:
        experts, inner, outputs = region
        held = _blocks_of(inner, mxfp4.BLOCK)
        stored = (experts, outputs, held)
        values = mxfp4.unpack_host(fetch(self.blocks, (*stored, slice(0, 16))), fetch(self.scales, stored))
        first = held.start * mxfp4.BLOCK
        return values[..., inner.start - first : inner.stop - first : inner.step].swapaxes(1, 2)


@dataclass(frozen=True, slots=True)
class Fp8Tensor(TensorInfo):
    """`[..., R, C]` in float32: the product as transformers forms it, before the parameter's dtype rounds it."""

    quantised: TensorInfo
    scales: TensorInfo
    block: tuple[int, int]

    def read(self, region: Window, fetch: Fetch) -> np.ndarray:
        held = tuple(_blocks_of(part, size) for part, size in zip(region[-2:], self.block, strict=True))
        rows, columns = (
            np.array(index, np.intp) // size - part.start
            for index, size, part in zip(ranges(region[-2:]), self.block, held, strict=True)
        )
        scales = fetch(self.scales, (*region[:-2], *held))
        return fp8.dequantise(fetch(self.quantised, region), scales, rows, columns)


def dequantised(files: CheckpointFiles, quantization_config: Mapping[str, Any] | None) -> CheckpointFiles:
    """A view of the files in which quantised weights are tensors of values, and their scales are gone.

    The tensors that are there decide what is quantised. A scale without its weight stays visible, for the caller to
    report as unknown. Without a quantization_config the files are returned as they are.

    Args:
        files: the checkpoint. The view has file descriptors of its own; close the view.
        quantization_config: that of config.json.

    Raises:
        MoejaxError: a method that moejax does not read, a weight without its scale, or one whose scale does not fit.
    """
    if quantization_config is None:
        return files
    method = quantization_config.get("quant_method")
    if method == "mxfp4":
        return CheckpointFiles(files.folder, _mxfp4(files.tensors))
    if method == "fp8":
        return CheckpointFiles(files.folder, _fp8(files.tensors, _block_size(quantization_config)))
    raise MoejaxError(f"{files.folder} is quantised with quant_method={method!r}; {_SUPPORTED}")


def _mxfp4(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    logical = dict(tensors)
    for name in tensors:
        weight = name.removesuffix("_blocks")
        if weight == name:
            continue
        if weight in tensors:
            raise MoejaxError(f"tensor {weight} is there both as values and as {name}; one must go")
        blocks, scales = logical.pop(name), logical.pop(f"{weight}_scales", None)
        if scales is None:
            raise MoejaxError(_scaleless(name, blocks, f"{weight}_scales"))
        if blocks.dtype != "U8" or len(blocks.shape) != 4 or blocks.shape[3] != 16:
            raise MoejaxError(
                f"{name} is {blocks.dtype} {list(blocks.shape)}; MXFP4 blocks are U8 [experts, outputs, inputs / 32, "
                "16]: download the checkpoint again"
            )
        if scales.dtype != "U8" or scales.shape != blocks.shape[:-1]:
            raise MoejaxError(_misfit(f"{weight}_scales", scales, "U8", blocks.shape[:-1], name, blocks))
        experts, outputs, count, _ = blocks.shape
        shape = (experts, count * mxfp4.BLOCK, outputs)
        logical[weight] = Mxfp4Tensor("BF16", shape, blocks.file, blocks.offset, blocks, scales)
    return logical


def _fp8(tensors: Mapping[str, TensorInfo], block: tuple[int, int]) -> dict[str, TensorInfo]:
    logical = dict(tensors)
    for name, weight in tensors.items():
        if weight.dtype != "F8_E4M3" or len(weight.shape) < 2:
            continue
        scales = logical.pop(f"{name}_scale_inv", None)
        if scales is None:
            raise MoejaxError(_scaleless(name, weight, f"{name}_scale_inv"))
        counts = (-(-extent // size) for extent, size in zip(weight.shape[-2:], block, strict=True))
        expected = (*weight.shape[:-2], *counts)
        if scales.dtype not in DTYPES or scales.shape != expected:
            raise MoejaxError(_misfit(f"{name}_scale_inv", scales, "F32", expected, name, weight))
        logical[name] = Fp8Tensor("F32", weight.shape, weight.file, weight.offset, weight, scales, block)
    return logical


def _block_size(quantization_config: Mapping[str, Any]) -> tuple[int, int]:
    size = quantization_config.get("weight_block_size")
    match size:
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
    raise MoejaxError(
        f"quant_method='fp8' has weight_block_size={size!r}, not two sizes such as [128, 128]; {_SUPPORTED}"
    )


def _blocks_of(part: slice, size: int) -> slice:
    """The blocks that hold a slice."""
    return slice(part.start // size, -(-part.stop // size))


def _scaleless(name: str, weight: TensorInfo, scale: str) -> str:
    return f"{name} in {weight.file} is stored as {weight.dtype} and its scale {scale} is missing; download it again"


def _misfit(scale: str, found: TensorInfo, dtype: str, expected: tuple[int, ...], name: str, weight: TensorInfo) -> str:
    return (
        f"{scale} is {found.dtype} {list(found.shape)} and should be {dtype} {list(expected)} for {name} "
        f"{list(weight.shape)}; are config.json and both tensors of the same checkpoint?"
    )
