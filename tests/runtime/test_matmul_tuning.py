"""Which way a few-row 4-bit matmul takes, from what was measured and without."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from headrace.runtime.matmul.configs import Config, Problem, Product
from headrace.runtime.matmul.timing import Choice
from headrace.runtime.matmul.tuning import Choices, load, problems, save

BF16 = torch.bfloat16
SHAPE = (4096, 4096)
HOPPER = (132, 232448)
PROBLEM = Problem("nf4", 64, 4096, 4096, 16, "bfloat16")
CONFIG = Config(64, 32, 4, 4, 4)


def test_what_was_measured_is_taken() -> None:
    fastest = Choice("kernel", CONFIG, 9.5)
    choices = Choices(*HOPPER, {PROBLEM: fastest})
    for rows in (9, 12, 16):
        assert choices.choose("nf4", 64, SHAPE, rows, BF16) is fastest
    assert choices.choose("nf4", 64, SHAPE, 17, BF16) is not fastest
    assert choices.choose("fp4", 64, SHAPE, 1, BF16) is not fastest


def test_where_dequantizing_is_fastest_the_fewest_rows_are_fused() -> None:
    fewest = replace(PROBLEM, rows=8)
    choices = Choices(*HOPPER, {fewest: Choice("dense", None, 20.0)}, by_default=True)
    assert choices.choose("nf4", 64, SHAPE, 8, BF16).path == "dense"
    assert choices.choose("nf4", 64, SHAPE, 4, BF16).path == "bitsandbytes"


def test_int4_is_not_for_bitsandbytes() -> None:
    for rows in (1, 4):
        assert Choices(*HOPPER, {}).choose("int4", 64, SHAPE, rows, BF16).path == "dense"
    choices = Choices(*HOPPER, {}, by_default=True)
    assert choices.choose("int4", 64, SHAPE, 4, BF16).path == "kernel"


@pytest.mark.parametrize(("rows", "path"), [(1, "bitsandbytes"), (4, "bitsandbytes"), (5, "dense")])
def test_the_rule_without_measuring(rows: int, path: str) -> None:
    chosen = Choices(*HOPPER, {}).choose("nf4", 64, SHAPE, rows, BF16)
    assert chosen.path == path and chosen.config is None


@pytest.mark.parametrize(
    ("shape", "rows", "config"),
    [
        # Measured to be the fastest on an H200, or no more than 8 % slower.
        ((28672, 8192), 16, Config(64, 32, 1, 4, 3)),
        ((14336, 4096), 16, Config(64, 32, 1, 4, 3)),
        ((4096, 4096), 16, Config(64, 32, 4, 4, 3)),
        ((28672, 8192), 64, Config(128, 32, 1, 8, 3)),
        ((14336, 4096), 64, Config(128, 32, 1, 8, 3)),
        ((4096, 4096), 64, Config(128, 32, 4, 8, 3)),
        ((14336, 4096), 32, Config(64, 32, 1, 4, 3)),
        ((14336, 4096), 128, Config(64, 32, 1, 4, 3)),
        ((4096, 4096), 128, Config(64, 32, 2, 4, 3)),
    ],
)
def test_our_kernel_without_measuring(shape: tuple[int, int], rows: int, config: Config) -> None:
    choices = Choices(*HOPPER, {}, by_default=True)
    assert choices.choose("nf4", 64, shape, rows, BF16) == Choice("kernel", config)
    assert choices.choose("nf4", 64, shape, 129, BF16).path == "dense"
    measured = Problem("nf4", 64, *shape, rows, "bfloat16")
    choices = Choices(*HOPPER, {measured: Choice("dense", None, 9.0)}, by_default=True)
    assert choices.choose("nf4", 64, shape, rows, BF16).path == "dense"


def test_without_our_kernel() -> None:
    for shape, processor in (((2880, 2880), HOPPER), (SHAPE, (132, 0))):
        choices = Choices(*processor, {})
        assert choices.choose("nf4", 64, shape, 4, BF16).path == "bitsandbytes"
        assert choices.choose("nf4", 64, shape, 5, BF16).path == "dense"
    assert Choices(*HOPPER, {}).choose("nf4", 64, (64, 96), 1, BF16).path == "dense"


def test_kept_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "matmul.json"
    assert load(file) == {}
    measured = {PROBLEM: Choice("kernel", CONFIG, 9.5)}
    save(file, measured)
    assert load(file) == measured
    file.write_text("[{}]")
    assert load(file) == {}


def test_problems_of_a_stage() -> None:
    whole, odd = Product("nf4", 64, (2048, 1024, 1024), 4096), Product("nf4", 64, (64,), 96)
    found = list(problems([whole, odd], 20, BF16))
    assert [problem.rows for _, problem in found] == [8, 16, 32]
    assert (whole, PROBLEM) in found
    assert len(list(problems([whole, odd], 4096, BF16))) == 5


def test_what_was_measured_later_counts() -> None:
    choices = Choices(*HOPPER, {}, by_default=True)
    assert choices.choose("nf4", 64, SHAPE, 16, BF16).microseconds == 0
    fastest = Choice("kernel", CONFIG, 9.5)
    choices.adopt({PROBLEM: fastest})
    assert choices.choose("nf4", 64, SHAPE, 16, BF16) is fastest
    without = Choices(132, 0, {})
    without.adopt({PROBLEM: fastest})
    assert without.choose("nf4", 64, SHAPE, 16, BF16).path == "dense"
