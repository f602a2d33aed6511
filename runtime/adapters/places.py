"""Where in a stage's model an adapter belongs, and whether it fits there."""

from collections.abc import Callable, Iterable, Mapping

from headrace.runtime.adapters.directory import AdapterFiles, Factors
from headrace.runtime.linear import QuantLinear
from headrace.runtime.names import EXPERT_MATRICES, Target
from headrace.runtime.skeleton import BlockKey
from headrace.scheduler.errors import StoreError


class AdapterPlaces:
    """Finds a stage's linear layers by the names that adapters have for them.

    `find` maps names of weights to places in the model, `block_of` says of those which block they are in.
    `linears` are the stage's own, by path, and `layers` their blocks.
    """

    def __init__(
        self,
        find: Callable[[Iterable[str]], Mapping[str, Target | None]],
        block_of: Callable[[str], BlockKey],
        layers: Iterable[int],
        linears: Mapping[str, QuantLinear],
    ) -> None:
        self._find, self._block_of = find, block_of
        self._layers, self.linears = frozenset(layers), linears

    def locate(self, files: AdapterFiles, most_rank: int) -> dict[str, Factors]:
        """What the adapter changes on this stage, by path. StoreError where it does not belong to the model,
        changes what cannot be changed, or has a rank above `most_rank`."""
        path, found = files.adapter.path, {}
        targets = self._find(f"{module}.weight" for module in files.modules)
        for module, factors in files.modules.items():
            target = targets[f"{module}.weight"]
            if target is None:
                raise StoreError(
                    _of_another(files, f"it changes {module}, which this one does not have")
                )
            place = self._place(path, module, target)
            if place is not None:
                self._check(files, module, self.linears[place], most_rank)
                found[place] = factors
        return found

    def _place(self, adapter: str, module: str, target: Target) -> str | None:
        """The path of a linear layer of this stage; None for another stage's."""
        place, _, attribute = target.name.rpartition(".")
        if target.expert is not None or attribute in EXPERT_MATRICES:
            raise StoreError(
                f"the adapter {adapter} changes {module}, a routed expert: adapters can change attention and"
                " dense layers only"
            )
        block = self._block_of(target.name)
        if isinstance(block, int) and (block not in self._layers or place in self.linears):
            return place if block in self._layers else None
        what = (
            "is no linear layer whose products are computed"
            if isinstance(block, int)
            else "lies outside the decoder layers"
        )
        raise StoreError(
            f"the adapter {adapter} changes {module}, which {what}: it cannot be applied"
        )

    @staticmethod
    def _check(files: AdapterFiles, module: str, linear: QuantLinear, most_rank: int) -> None:
        factors = files.modules[module]
        made_for = factors.outputs, factors.inputs
        if made_for != (linear.out_features, linear.in_features):
            own = [linear.out_features, linear.in_features]
            told = f"its {module} is {list(made_for)}, and this one's {own}"
            raise StoreError(_of_another(files, told))
        if factors.rank > most_rank:
            raise StoreError(
                f"the adapter {files.adapter.path} has rank {factors.rank} in {module}, and slots have room for"
                f" {most_rank}: start with --adapter-rank {factors.rank}"
            )


def _of_another(files: AdapterFiles, why: str) -> str:
    return (
        f"the adapter {files.adapter.path} was made for another model ({files.base}): {why}."
        " Name one that was made for this model"
    )
