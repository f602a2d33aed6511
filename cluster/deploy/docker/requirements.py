"""Prints what pyproject.toml depends on, with some extras: python requirements.py pyproject.toml EXTRA...

For layers of an image that a change of code does not make anew.
"""

import sys
import tomllib
from pathlib import Path


def requirements(file: str, *extras: str) -> list[str]:
    project = tomllib.loads(Path(file).read_text())["project"]
    chosen = [project["optional-dependencies"][extra] for extra in extras]
    return [*project["dependencies"], *(each for extra in chosen for each in extra)]


if __name__ == "__main__":
    sys.stdout.write("\n".join(requirements(*sys.argv[1:])) + "\n")
