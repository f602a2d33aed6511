"""`headrace plan --what-if`: hardware that is only written down."""

import json
from pathlib import Path

import pytest
from small_shapes import small_config

from headrace.cluster.bench.hollow import hollow_store
from headrace.cluster.bench.random_store import write_store
from headrace.cluster.cli.main import main
from headrace.cluster.run_plan import shape_in
from headrace.cluster.whatif.hardware import read_pools
from headrace.scheduler.errors import HeadraceError

NODES = """
pools:
  - name: two kinds
    nodes:
      - {gpu: rtx-4090, host_memory: 128GB, drive_gbps: 6, network_gbps: 1.2, price_per_hour: 0.5}
      - {instance: small, count: 2, drive_gbps: 2}
    links: [{between: [0, 2], gbps: 0.0125, latency_ms: 5}]
  - name: too small
    nodes: [{gpu_memory: 1GB, hbm_gbps: 100, tflops: 5, pcie_gbps: 8, host_memory: 4GB, drive_gbps: 1}]
"""
PRICES = """
instances:
  small: {gpu: l4, host_memory: 16GB, drive_gbps: 0.5, price_per_hour: 0.75}
"""


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    nodes, prices = tmp_path / "nodes.yaml", tmp_path / "prices.yaml"
    nodes.write_text(NODES)
    prices.write_text(PRICES)
    return ["--what-if", str(nodes), "--prices", str(prices)]


@pytest.mark.parametrize("shape", ["8b", "qwen3-30b", "deepseek-v3"])
@pytest.mark.parametrize("fmt", ["nf4", "bf16"])
def test_a_shape_is_as_large_as_the_store_that_would_be_made_of_it(
    shape: str, fmt: str, tmp_path: Path
) -> None:
    config = small_config(shape)
    made = write_store(tmp_path / "store", config, fmt)
    assert shape_in(hollow_store(config, fmt), "bfloat16", "auto") == shape_in(
        made, "bfloat16", "auto"
    )


def test_pools_are_planned_and_priced(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", "70b", *files, "--job-tokens", "2000000", "--json"])
    assert ended.value.code == 0
    mixed, small = json.loads(capsys.readouterr().out)
    assert mixed["fits"] and mixed["price_per_hour"] == 2.0
    assert sum(mixed["layers_of_stages"]) == 80 and len(mixed["layers_of_stages"]) == 3
    assert mixed["job"]["cost"] == pytest.approx(2 * mixed["cost_per_million"])
    hours = 1e6 / mixed["tokens_per_second"] / 3600
    assert mixed["hours_per_million"] == pytest.approx(hours)
    assert mixed["cost_per_million"] == pytest.approx(2 * hours)
    assert not small["fits"] and "needs at least" in small["refusal"]


def test_the_table_names_what_binds(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "8b", *files])
    text = capsys.readouterr().out
    assert "two kinds" in text and "bound by" in text and "cost / 1M" in text


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ("pools: [", "is no YAML"),
        ("[]", "must be a mapping"),
        ("pools: []", "pools"),
        ("pools: [{name: a, nodes: [{instance: b}]}]", "no instance is called 'b'"),
        (
            "pools: [{name: a, nodes: [{gpu: b, host_memory: 1GB, drive_gbps: 1}]}]",
            "no GPU is called 'b'",
        ),
        (
            "pools: [{name: a, nodes: [{host_memory: 1GB, drive_gbps: 1}]}]",
            "give gpu_memory, hbm_gbps, tflops, pcie_gbps",
        ),
        (
            "pools: [{name: a, nodes: [{gpu: l4, host_memory: 1GX, drive_gbps: 1}]}]",
            "is not a size",
        ),
        (
            "pools: [{name: a, nodes: [{gpu: l4, host_memory: 1GB, drive_gbps: 0}]}]",
            "greater than 0",
        ),
        (
            "pools: [{name: a, nodes: [{gpu: l4, host_memory: 1GB, drive_gbps: 1, drives: 2}]}]",
            "drives",
        ),
    ],
)
def test_what_is_written_wrong_is_named(nodes: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "nodes.yaml"
    file.write_text(nodes)
    with pytest.raises(HeadraceError, match=message) as error:
        read_pools(file, None)
    assert str(file) in str(error.value)


def test_the_examples_are_right() -> None:
    examples = Path(__file__).parents[2] / "examples"
    assert len(read_pools(examples / "nodes.yaml", examples / "prices.yaml")) >= 4


def test_no_shape_and_no_store(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", "80b", *files])
    assert ended.value.code == 1
    assert "neither a store nor a model shape" in capsys.readouterr().err
