"""Thresholds in a file, which a store has to keep."""

from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from headrace.cluster.evaluation.results import Evaluation, StoreFigures
from headrace.cluster.given_files import read_yaml
from headrace.scheduler.errors import HeadraceError


class Gate(BaseModel):
    """At least one threshold. KLD is in nats; shares are between 0 and 1.

    All but `max_perplexity` compare with a reference. `max_layer_error` is of the hidden states after any
    layer, `min_equal_tokens` the share of equal tokens in greedy continuations.
    """

    # Not strict: to YAML 1e-3 is a text.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    max_perplexity: float | None = Field(None, gt=1)
    max_perplexity_ratio: float | None = Field(None, gt=0)
    max_mean_kld: float | None = Field(None, ge=0)
    max_median_kld: float | None = Field(None, ge=0)
    max_p99_kld: float | None = Field(None, ge=0)
    max_kld: float | None = Field(None, ge=0)
    min_top1: float | None = Field(None, ge=0, le=1)
    max_layer_error: float | None = Field(None, ge=0)
    min_equal_tokens: float | None = Field(None, ge=0, le=1)

    @property
    def needs_reference(self) -> bool:
        return bool(self.model_fields_set - {"max_perplexity"})

    def crossed(self, store: StoreFigures) -> Iterator[str]:
        """What a store misses, one line each."""
        for name, limit, value in self._figures(store):
            # A figure that is no number keeps no threshold.
            kept = value >= limit if name.startswith("min_") else value <= limit
            if not kept:
                yield f"{store.model.path}: {name} is {limit:g}, found {value:.6g}"

    def _figures(self, store: StoreFigures) -> Iterator[tuple[str, float, float]]:
        found = {"max_perplexity": store.model.perplexity}
        if store.perplexity_ratio is not None and store.divergence is not None:
            found |= {
                "max_perplexity_ratio": store.perplexity_ratio,
                "max_mean_kld": store.divergence.mean,
                "max_median_kld": store.divergence.median,
                "max_p99_kld": store.divergence.p99,
                "max_kld": store.divergence.max,
                "min_top1": store.divergence.top1,
            }
        if store.layer_errors:
            found["max_layer_error"] = max(store.layer_errors)
        if store.generation is not None:
            found["min_equal_tokens"] = store.generation.equal
        for name in sorted(self.model_fields_set):
            limit = getattr(self, name)
            if limit is not None:
                yield name, limit, found.get(name, float("nan"))


def read_gate(file: Path) -> Gate:
    """Raises HeadraceError, naming what is wrong in the file."""
    given = read_yaml("--gate", file)
    names = ", ".join(Gate.model_fields)
    if not isinstance(given, dict) or not given:
        raise HeadraceError(
            f"--gate {file} holds no thresholds; write lines such as 'max_mean_kld: 0.02' ({names})"
        )
    try:
        return Gate.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise HeadraceError(
            f"--gate {file}: {where}: {first['msg']}; thresholds are {names}"
        ) from error


def misses(gate: Gate, evaluation: Evaluation) -> list[str]:
    """Of all stores."""
    return [line for store in evaluation.stores for line in gate.crossed(store)]
