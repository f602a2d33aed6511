"""An evaluation as one HTML page that needs nothing else: plots are inside, nothing is fetched."""

import math
from pathlib import Path

import jinja2
from markupsafe import Markup

from headrace.cluster.evaluation.plots import COLOURS, Series, bars, lines
from headrace.cluster.evaluation.results import Evaluation, StoreFigures
from headrace.cluster.evaluation.summary import summary_rows

__all__ = ["render_page"]


def render_page(found: Evaluation) -> str:
    """HTML. Without a reference it has the table alone."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["name"] = lambda path: Path(path).name or path
    page = environment.get_template("page.html")
    rows = list(summary_rows(found))
    return page.render(
        found=found,
        models=found.models,
        rows=rows,
        plots=_plots(found),
        colours=COLOURS,
        shade=_shade,
    )


def _plots(found: Evaluation) -> dict[str, list[Markup]]:
    if found.reference is None:
        return {}
    return {
        "layers": [Markup(plot) for plot in _layers(found.stores)],
        "histograms": [Markup(_histogram(i, store)) for i, store in enumerate(found.stores)],
        "positions": [Markup(plot) for plot in _positions(found.stores)],
    }


def _name(store: StoreFigures) -> str:
    return Path(store.model.path).name


def _layers(stores: list[StoreFigures]) -> list[str]:
    """Of stores with as many layers as the reference."""
    stores = [store for store in stores if store.layer_errors]
    if not stores:
        return []
    series = []
    for store in stores:
        errors = store.layer_errors or []
        tips = [f"{_name(store)}, layer {i}: {error:.4g}" for i, error in enumerate(errors)]
        series.append(Series(_name(store), errors, tips))
    ticks = [str(i) for i in range(len(stores[0].layer_errors or []))]
    title = "Relative error of hidden states after each layer"
    return [lines(title, "after layer", "relative error", ticks, series)]


def _histogram(index: int, store: StoreFigures) -> str:
    assert store.divergence is not None
    edges, counts = zip(*store.divergence.histogram, strict=True)
    total = sum(counts)
    ticks = [f"{edge:.0e}" if math.isfinite(edge) else "more" for edge in edges]
    tips = [
        f"up to {edge:.2g} nats: {count} tokens" if math.isfinite(edge) else f"more: {count} tokens"
        for edge, count in zip(edges, counts, strict=True)
    ]
    shares = Series(_name(store), [100 * count / total for count in counts], tips)
    title = f"Tokens by KL divergence, {_name(store)}"
    return bars(title, "KL divergence up to (nats)", "% of tokens", ticks, shares, index)


def _positions(stores: list[StoreFigures]) -> list[str]:
    ticks = [
        f"{o.first}" if o.first == o.last else f"{o.first}-{o.last}"
        for o in stores[0].octaves or []
    ]
    kld, ratio = [], []
    for store in stores:
        buckets = store.octaves or []
        places = [f"{_name(store)}, positions {place}" for place in ticks]
        tips = [
            f"{p}: {o.kld:.4g} nats, {o.tokens} tokens"
            for p, o in zip(places, buckets, strict=True)
        ]
        kld.append(Series(_name(store), [o.kld for o in buckets], tips))
        ratios = [o.perplexity / o.reference_perplexity for o in buckets]
        tips = [
            f"{p}: {o.perplexity:.4g} instead of {o.reference_perplexity:.4g}, {o.tokens} tokens"
            for p, o in zip(places, buckets, strict=True)
        ]
        ratio.append(Series(_name(store), ratios, tips))
    x = "position in the window"
    return [
        lines("Mean KL divergence by position", x, "KL divergence (nats)", ticks, kld),
        lines("Perplexity over the reference's by position", x, "x reference", ticks, ratio),
    ]


def _shade(kld: float) -> int:
    """0 (none) to 4, a step for each factor of ten from 0.001 nats on."""
    return 0 if kld < 1e-3 else min(4, int(math.log10(kld) + 4))
