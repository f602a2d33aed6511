"""Findings: of this machine, of recorded GPUs, and of a cluster."""

import json
import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from commands import headrace
from fake_nvml import FakeNvml, NVMLError

from headrace.cluster.cli.doctor import findings_json, findings_table, has_problem
from headrace.cluster.doctor.cpu import flags
from headrace.cluster.doctor.drives import mount_of
from headrace.cluster.doctor.finding import (
    Finding,
    NotChecked,
    Status,
    Subject,
    ok,
    problem,
    run_checks,
)
from headrace.cluster.doctor.gpus import device
from headrace.cluster.doctor.network import Listener, judged, refuses
from headrace.cluster.doctor.software import _unmet, number
from headrace.runtime.nvml import read_gpus


def of_gpu(**changes: object) -> dict[str, Finding]:
    [gpu] = read_gpus(FakeNvml(**changes)).devices
    return {one.check: one for one in device(gpu)}


def test_a_gpu_in_order() -> None:
    found = of_gpu()
    assert {one.status for one in found.values()} == {Status.OK}
    assert "generation 1 x16 of generation 5 x16 (it falls back at rest)" in found["PCIe"].found
    assert not any(one.fix for one in found.values())


@pytest.mark.parametrize(
    ("changes", "check", "status", "said"),
    [
        ({"nvmlDeviceGetCurrPcieLinkWidth": 4}, "PCIe", Status.WARN, "generation 1 x4 of"),
        ({"nvmlDeviceGetCurrentClocksEventReasons": 0x40}, "clocks", Status.WARN, "thermal"),
        ({"nvmlDeviceGetTotalEccErrors": 3}, "ECC", Status.PROBLEM, "3 uncorrected"),
        ({"nvmlDeviceGetRemappedRows": (0, 1, 1, 0)}, "ECC", Status.WARN, "waits"),
        ({"nvmlDeviceGetRemappedRows": (0, 1, 0, 1)}, "ECC", Status.PROBLEM, "could not"),
        ({"nvmlDeviceGetPersistenceMode": 0}, "persistence", Status.WARN, "off"),
        ({"nvmlDeviceGetPowerManagementLimit": 400_000}, "power", Status.WARN, "below the default"),
        ({"nvmlDeviceGetTemperature": 91}, "temperature", Status.WARN, "91 C"),
        (
            {"nvmlDeviceGetCudaComputeCapability": (6, 1)},
            "compute capability",
            Status.PROBLEM,
            "6.1",
        ),
        ({"nvmlDeviceGetCudaComputeCapability": (7, 5)}, "compute capability", Status.WARN, "bf16"),
        ({"nvmlDeviceGetTemperature": NVMLError("no")}, "temperature", Status.UNCHECKED, "tell"),
    ],
)
def test_a_gpu_that_is_not(
    changes: dict[str, object], check: str, status: Status, said: str
) -> None:
    found = of_gpu(**changes)[check]
    assert found.status is status and said in found.found
    assert bool(found.fix) == (status in (Status.WARN, Status.PROBLEM))


def test_a_check_that_breaks_is_said_and_the_others_are_made() -> None:
    def breaks() -> Iterator[Finding]:
        yield ok("a", "first", "fine")
        raise OSError(5, "Input/output error")

    def cannot() -> Iterator[Finding]:
        raise NotChecked("no such thing here")
        yield  # a generator

    checks = [
        ("breaks", breaks),
        ("cannot", cannot),
        ("last", lambda: [problem("a", "last", "x", "y")]),
    ]
    found = [*run_checks("a", checks)]
    assert [one.check for one in found] == ["first", "breaks", "cannot", "last"]
    assert found[1].found == "not checked: OSError: [Errno 5] Input/output error"
    assert found[2].found == "not checked: no such thing here"
    assert has_problem({"here": tuple(found)}) and not has_problem({"here": tuple(found[:3])})
    assert findings_json({"here": tuple(found)})["nodes"]["here"][2]["status"] == "not checked"
    assert findings_table("here", found).row_count == 6  # one is the area's, one the fix


def test_where_a_path_is_mounted(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "/dev/sda1 / ext4 rw 0 0\nserver:/data /mnt nfs4 rw,vers=4.2 0 0\n"
        "/dev/nvme0n1 /mnt/my\\040drive xfs rw,noatime 0 0\n"
    )
    assert mount_of(Path("/mnt/store"), mounts).is_network
    found = mount_of(Path("/mnt/my drive/store"), mounts)
    assert (found.kind, found.source, found.options) == ("xfs", "/dev/nvme0n1", "rw,noatime")
    assert mount_of(Path("/mntx"), mounts).kind == "ext4"


