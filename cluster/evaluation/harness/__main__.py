"""lm-evaluation-harness' command line: --model headrace --model_args store=DIRECTORY --tasks ..."""

import sys

from lm_eval.__main__ import cli_evaluate
from rich.console import Console

import headrace.cluster.evaluation.harness.model  # noqa: F401  (registers "headrace")
from headrace.scheduler.errors import HeadraceError

try:
    cli_evaluate()
except HeadraceError as error:
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    console.print(f"error: {error}")
    sys.exit(1)
