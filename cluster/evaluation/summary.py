"""The rows of an evaluation's table, for terminals and pages alike."""

from collections.abc import Iterator

from rich.filesize import decimal

from headrace.cluster.evaluation.results import Evaluation, StoreFigures

DISTANCES = (
    "x reference",
    "KLD mean",
    "KLD median",
    "KLD p99",
    "KLD max",
    "same top-1",
    "worst layer's error",
    "greedy: equal tokens",
    "greedy: common prefix",
)


def summary_rows(found: Evaluation) -> Iterator[tuple[str, list[str]]]:
    """(name, a cell for each of `Evaluation.models`)."""
    models = found.models
    yield "format", [model.format for model in models]
    yield "bytes", [decimal(model.nbytes) for model in models]
    yield "bits a weight", [f"{model.bits_a_weight:.2f}" for model in models]
    yield "perplexity", [f"{model.perplexity:.4f}" for model in models]
    if found.reference is not None:
        columns = zip(*map(_distance, found.stores), strict=True)
        for name, cells in zip(DISTANCES, columns, strict=True):
            if any(cells):
                yield name, ["", *cells]
    yield "seconds a token, this run", [f"{model.seconds_a_token:.2g}" for model in models]


def _distance(store: StoreFigures) -> list[str]:
    """In the order of DISTANCES; empty where there is none."""
    kld, said = store.divergence, store.generation
    assert kld is not None and store.perplexity_ratio is not None
    klds = [f"{value:.2e}" for value in (kld.mean, kld.median, kld.p99, kld.max)]
    layers = f"{max(store.layer_errors):.2%}" if store.layer_errors else "-"
    equal, common = "", ""
    if said is not None:
        equal, common = f"{said.equal:.1%}", f"{said.common_prefix:.1f} of {said.tokens}"
    return [f"{store.perplexity_ratio:.4f}", *klds, f"{kld.top1:.2%}", layers, equal, common]
