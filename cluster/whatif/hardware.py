"""`nodes.yaml` and `prices.yaml`: hardware that one does not have, and what it would cost."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from headrace.cluster.cli.sizes import parse_size
from headrace.cluster.given_files import read_yaml
from headrace.cluster.whatif.devices import GPUS
from headrace.scheduler.errors import HeadraceError

M = TypeVar("M", bound=BaseModel)


def _size(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return parse_size(value)
    except HeadraceError as error:
        raise ValueError(str(error)) from error


Size = Annotated[int, Field(ge=0), BeforeValidator(_size)]
Speed = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Node(Strict):
    """`count` machines of a kind. GB/s are 1e9 bytes a second; `gpu` is a name of GPUS, whose figures stand
    unless others are given. `reached` of the figures are published ones and not measured ones, of which a
    part is reached. The price is of one machine, in whatever currency."""

    count: int = Field(1, ge=1, le=1024)
    gpus: int = Field(1, ge=1, le=64)
    gpu: str | None = None
    gpu_memory: Size | None = None
    hbm_gbps: Speed | None = None
    tflops: Speed | None = None
    pcie_gbps: Speed | None = None
    measured: bool = False
    host_memory: Size
    drive_gbps: Speed
    network_gbps: Speed = 1.25
    network_latency_ms: float = Field(0.3, ge=0)
    price_per_hour: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _complete(self) -> "Node":
        if self.gpu is not None and self.gpu not in GPUS:
            raise ValueError(f"no GPU is called {self.gpu!r}; there are {', '.join(GPUS)}")
        lacking = [
            name
            for name in ("gpu_memory", "hbm_gbps", "tflops", "pcie_gbps")
            if self.gpu is None and getattr(self, name) is None
        ]
        if lacking:
            raise ValueError(f"without a known `gpu`, give {', '.join(lacking)}")
        return self


class Link(Strict):
    """The network between two nodes of a pool, counted from 0 in the order that they are written in."""

    between: tuple[int, int]
    gbps: Speed
    latency_ms: float = Field(0.3, ge=0)


class Pool(Strict):
    """Nodes that run one model together, each GPU a stage."""

    name: str
    nodes: list[Node] = Field(min_length=1)
    links: list[Link] = []

    @model_validator(mode="after")
    def _known(self) -> "Pool":
        count = sum(node.count for node in self.nodes)
        for link in self.links:
            if not all(0 <= end < count for end in link.between):
                raise ValueError(
                    f"a link is between nodes {link.between[0]} and {link.between[1]}, and the pool has"
                    f" {count}, counted from 0"
                )
        return self


class Pools(Strict):
    pools: list[Pool] = Field(min_length=1)


def read_pools(nodes: Path, prices: Path | None) -> list[Pool]:
    """The pools of `nodes`; what a node's `instance` is stands in `prices`.

    Raises HeadraceError naming the file and the place.
    """
    given = _mapping("--what-if", nodes)
    instances: Mapping[str, Any] = {}
    if prices is not None:
        instances = _mapping("--prices", prices).get("instances") or {}
        if not isinstance(instances, dict):
            raise HeadraceError(f"{prices}: `instances` must be a mapping of names to nodes")
    for pool in given.get("pools") or []:
        if isinstance(pool, dict) and isinstance(pool.get("nodes"), list):
            pool["nodes"] = [_filled(node, instances, nodes, prices) for node in pool["nodes"]]
    return _valid(Pools, given, nodes).pools


def _filled(node: Any, instances: Mapping[str, Any], nodes: Path, prices: Path | None) -> Any:
    """The node with what its `instance` says; what it says itself stands."""
    if not isinstance(node, dict) or "instance" not in node:
        return node
    name = node["instance"]
    if name not in instances:
        where = f"{prices} has {', '.join(instances)}" if prices else "give --prices with them"
        raise HeadraceError(f"{nodes}: no instance is called {name!r}; {where}")
    own = {key: value for key, value in node.items() if key != "instance"}
    return {**instances[name], **own}


def _mapping(option: str, file: Path) -> dict[str, Any]:
    found = read_yaml(option, file)
    if not isinstance(found, dict):
        raise HeadraceError(f"{file} must be a mapping, such as `pools:` and a list")
    return found


def _valid(model: type[M], given: Any, file: Path) -> M:
    try:
        return model.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise HeadraceError(f"{file}: {place}: {first['msg']}") from error
