"""Checkpoints as other tools quantize them, packed here word by word as their layouts are documented,
each beside a plain checkpoint with the values that its bytes stand for."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from architectures import tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

GROUP = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

Quantized = tuple[dict[str, Tensor], Tensor]
"""Tensors by what follows the module's name, and the weight's values in float32."""

Quantizer = Callable[[Tensor], Quantized]


def is_linear(name: str, tensor: Tensor) -> bool:
    router = re.search(r"(mlp|block_sparse_moe)\.(gate|router)\.weight$", name)
    outside = "embed" in name or "lm_head" in name
    return tensor.dim() == 2 and name.endswith(".weight") and not (router or outside)


def write(
    folder: Path, model_type: str, settings: dict[str, Any], quantize: Quantizer, **changes: Any
) -> tuple[Path, Path]:
    """A quantized and a plain checkpoint of one tiny model."""
    quantized, plain = folder / "quantized", folder / "plain"
    tiny_model(model_type, **changes).save_pretrained(plain)
    tensors = load_file(plain / "model.safetensors")
    packed, values = {}, {}
    for name, tensor in tensors.items():
        if is_linear(name, tensor):
            parts, values[name] = quantize(tensor)
            stem = name.removesuffix(".weight")
            packed |= {f"{stem}.{part}": side.contiguous() for part, side in parts.items()}
        else:
            packed[name] = values[name] = tensor
    save(quantized, plain, settings, packed, values)
    return quantized, plain


def write_gpt_oss(folder: Path) -> tuple[Path, Path]:
    """Experts in MXFP4, of random codes."""
    quantized, plain = folder / "quantized", folder / "plain"
    tiny_model("gpt_oss").save_pretrained(plain)
    packed = load_file(plain / "model.safetensors")
    values = dict(packed)
    for name in [n for n in packed if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, depth, rows = packed.pop(name).shape
        blocks = torch.randint(256, (experts, rows, depth // 32, 16), dtype=torch.uint8)
        scales = torch.randint(123, 126, (experts, rows, depth // 32), dtype=torch.uint8)
        values[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).contiguous()
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save(quantized, plain, {"quant_method": "mxfp4"}, packed, values)
    return quantized, plain


def save(
    quantized: Path, plain: Path, settings: dict[str, Any], packed: dict[str, Tensor],
    values: dict[str, Tensor],
) -> None:  # fmt: skip
    quantized.mkdir()
    config = json.loads((plain / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    save_file(packed, quantized / "model.safetensors", {"format": "pt"})
    save_file(values, plain / "model.safetensors", {"format": "pt"})


def words(codes: Tensor, bits: int, places: tuple[int, ...] | None = None) -> Tensor:
    """[rows, columns] -> int32 [rows, columns * bits / 32]; code places[i] of a word i-th from below.

    Codes below 0 borrow from the next.
    """
    each = 32 // bits
    split = codes.long().view(len(codes), -1, each)
    total = torch.zeros(split.shape[:2], dtype=torch.int64)
    for i, place in enumerate(places or range(each)):
        total += split[..., place] << (bits * i)
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)


def affine(weight: Tensor, bits: int, index: Tensor) -> tuple[Tensor, ...]:
    """Codes [N, K], zeros and float16 scales [N, groups], and values; index[k] is column k's group."""
    groups, most = int(index.max()) + 1, 2**bits - 1
    scale = torch.empty(len(weight), groups, dtype=torch.float16)
    zero = torch.empty(len(weight), groups)
    for g in range(groups):
        some = weight[:, index == g]
        least, high = some.amin(1).clamp(max=0), some.amax(1).clamp(min=0)
        scale[:, g] = ((high - least) / most).half()
        zero[:, g] = (-least / scale[:, g].float()).round().clamp(0, most)
    wide, point = scale.float()[:, index], zero[:, index]
    codes = (weight / wide + point).round().clamp(0, most)
    return codes.long(), zero.long(), scale, (codes - point) * wide


def gptq(bits: int, *, less: int, act_order: bool) -> Quantizer:
    def quantize(weight: Tensor) -> Quantized:
        columns = weight.shape[1]
        index = torch.arange(columns) // GROUP
        if act_order:
            index = index[torch.randperm(columns)]
        codes, zero, scale, values = affine(weight, bits, index)
        parts = {
            "qweight": words(codes, bits).T,
            "qzeros": words((zero - less).T, bits),
            "scales": scale.T,
            "g_idx": index.int(),
        }
        return parts, values

    return quantize


def awq(weight: Tensor) -> Quantized:
    index = torch.arange(weight.shape[1]) // GROUP
    codes, zero, scale, values = affine(weight, 4, index)
    parts = {
        "qweight": words(codes.T, 4, AWQ_ORDER),
        "qzeros": words(zero.T, 4, AWQ_ORDER),
        "scales": scale.T,
    }
    return parts, values


