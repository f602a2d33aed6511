"""`headrace kv`: what lies in a directory of KV pages, whether it can be read, and its deletion."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="List, verify and delete KV pages on a drive.", no_args_is_help=True)

DirectoryArgument = Annotated[
    Path, typer.Argument(metavar="DIR", help="Of one stage's KV pages.", show_default=False)
]
KeysOption = Annotated[
    Path | None, typer.Option("--key-file", help="The file with the tenants' keys.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="For machines.")]


@app.command("ls")
def ls(directory: DirectoryArgument, json: JsonOption = False) -> None:
    """Print segments, and what they hold for whom. Needs no keys."""
    from headrace.cluster.cli.kv_commands import list_pages

    list_pages(directory, json=json)


@app.command("verify")
def verify(
    directory: DirectoryArgument, key_file: KeysOption = None, json: JsonOption = False
) -> None:
    """Read every page. Exit code 1 if any is damaged or not what was encrypted.

    Checksums show damage without a key; that nobody changed a page shows only with it.
    """
    from headrace.cluster.cli.kv_commands import verify_pages

    verify_pages(directory, key_file, json=json)


@app.command("purge")
def purge(
    directory: DirectoryArgument,
    tenant: Annotated[
        str | None,
        typer.Option("--tenant", "--job", help="Whose pages; all by default."),
    ] = None,
    key_file: KeysOption = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: JsonOption = False,
) -> None:
    """Delete pages and, with --key-file, the keys that they are encrypted with. Prints a receipt."""
    from headrace.cluster.cli.kv_commands import purge_pages

    purge_pages(directory, tenant, key_file, yes=yes, json=json)
