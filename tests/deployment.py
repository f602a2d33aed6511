"""What the files of cluster/deploy hold: their commands, units and Dockerfiles, as those read them that run them."""

import itertools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
import yaml

from headrace.cluster.cli.main import app

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "cluster" / "deploy"
TEXTS = [
    *sorted(p for p in DEPLOY.rglob("*") if p.suffix in (".md", ".yaml", ".yml", ".sh", ".env")),
    ROOT / "docs" / "clusters.md",
    ROOT / "docs" / "networking.md",
]


def documents(file: Path) -> list[Any]:
    return [each for each in yaml.safe_load_all(file.read_text()) if each is not None]


def parse_headrace(arguments: list[str]) -> dict[str, Any]:
    """The parameters of a command line, read by the real one. click's UsageError for what it does not take."""
    command: Any = typer.main.get_command(app)
    names, rest = ["headrace"], list(arguments)
    while hasattr(command, "commands"):
        names.append(rest.pop(0))
        command = command.commands[names[-1]]
    given: dict[str, Any] = command.make_context(" ".join(names), rest).params
    if names[1:] == ["job", "submit"]:
        parse_headrace(["generate", *given["arguments"]])
    return given


def headrace_lines(text: str) -> Iterator[list[str]]:
    """The arguments of all that a text has people or shells run as `headrace ...`; not what prose names in `backticks`.

    Variables have their defaults, and "..." stands for more of the same.
    """
    text = re.sub(r"\$\{[A-Z_]+:-([^}]*)\}", r"\1", re.sub(r"\\\n\s*", " ", text))
    for found in re.finditer(r"(?m)(?:^|[\s'\"(])headrace ([a-z][^`\n]*)", text):
        quote = text[found.start()]
        command = found.group(1)
        if quote in "'\"":
            command = command.partition(quote)[0]
        words = _words(command)
        if words[0] in _commands():
            yield words


def _words(text: str) -> list[str]:
    """A shell's, up to what ends a command."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars="|&;<>()")
    lexer.whitespace_split, lexer.commenters = True, "#"
    words = list(itertools.takewhile(lambda word: not set(word) <= set("|&;<>()"), lexer))
    return [word for word in words if word != "..."]


def _commands() -> set[str]:
    root: Any = typer.main.get_command(app)
    return {*root.commands}


@dataclass(frozen=True)
class Unit:
    """A systemd unit's [Service], as systemd would run it on a machine with headrace.env."""

    file: Path

    def values(self, key: str) -> list[str]:
        text = re.sub(r"\\\n\s*", " ", self.file.read_text())
        return re.findall(rf"(?m)^{key}=(.*)$", text)

    def one(self, key: str) -> str:
        [value] = self.values(key)
        return value

    def environment(self, credentials: Path) -> dict[str, str]:
        given = [each.partition("=") for each in self.values("Environment")]
        return {name: value.replace("%d", str(credentials)) for name, _, value in given}

    def command(self, variables: dict[str, str], credentials: Path) -> list[str]:
        """ExecStart: `${NAME}` is one word or part of one, `$NAME` alone is split into words."""
        words: list[str] = []
        for word in shlex.split(self.one("ExecStart").replace("%d", str(credentials))):
            if re.fullmatch(r"\$[A-Z_]+", word):
                words += variables[word[1:]].split()
            else:
                words.append(re.sub(r"\$\{([A-Z_]+)\}", lambda m: variables[m.group(1)], word))
        return words


UNITS = [Unit(file) for file in sorted((DEPLOY / "systemd").glob("*.service"))]


def shipped_variables() -> dict[str, str]:
    lines = (DEPLOY / "systemd" / "headrace.env").read_text().splitlines()
    pairs = [line.partition("=") for line in lines if line and not line.startswith("#")]
    return {name: value for name, _, value in pairs}


@dataclass(frozen=True)
class Instruction:
    """One of a Dockerfile: its name, and the rest with continued lines joined."""

    name: str
    text: str


def instructions(dockerfile: Path) -> list[Instruction]:
    lines = [l for l in dockerfile.read_text().splitlines() if not l.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    split = [line.partition(" ") for line in joined.splitlines() if line.strip()]
    merged: list[Instruction] = []
    for name, _, text in split:
        if name.isupper():
            merged.append(Instruction(name, text.strip()))
        else:  # HEALTHCHECK's CMD on a line of its own
            merged[-1] = Instruction(merged[-1].name, f"{merged[-1].text} {name} {text}")
    return merged
