"""GPUs by name, with the figures that their makers publish.

TFLOP/s are dense, of bf16 (or fp16) tensor cores that sum in float32; GB/s of PCIe are of one direction.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Gpu:
    """Memory in bytes, GB/s of its own memory, TFLOP/s, GB/s of its PCIe link."""

    memory: int
    hbm_gbps: float
    tflops: float
    pcie_gbps: float


GB, GIB = 10**9, 1 << 30
PCIE4, PCIE5 = 31.5, 63.0  # 16 lanes of 16 and 32 GT/s, 128b/130b

GPUS: dict[str, Gpu] = {
    # NVIDIA Ampere GA102 GPU Architecture whitepaper, table 2
    "rtx-3090": Gpu(24 * GIB, 936.0, 71.0, PCIE4),
    # NVIDIA Ada GPU Architecture whitepaper, appendix A
    "rtx-4090": Gpu(24 * GIB, 1008.0, 165.2, PCIE4),
    # NVIDIA L4 datasheet: 242 TFLOP/s with sparsity
    "l4": Gpu(24 * GB, 300.0, 121.0, PCIE4),
    # NVIDIA L40S datasheet
    "l40s": Gpu(48 * GB, 864.0, 362.0, PCIE4),
    # NVIDIA A10G datasheet: 140 TFLOP/s with sparsity
    "a10g": Gpu(24 * GB, 600.0, 70.0, PCIE4),
    # NVIDIA A100 datasheet, SXM
    "a100-40gb": Gpu(40 * GIB, 1555.0, 312.0, PCIE4),
    "a100-80gb": Gpu(80 * GIB, 2039.0, 312.0, PCIE4),
    # NVIDIA H100 datasheet, SXM: 1,979 TFLOP/s with sparsity
    "h100": Gpu(80 * GIB, 3350.0, 989.0, PCIE5),
    # NVIDIA H200 datasheet, SXM
    "h200": Gpu(141 * GB, 4800.0, 989.0, PCIE5),
}

REACHED_HBM, REACHED_TFLOPS, REACHED_PCIE = 0.86, 0.71, 0.87
"""What copies and products of large matrices reached of an H200's figures: 4,150 of 4,800 GB/s, 706 of 989
TFLOP/s, 55 of 63 GB/s (docs/benchmarks.md). Others are taken to reach as much of theirs."""
