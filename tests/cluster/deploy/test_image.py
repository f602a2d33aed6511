"""The CPU image's steps without Docker: its build stage in a fresh folder and environment.

What is replayed is ARG, ENV, WORKDIR, COPY (of what .dockerignore lets through) and RUN of the stage `build`, with
the image's absolute paths in the folder. The base image, apt-get and useradd of the last stage are not.
"""

import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
from commands import STORIES
from deployment import DEPLOY, ROOT, Instruction, instructions

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

DOCKERFILE = DEPLOY / "docker" / "Dockerfile.cpu"


class Build:
    """The state of a stage: variables, folder, and where `/` is."""

    def __init__(self, root: Path, **arguments: str) -> None:
        self._root, self._arguments = root, arguments
        # Of the machine's: where pip finds packages.
        self._variables = {
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            "HOME": str(root),
        }
        self._folder = root

    def step(self, step: Instruction) -> None:
        getattr(self, f"_{step.name.lower()}")(step.text)

    def path(self, text: str) -> str:
        """With the image's absolute paths in the folder."""
        return re.sub(r"(?<![\w.])/(?=opt/|src\b|data\b|models\b)", f"{self._root}/", text)

    @property
    def environment(self) -> dict[str, str]:
        kept = ("PIP_", "SSL_", "REQUESTS_", "HTTP", "http", "NO_PROXY", "no_proxy")
        outside = {k: v for k, v in os.environ.items() if k.startswith(kept)}
        return outside | self._variables

    def _arg(self, text: str) -> None:
        name, _, default = text.partition("=")
        self._variables[name] = self._arguments.get(name, default)

    def _env(self, text: str) -> None:
        for name, value in re.findall(r"(\w+)=(\S+)", text):
            self._variables[name] = self.path(value).replace("$PATH", self._variables["PATH"])

    def _workdir(self, text: str) -> None:
        self._folder = Path(self.path(text))
        self._folder.mkdir(parents=True, exist_ok=True)

    def _shell(self, text: str) -> None:
        assert "bash" in text

    def _copy(self, text: str) -> None:
        *sources, target = text.split()
        for source in sources:
            for file in let_through(ROOT / source):
                inside = file.relative_to(ROOT / source)
                made = self._folder / target / (inside if (ROOT / source).is_dir() else file.name)
                made.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, made, follow_symlinks=False)

    def _run(self, text: str) -> None:
        command = self.path(re.sub(r"--mount=\S+ ", "", text))
        ran = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command],
            cwd=self._folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, f"{command}\n{ran.stdout[-3000:]}\n{ran.stderr[-3000:]}"


def let_through(source: Path) -> list[Path]:
    """Files and links that are sent to a builder: the last line of .dockerignore that matches decides."""
    lines = Path(f"{DOCKERFILE}.dockerignore").read_text().split()
    found = [source] if source.is_file() else []
    for folder, folders, files in os.walk(source):
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        found += [Path(folder) / name for name in (*files, *links)]
    return [file for file in found if not _ignored(str(file.relative_to(ROOT)), lines)]


def _ignored(path: str, lines: list[str]) -> bool:
    parts = path.split("/")
    parents = ["/".join(parts[: n + 1]) for n in range(len(parts))]
    ignored = False
    for line in lines:
        pattern = line.removeprefix("!").removeprefix("**/")
        deep = "**/" in line
        names = parts if deep else parents
        if any(
            fnmatch(name, pattern) and (deep or name.count("/") == pattern.count("/"))
            for name in names
        ):
            ignored = not line.startswith("!")
    return ignored


def test_the_steps_of_the_cpu_image_give_a_headrace_that_runs(tmp_path: Path) -> None:
    steps = instructions(DOCKERFILE)
    first, last = (i for i, step in enumerate(steps) if step.name == "FROM")
    build = Build(tmp_path, TORCH_INDEX="")  # the index that pip has here
    for step in steps[first + 1 : last]:
        build.step(step)
    assert not (tmp_path / "src" / "cluster" / "deploy" / "kuberay").exists()
    assert not (tmp_path / "src" / "tests").exists()
    installed = tmp_path / "opt" / "headrace"
    [package] = (installed / "lib").glob("python*/site-packages/headrace")
    assert (package / "cluster" / "cli" / "job.py").exists()
    assert not (package / "cluster" / "deploy").exists()
    run = [
        "headrace convert $STORIES /models/s && headrace plan /models/s --device cpu --json > /data/plan",
        "headrace inspect /models/s --verify && ray --version && serve --help > /data/help",
    ]
    build.step(Instruction("ENV", f"STORIES={STORIES}"))
    for folder in ("/data", "/models"):
        build.step(Instruction("WORKDIR", folder))
    for command in run:
        build.step(Instruction("RUN", command))
    assert (tmp_path / "data" / "plan").stat().st_size > 100
