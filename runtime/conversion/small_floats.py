"""The reference that reads fp8, mxfp4 and nvfp4, which are imported and never written from values."""

from collections.abc import Mapping

import torch
from torch import Tensor

from headrace.runtime.manifest import WeightSpec
from headrace.runtime.weights.small_floats import E2M1

SMALL_FLOATS = ("fp8", "mxfp4", "nvfp4")


def decode_small_floats(spec: WeightSpec, parts: Mapping[str, Tensor]) -> Tensor:
    """float32 values of a weight, by definition."""
    *stack, rows, columns = spec.shape
    if spec.turned:
        rows, columns = columns, rows
    data, scale = parts["data"], parts["scale"]
    if spec.format == "fp8":
        matrices = data.float().view(-1, rows, columns)
        wide = scale.view(len(matrices), -(-rows // spec.block_rows), -1)
        wide = wide.repeat_interleave(spec.block_rows, 1).repeat_interleave(spec.blocksize, 2)
        values = matrices * wide[:, :rows, :columns]
    else:
        codes = torch.stack((data.view(-1) >> 4, data.view(-1) & 15), dim=1)
        values = torch.tensor(E2M1)[codes.int()].view(-1, spec.blocksize)
        if spec.format == "mxfp4":
            values = torch.ldexp(values, scale.view(-1, 1).int() - 127)
        else:
            values *= (scale.float() * parts["row_scale"]).view(-1, 1)
    values = values.view(*stack, rows, columns)
    return values.mT if spec.turned else values
