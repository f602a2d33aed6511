"""`headrace push`, `pull` and `cold`: stores to and from any place that fsspec knows."""

from pathlib import Path
from typing import Annotated

import typer

Url = Annotated[
    str,
    typer.Argument(
        metavar="URL[#NAME]",
        help="A place that fsspec knows (file://, s3://, gs://, https://, ...) and the model's name there, "
        "by default that of the store's folder.",
    ),
]
Tier = Annotated[str, typer.Argument(metavar="URL", help="A place that stores were pushed to.")]
Jobs = Annotated[int, typer.Option(min=1, max=256, help="Chunks under way at once.")]

app = typer.Typer(help="Look into a cold tier, and remove models from it.", no_args_is_help=True)


def push(
    store: Annotated[Path, typer.Argument(help="A store made by `headrace convert`.")],
    url: Url,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A model there that this one is a fine-tune of: differences from it are stored.",
        ),
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Read what is there already; replace what is damaged.")
    ] = False,
    jobs: Jobs = 8,
) -> None:
    """Put a store into a cold tier. Run it again to resume; what is there is not sent again."""
    from headrace.cluster.cli.cold_commands import run_push

    run_push(store, url, base=base, repair=repair, jobs=jobs)


def pull(
    url: Url,
    store: Annotated[Path, typer.Argument(help="The directory to write.")],
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="RANGES",
            help="Such as 0-15,31: of the layers, only these, and the embedding with the first one, the "
            "head with the last one. All, if not given.",
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read what is there already; fetch what is damaged.")
    ] = False,
    jobs: Jobs = 8,
) -> None:
    """Bring a store from a cold tier. Run it again to resume, or for more layers."""
    from headrace.cluster.cli.cold_commands import run_pull

    run_pull(url, store, layers=layers, verify=verify, jobs=jobs)


@app.command("list")
def list_models(
    url: Tier, json: Annotated[bool, typer.Option("--json", help="For machines.")] = False
) -> None:
    """Print models, and the bytes that they take."""
    from headrace.cluster.cli.cold_commands import run_list

    run_list(url, as_json=json)


@app.command()
def remove(url: Annotated[str, typer.Argument(metavar="URL#NAME")]) -> None:
    """Remove a model, and what no other model needs of it."""
    from headrace.cluster.cli.cold_commands import run_remove

    run_remove(url)


@app.command()
def clean(
    url: Tier,
    older_than: Annotated[
        str, typer.Option(help="A killed push can be resumed for so long, such as 90min or 7d.")
    ] = "1d",
) -> None:
    """Remove what killed pushes left: objects that belong to no model."""
    from headrace.cluster.cli.cold_commands import run_clean

    run_clean(url, older_than)
