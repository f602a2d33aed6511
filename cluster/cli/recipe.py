"""Recipes: which weights get which format, in a file that people read, change and share."""

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from headrace.cluster.given_files import read_yaml
from headrace.runtime.conversion.affine import BITS, GROUP_SIZE
from headrace.runtime.sensitivity.candidates import Candidates
from headrace.runtime.sensitivity.choose import Mix, rules_of
from headrace.scheduler.errors import HeadraceError

Format = Literal["keep", "bf16", "int8", "nf4", "int4", "int3"]

HEADER = """\
# A recipe of headrace convert --recipe: names (patterns with *) of weights and their format; what is not named stays as
# it is. kld: how far the model's predictions go, in nats a token, with these weights alone in each format.
"""


class Line(BaseModel):
    """The first line that fits a weight decides. `bits` a weight and `kld` by format are for readers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    names: list[str] = Field(min_length=1)
    format: Format
    bits: float | None = None
    kld: dict[str, float] | None = None


class Recipe(BaseModel):
    """`made` says of what and how, for readers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: Literal[1]
    made: dict[str, Any] | None = None
    group_size: int | None = None
    weights: list[Line]

    def options(self) -> tuple[list[tuple[str, str]], int | None]:
        """A conversion's policy, and its group size where it needs one."""
        policy: list[tuple[str, str]] = [
            (name, line.format) for line in self.weights for name in line.names
        ]
        return policy, self.group_size if any(fmt in BITS for _, fmt in policy) else None


def recipe_of(mix: Mix, candidates: Candidates, made: dict[str, Any]) -> Recipe:
    sensitivity = mix.sensitivity
    lines = [
        {
            "names": list(names),
            "format": fmt,
            "bits": round(8 * group.nbytes[fmt] / candidates.count(group.names), 3),
            "kld": {tried: float(f"{kld:.4g}") for tried, kld in group.kld.items() if kld},
        }
        for group, (names, fmt) in zip(
            sensitivity.groups, rules_of(sensitivity.groups, mix.formats), strict=True
        )
    ]
    size = candidates.group_size or GROUP_SIZE
    return Recipe.model_validate({"recipe": 1, "made": made, "group_size": size, "weights": lines})


def write_recipe(file: Path, recipe: Recipe) -> None:
    """Raises HeadraceError where the file cannot be written, or is there already."""
    lines = recipe.model_dump(exclude_none=True)
    text = yaml.safe_dump(lines, sort_keys=False, width=120, default_flow_style=None)
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(HEADER + text)
    except OSError as error:
        raise HeadraceError(f"cannot write --write-recipe {file}: {error.strerror}") from error


def refuse_taken(file: Path) -> None:
    """Before anything is measured: HeadraceError where `write_recipe` would fail."""
    if file.exists():
        raise HeadraceError(
            f"--write-recipe {file} is there already: convert with --recipe {file}, or name another file"
        )
    if not file.absolute().parent.is_dir():
        raise HeadraceError(f"--write-recipe {file}: there is no folder {file.absolute().parent}")


def read_recipe(file: Path) -> Recipe:
    """Raises HeadraceError, naming what is wrong in the file."""
    given = read_yaml("--recipe", file)
    try:
        return Recipe.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise HeadraceError(
            f"--recipe {file}: {where}: {first['msg']}; write 'recipe: 1', and under 'weights' lines such as "
            "'- {names: [\"*.q_proj.weight\"], format: int8}'"
        ) from error
