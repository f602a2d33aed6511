"""Pages of one layer are views of one buffer, and their size is what the planner was told."""

import pytest
import torch

from headrace.runtime.kv.store import KVStore, LayerKV, QuantizedKV, plain_format
from headrace.runtime.manifest import LayerShape
from headrace.scheduler.kv_format import FORMATS

CPU = torch.device("cpu")
SHAPES = {
    3: LayerShape(2, 16, 8, 0, 0, 0),
    7: LayerShape(1, 32, 32, 0, 0, 0),
}


def plain(store: KVStore, layer: int) -> LayerKV:
    kv = store.layer(layer)
    assert isinstance(kv, LayerKV)
    return kv


def test_views_have_the_layers_shapes_and_start_at_zero() -> None:
    with KVStore(SHAPES, 5, torch.bfloat16, CPU) as store:
        kv = plain(store, 3)
        assert kv.k.shape == (5, 2, 64, 16)
        assert kv.v.shape == (5, 2, 64, 8)
        assert plain(store, 7).k.shape == (5, 1, 64, 32)
        assert not kv.k.any() and not kv.v.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_are_those_of_the_plan(dtype: torch.dtype) -> None:
    fmt = plain_format(dtype)
    with KVStore(SHAPES, 5, dtype, CPU) as store:
        for layer, shape in SHAPES.items():
            assert store.page_bytes(layer) == shape.page_bytes(fmt)
        assert SHAPES[3].page_bytes(fmt) == 64 * 2 * (16 + 8) * dtype.itemsize
        assert store.nbytes == 5 * sum(s.page_bytes(fmt) for s in SHAPES.values())


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_sizes_of_quantized_pages_and_tails_are_those_of_the_plan(name: str) -> None:
    fmt, own = FORMATS[name], plain_format(torch.float32)
    with KVStore(SHAPES, 5, torch.float32, CPU, fmt, num_tails=3) as store:
        for layer, shape in SHAPES.items():
            assert store.page_bytes(layer) == shape.page_bytes(fmt)
        pages = 5 * sum(shape.page_bytes(fmt) for shape in SHAPES.values())
        assert store.nbytes == pages + 3 * sum(s.page_bytes(own) for s in SHAPES.values())


def test_a_page_of_a_layer_is_one_extent() -> None:
    with KVStore(SHAPES, 5, torch.float32, CPU) as store:
        kv = plain(store, 3)
        kv.k[2] = 1.0
        kv.v[2] = 2.0
        start = (kv.k[2].data_ptr() - kv.k[0].data_ptr()) // 4
        page = store.page_bytes(3) // 4
        assert start == 2 * page
        whole = kv.k.as_strided((5 * page,), (1,), 0)
        assert whole[start : start + page].all()
        assert not whole[:start].any() and not whole[start + page :].any()


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_quantized_page_is_one_extent_with_its_scales(name: str) -> None:
    with KVStore(SHAPES, 5, torch.float32, CPU, FORMATS[name], num_tails=1) as store:
        kv = store.layer(3)
        assert isinstance(kv, QuantizedKV)
        for side in (kv.k, kv.v):
            side.codes[2], side.scales[2] = 17, 1.0
        page = store.page_bytes(3)
        whole = kv.k.codes.view(torch.uint8).as_strided((5 * page,), (1,), 0)
        written = whole.nonzero().flatten()
        # Of a float16 one, a byte is zero.
        scales = 2 * SHAPES[3].kv_heads * 64 * FORMATS[name].scales
        assert len(written) == page - scales
        assert written[0] == 2 * page and written[-1] == 3 * page - 1


def test_close_frees_and_may_be_repeated() -> None:
    store = KVStore(SHAPES, 5, torch.float32, CPU, FORMATS["int8"], num_tails=2)
    store.close()
    store.close()
    assert store.nbytes == 0
