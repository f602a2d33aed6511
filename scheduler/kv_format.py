"""How keys and values lie in pages, and how many bytes that is."""

from dataclasses import dataclass

from headrace.scheduler.errors import HeadraceError, UnsupportedModelError
from headrace.scheduler.plan import PAGE_TOKENS

KV_FORMATS = ("auto", "bf16", "int8", "int4")
"""What a user may choose. "auto" is the compute type."""

PLAIN = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
"""Formats that are types of numbers, by the names of these."""

SCALE_BYTES = 2

LEAST_ROTATED = 16
"""Numbers of a key that the rotation of int4 pages has to mix at least, for its outliers to be spread."""


@dataclass(frozen=True, slots=True)
class KVFormat:
    """Each number takes `bits`; each key and each value of a head `scales` float16 numbers more.

    Plain formats have no scales.
    """

    name: str
    bits: int
    scales: int = 0

    @property
    def is_quantized(self) -> bool:
        return self.scales > 0

    @property
    def is_rotated(self) -> bool:
        """Whether keys are, before they are quantized."""
        return self.name == "int4"

    def code_bytes(self, dim: int) -> int:
        """One key or value of one head, without its scales."""
        return dim * self.bits // 8

    def page_bytes(self, kv_heads: int, k_dim: int, v_dim: int, *, latent: bool = False) -> int:
        """One page of one layer. UnsupportedModelError for heads that the format has no way with.

        `latent`: values are parts of keys, and rotated like them.
        """
        self._check(k_dim, v_dim, min(rotated(k_dim), rotated(v_dim if latent else k_dim)))
        codes = self.code_bytes(k_dim) + self.code_bytes(v_dim)
        return PAGE_TOKENS * kv_heads * (codes + 2 * self.scales * SCALE_BYTES)

    def _check(self, k_dim: int, v_dim: int, mixed: int) -> None:
        if self.is_rotated and (mixed < LEAST_ROTATED or v_dim % 4):
            raise UnsupportedModelError(
                f"--kv-format int4 rotates keys in blocks of a power of two, at least"
                f" {LEAST_ROTATED}, and packs values by fours; this model's keys have {k_dim} numbers"
                f" a head and its values {v_dim}: use --kv-format int8"
            )


def rotated(dim: int) -> int:
    """How many numbers of a key are mixed with each other: the largest power of two that divides it."""
    return dim & -dim


FORMATS = {
    found.name: found
    for found in (
        KVFormat("fp32", 32),
        KVFormat("bf16", 16),
        KVFormat("fp16", 16),
        KVFormat("int8", 8, scales=1),  # a step
        KVFormat("int4", 4, scales=2),  # a step and the lowest number
    )
}


def check_kv_format(choice: str) -> None:
    """HeadraceError if it is none of KV_FORMATS."""
    if choice not in KV_FORMATS:
        names = f"{', '.join(KV_FORMATS[:-1])} or {KV_FORMATS[-1]}"
        raise HeadraceError(f"--kv-format must be {names}, not {choice!r}")


def resolve_kv_format(choice: str, dtype: str) -> KVFormat:
    """The format of `choice` where `dtype` is computed in. HeadraceError if it is none of KV_FORMATS."""
    check_kv_format(choice)
    return FORMATS[PLAIN[dtype] if choice == "auto" else choice]
