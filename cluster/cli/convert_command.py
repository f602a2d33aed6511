"""`headrace convert` and `headrace inspect` as typer sees them."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from headrace.cluster.cli.calibrate_options import CalibrationOptions
from headrace.cluster.cli.evaluate_options import CorpusOptions
from headrace.cluster.cli.format_options import FormatOptions, MixOptions
from headrace.cluster.cli.option_groups import takes_options
from headrace.cluster.cli.options import StoreArgument
from headrace.runtime.store import Store


@takes_options
def convert_checkpoint(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="A Hugging Face checkpoint or a GGUF file: a path, or a name on the Hub, such as Qwen/Qwen3-32B."
        ),
    ],
    store: Annotated[Path, typer.Argument(help="The directory to write.")],
    formats: FormatOptions,
    *,
    allow_missing_tokenizer: Annotated[
        bool, typer.Option("--allow-missing-tokenizer", help="Convert without a tokenizer.")
    ] = False,
    gate: Annotated[
        Path | None,
        typer.Option(
            help="Thresholds (YAML) for the store beside the checkpoint over --text; one that crosses them is "
            "held back, with exit code 3."
        ),
    ] = None,
    calibration: CalibrationOptions,
    mix: MixOptions,
    corpus: CorpusOptions,
) -> None:
    """Turn a checkpoint into a store. Run it again to resume; one layer is in memory at a time.

    With --calibrate TEXT, roundings follow what matrices are given when the text is read; with --budget, formats
    do, too. Options about other texts and --dtype are the gate's, as in headrace eval; --device and --device-memory are of both.
    """
    from headrace.cluster.cli.conversion import settle
    from headrace.cluster.cli.convert import run_convert
    from headrace.cluster.cli.gated_convert import GatedConversion
    from headrace.cluster.hub import local_checkpoint
    from headrace.runtime.conversion.selfcheck import check

    checkpoint = local_checkpoint(checkpoint)
    settled = settle(Console(), checkpoint, formats, mix, calibration, corpus)

    def run() -> Store:
        found = settled()
        return run_convert(
            Console(),
            checkpoint,
            store,
            format=found.format,
            policy=found.policy,
            double_quant=formats.double_quant,
            group_size=found.group_size,
            requantize=formats.requantize,
            allow_missing_tokenizer=allow_missing_tokenizer,
            self_check=check,
            calibration=found.calibration,
        )

    if gate is None:
        corpus.refuse_without_gate(calibrating=calibration.calibrate is not None)
        run()
    else:
        raise typer.Exit(GatedConversion(Console(), checkpoint, store, corpus, gate).run(run))


def inspect_store(
    store: StoreArgument,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte, check it.")] = False,
    json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Print a store's layers, bytes and formats."""
    from headrace.cluster.cli.convert import run_inspect

    run_inspect(Console(), store, verify=verify, as_json=json)