@pytest.mark.parametrize(
    ("address", "token", "status"),
    [
        ("127.0.0.1", False, Status.OK),
        ("10.0.0.5", False, Status.WARN),
        ("10.0.0.5", True, Status.OK),
        ("10.0.0.5", None, Status.UNCHECKED),
        ("8.8.8.8", False, Status.PROBLEM),
        ("8.8.8.8", True, Status.OK),
    ],
)
def test_who_may_reach_ray(address: str, token: bool | None, status: Status) -> None:
    [found] = judged([Listener(address, 6379, "gcs_server")], token=token)
    assert found.status is status
    assert ("RAY_AUTH_MODE=token" in found.fix) == (status in (Status.WARN, Status.PROBLEM))


@pytest.mark.parametrize(
    ("code", "answer"),
    [(None, False), (grpc.StatusCode.UNAUTHENTICATED, True), (grpc.StatusCode.UNIMPLEMENTED, None)],
)
def test_whether_a_gcs_asks_for_a_token(code: grpc.StatusCode | None, answer: bool | None) -> None:
    def call(request: bytes, context: grpc.ServicerContext) -> bytes:
        if code is not None:
            context.abort(code, "no")
        return b""

    methods = {"CheckAlive": grpc.unary_unary_rpc_method_handler(call)}
    handler = grpc.method_handlers_generic_handler("ray.rpc.NodeInfoGcsService", methods)
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        assert refuses("127.0.0.1", port) is answer
    finally:
        server.stop(0).wait()
    assert refuses("127.0.0.1", port) is None


def test_versions() -> None:
    assert number("2.13.0+cpu") == (2, 13, 0) > number("2.9")
    assert _unmet("ray[default]>=2.60") is None
    assert _unmet("torch>=99.1") is not None and "has to be >=99.1" in str(_unmet("torch>=99.1"))
    assert _unmet("transformers<5,>=4") is not None
    assert _unmet("no-such-package>=1") == "no-such-package is not installed"


def test_flags_of_a_processor() -> None:
    assert flags("processor : 0\nflags\t\t: fpu avx2 avx512_bf16\n") == {
        "fpu",
        "avx2",
        "avx512_bf16",
    }
    assert not flags("")


def test_this_machine(stories: Path, tmp_path: Path) -> None:
    """As users run it, with what they would run; the port of a server that listens is seen."""
    arguments = "doctor", stories, "--kv-directory", tmp_path, "--json"
    with socket.create_server(("127.0.0.1", 0)), headrace(tmp_path, *arguments) as command:
        code = command.wait(150)
        assert command.stderr == ""
        found = json.loads(command.stdout)
    [findings] = found["nodes"].values()
    problems = [one for one in findings if one["status"] == "problem"]
    assert (code, found["problem"]) == (int(bool(problems)), bool(problems))
    by_check = {(one["area"], one["check"]): one for one in findings}
    for place in (
        ("software", "torch"),
        ("CPU", "cores"),
        ("memory", "/dev/shm"),
        ("store", "contents"),
        ("KV directory", "O_DIRECT"),
        ("links", "Gloo"),
        ("network", "listening"),
    ):
        assert by_check[place]["status"] in ("ok", "warn"), by_check[place]
    assert "GB/s" in by_check["store", "read speed"]["found"]
    assert all(one["fix"] for one in findings if one["status"] in ("warn", "problem"))
    assert [file.name for file in tmp_path.iterdir() if "headrace-doctor" in file.name] == []


def test_a_directory_that_is_no_store(tmp_path: Path) -> None:
    from headrace.cluster.doctor.drives import drives

    (tmp_path / "store").mkdir()
    subject = Subject(
        store=tmp_path / "store", kv_directory=tmp_path / "absent", temporary=tmp_path
    )
    found = [one for one in drives(subject) if one.status is Status.PROBLEM]
    assert [(one.area, one.check) for one in found] == [
        ("store", "contents"),
        ("KV directory", "directory"),
    ]
    assert "mkdir -p" in found[1].fix


@pytest.mark.slow
def test_a_cluster_of_two_nodes(stories: Path, tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    try:
        cluster.add_node(num_cpus=1)
        arguments = "doctor", stories, "--address", cluster.address, "--json"
        with headrace(tmp_path, *arguments) as command:
            code = command.wait(170)
            assert command.stdout, command.stderr
            found = json.loads(command.stdout)
    finally:
        cluster.shutdown()
    assert len(found["nodes"]) == 3
    whole = {one["check"]: one for one in found["nodes"]["cluster"]}
    for check in ("ray", "Python", "Headrace", "store", "ports", "clocks"):
        assert whole[check]["status"] == "ok", whole[check]
    assert "on all 2 nodes" in whole["torch"]["found"]
    [link] = [one for check, one in whole.items() if check.startswith("Gloo ")]
    assert link["status"] in ("ok", "warn") and "GB/s" in link["found"]
    assert code == int(found["problem"])
