"""Weights of a checkpoint as the tool that wrote it dequantizes them, in float32: see foreign_tools.py."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

Options = dict[str, Any]
Values = dict[str, Tensor]


def plain_config(checkpoint: Path) -> Any:
    config = AutoConfig.from_pretrained(checkpoint)
    del config.quantization_config
    return config


def by_gptqmodel(checkpoint: Path, tensors: Values, settings: Options) -> Values:
    """GPTQ and FP8. Scales are what the file has: the model is loaded in float16."""
    from gptqmodel import BACKEND, GPTQModel

    loaded = GPTQModel.load(
        str(checkpoint), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16
    )
    fp8 = settings["quant_method"] == "fp8"
    part, given = ("weight_scale_inv", {"dtype": torch.float32}) if fp8 else ("scales", {})
    values = {}
    for name, module in loaded.model.named_modules():
        if f"{name}.{part}" in tensors:
            setattr(module, part, tensors[f"{name}.{part}"].float())
            values[name] = module.dequantize_weight(**given).T
    return values


def by_auto_round(checkpoint: Path, tensors: Values, settings: Options) -> Values:
    """GPTQ, also in its own format: GPTQModel loads no other tool's zero points."""
    from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp

    as_they_are = settings.get("packing_format") in ("auto_round", "auto_round:gptqmodel")
    linear = qlinear_torch.QuantLinear if as_they_are else qlinear_torch_zp.QuantLinear

    values = {}
    for stem in [n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")]:
        own = {part: tensors[f"{stem}.{part}"] for part in ("qweight", "qzeros", "scales")}
        columns = len(own["qweight"]) * 32 // settings["bits"]
        layer = linear(
            settings["bits"], settings["group_size"], columns, own["scales"].shape[1], False
        )
        for part, tensor in own.items():
            setattr(layer, part, tensor.float() if part == "scales" else tensor)
        values[stem] = layer(torch.eye(columns)).T
    return values


def by_autoawq(checkpoint: Path, tensors: Values, settings: Options) -> Values:
    from awq.utils.packing_utils import dequantize_gemm

    values = {}
    for stem in [n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")]:
        words = (tensors[f"{stem}.{part}"] for part in ("qweight", "qzeros"))
        scales = tensors[f"{stem}.scales"].float()
        values[stem] = dequantize_gemm(*words, scales, 4, settings["group_size"]).T
    return values


def by_compressed_tensors(checkpoint: Path, tensors: Values, settings: Options) -> Values:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.nvfp4 import base as nvfp4
    from compressed_tensors.quantization import apply_quantization_config
    from transformers import CompressedTensorsConfig

    # By itself it rounds 4-bit floats times their scales to bfloat16.
    unpack = nvfp4.unpack_fp4_from_uint8
    nvfp4.unpack_fp4_from_uint8 = partial(unpack, dtype=torch.float32)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(plain_config(checkpoint))
    apply_quantization_config(model, CompressedTensorsConfig(**settings).quantization_config)
    values = {}
    for name, module in model.named_modules():
        if f"{name}.weight_scale" in tensors:
            own = {n.rpartition(".")[2]: t for n, t in tensors.items() if n.startswith(f"{name}.")}
            if own["weight_scale"].dtype != torch.uint8:
                own["weight_scale"] = own["weight_scale"].float()
            scheme = module.quantization_scheme
            compressor = BaseCompressor.get_value_from_registry(scheme.format or settings["format"])
            values[name] = compressor.decompress(own, scheme)["weight"]
    nvfp4.unpack_fp4_from_uint8 = unpack
    return values


def by_modelopt(checkpoint: Path, tensors: Values, settings: Options) -> Values:
    from modelopt.torch.quantization.qtensor import MXFP4QTensor, NVFP4QTensor

    values = {}
    for name in [n.removesuffix("_scale") for n in tensors if n.endswith(".weight_scale")]:
        data, scale = tensors[name], tensors[f"{name}_scale"]
        shape = torch.Size((len(data), 2 * data.shape[1]))
        if scale.dtype == torch.uint8:
            packed = MXFP4QTensor(shape, torch.float32, data)
            values[name.removesuffix(".weight")] = packed.dequantize(
                torch.float32, scale=scale, block_sizes={-1: 32}
            )
        elif data.dtype == torch.uint8:
            packed = NVFP4QTensor(shape, torch.float32, data)
            common = tensors[f"{name}_scale_2"]
            values[name.removesuffix(".weight")] = packed.dequantize(
                torch.float32, scale=scale, double_scale=common, block_sizes={-1: 16}
            )
        else:
            rows = scale.float().view(-1, 1) if scale.dim() else scale.float()
            values[name.removesuffix(".weight")] = data.float() * rows
    return values


DEQUANTIZERS: Mapping[str, Callable[[Path, Values, Options], Values]] = {
    "gptq": by_gptqmodel,
    "fp8": by_gptqmodel,
    "awq": by_autoawq,
    "compressed-tensors": by_compressed_tensors,
    "modelopt": by_modelopt,
    "auto-round": by_auto_round,
}


def dequantized(checkpoint: Path, tensors: Values, settings: Options) -> Values:
    """All weights by name, of `tensors` and quantization_config. What is not quantized is as it is."""
    method = settings["quant_method"]
    if settings.get("packing_format") == "auto_round:auto_awq":
        method = "awq"
    theirs = method == "gptq" and settings.get("provider") == "auto-round"
    dequantize = by_auto_round if theirs else DEQUANTIZERS[method]
    linears = dequantize(checkpoint, tensors, settings)
    values = {n: t.float() for n, t in tensors.items() if n.rpartition(".")[0] not in linears}
    return values | {f"{name}.weight": value for name, value in linears.items()}
