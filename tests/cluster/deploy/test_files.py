"""Dockerfiles and units by those who know them, and what of them reaches a package."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from deployment import DEPLOY, ROOT, UNITS, Unit, instructions, shipped_variables

DOCKERFILES = [DEPLOY / "docker" / "Dockerfile.cpu", DEPLOY / "docker" / "Dockerfile.cuda"]


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_hadolint_has_nothing_to_say(file: Path) -> None:
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    assert linter, "hadolint is not installed: pip install -e '.[dev]'"
    told = subprocess.run([linter, file], check=False, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_an_image_is_pinned_and_has_no_root(file: Path) -> None:
    steps = instructions(file)
    [base] = [step.text for step in steps if step.text.startswith("BASE=")]
    assert base.count(".") == 2 and ":latest" not in base
    assert [step.text for step in steps if step.name == "USER"] == ["${UID}"]
    names = [step.name for step in steps]
    assert names.index("USER") < names.index("HEALTHCHECK") < names.index("ENTRYPOINT")
    copied = [word for step in steps if step.name == "COPY" for word in step.text.split()[:-1]]
    for source in copied:
        assert source.startswith(("-", "/")) or (ROOT / source).exists()


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.file.name)
def test_systemd_takes_a_unit(unit: Unit, tmp_path: Path) -> None:
    """`systemd-analyze verify`, where there is systemd, with a program that exists."""
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("there is no systemd-analyze here")
    text = unit.file.read_text()
    program = unit.one("ExecStart").split()[0]
    copy = tmp_path / unit.file.name
    copy.write_text(text.replace(program, sys.executable))
    told = subprocess.run([analyze, "verify", copy], check=False, capture_output=True, text=True)
    assert told.returncode == 0 and copy.name not in told.stderr, told.stderr


def test_prometheus_is_told_of_the_units_nodes() -> None:
    shipped = DEPLOY / "systemd" / "prometheus-nodes.yml"
    variables, rays = shipped_variables(), [unit for unit in UNITS if "-ray-" in unit.file.name]
    commands = [unit.command(variables, Path()) for unit in rays]
    [port] = {
        word.partition("=")[2]
        for words in commands
        for word in words
        if word.startswith("--metrics-export-port=")
    }
    [group] = yaml.safe_load(shipped.read_text())
    assert group["targets"] == [f"{variables['NODE_IP']}:{port}"]
    installed = "/etc/prometheus/headrace-nodes.yml"
    configuration = yaml.safe_load((ROOT / "cluster/prometheus/prometheus.yml").read_text())
    [ray] = [job for job in configuration["scrape_configs"] if job["job_name"] == "ray"]
    assert installed in ray["file_sd_configs"][0]["files"]
    assert f"systemd/{shipped.name} {installed}" in (DEPLOY / "README.md").read_text()


@pytest.mark.slow
def test_a_wheel_has_the_code_and_nothing_of_this(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(".*", "build"))
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", tmp_path, source], check=True)
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "headrace/cluster/cli/job.py" in names
    assert not [name for name in names if "deploy" in name]
