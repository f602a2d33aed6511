"""Fixtures that all tests share. Files beside this one are not importable in importlib mode."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def architectures() -> ModuleType:
    """tests/architectures.py: tables of tiny configurations and `tiny_config`."""
    return _load("architectures")