def fp8(
    block: tuple[int, int] | None, suffix: str, *, static: bool = False, divides: bool = False
) -> Quantizer:
    """Block by block; None: one scale for all. With `divides`, codes are divided by scales."""

    def quantize(weight: Tensor) -> Quantized:
        rows, columns = weight.shape
        height, width = block or (rows, columns)
        grid = (-(-rows // height), -(-columns // width))
        scale, codes = torch.empty(grid), torch.empty_like(weight).to(torch.float8_e4m3fn)
        values = torch.empty_like(weight)
        for i in range(grid[0]):
            for j in range(grid[1]):
                at = slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)
                scale[i, j] = weight[at].abs().amax() / 448
                codes[at] = (weight[at] / scale[i, j]).to(torch.float8_e4m3fn)
                values[at] = codes[at].float() * scale[i, j]
        stored = 1 / scale if divides else scale
        stored = stored if block else stored.view(())
        parts = {"weight": codes, f"weight_{suffix}": stored}
        return parts | ({"activation_scale": torch.ones(())} if static else {}), values

    return quantize


E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def fp4(layout: str, group: int) -> Quantizer:
    """NVFP4 of "modelopt", or NVFP4 and MXFP4 (groups of 16 and 32) of "compressed-tensors"."""

    def quantize(weight: Tensor) -> Quantized:
        rows, columns = weight.shape
        groups = weight.view(rows, -1, group)
        wide = groups.abs().amax(-1) / 6
        parts = {}
        if group == 32:
            exponent = wide.log2().ceil()
            parts["weight_scale"], scale = (exponent + 127).to(torch.uint8), exponent.exp2()
        else:
            common = wide.amax() / 448
            small = (wide / common).to(torch.float8_e4m3fn)
            parts["weight_scale"] = small
            if layout == "modelopt":
                parts |= {"weight_scale_2": common, "input_scale": torch.ones(())}
            else:
                parts |= {
                    "weight_global_scale": 1 / common.view(1),
                    "input_global_scale": torch.ones(1),
                }
                common = 1 / parts["weight_global_scale"]
            scale = small.float() * common
        scaled = groups / scale[..., None]
        codes = (scaled.abs()[..., None] - E2M1).abs().argmin(-1)
        values = E2M1[codes] * scaled.sign() * scale[..., None]
        codes = (codes | (scaled < 0) * 8).view(rows, columns).to(torch.uint8)
        name = "weight" if layout == "modelopt" else "weight_packed"
        return parts | {name: codes[:, ::2] | codes[:, 1::2] << 4}, values.view(rows, columns)

    return quantize


def compressed_tensors_settings(layout: str) -> dict[str, Any]:
    group = {"weights": {}, "targets": ["Linear"], "format": layout}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        "quantization_status": "compressed",
    }


def compressed_tensors(
    layout: str, bits: int, group: int | None, symmetric: bool, *, act_order: bool = False
) -> Quantizer:
    """Groups of columns, or None: rows; 0: one scale for the whole."""

    def quantize(weight: Tensor) -> Quantized:
        shape = weight.shape
        if group == 0 and layout != "float-quantized":
            weight = weight.view(1, -1)
        rows, columns = weight.shape
        index = torch.arange(columns) // (group or columns)
        if act_order:
            index = index[torch.randperm(columns)]
        half = 2 ** (bits - 1)
        if layout == "float-quantized":
            scale = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
            scale = scale.amax().view(1) if group == 0 else scale
            codes = (weight / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
            return {"weight": codes, "weight_scale": scale}, codes.float() * scale.float()
        if symmetric:
            extreme = weight.abs().view(rows, -1, group or columns).amax(-1)
            scale = (extreme / (half - 1)).bfloat16()
            signed = (weight / scale.float()[:, index]).round().clamp(-half, half - 1).long()
            values, zero = signed * scale.float()[:, index], None
        else:
            codes, zero, scale, values = affine(weight, bits, index)
            signed = codes - half
        parts = {"weight_scale": scale.view(-1) if group == 0 else scale}
        packed = layout == "pack-quantized"
        if packed:
            parts["weight_packed"] = words((signed + half).view(shape), bits)
            parts["weight_shape"] = torch.tensor(shape)
        else:
            parts["weight"] = signed.to(torch.int8).view(shape)
        if zero is not None and group == 0:
            parts["weight_zero_point"] = (zero - half).to(torch.int8).view(-1)
        elif zero is not None:
            parts["weight_zero_point"] = (
                words(zero.T, bits).T if packed else (zero - half).to(torch.int8)
            )
        if act_order:
            parts["weight_g_idx"] = index.int()
        return parts, values.view(shape)

    return quantize
