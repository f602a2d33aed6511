"""Pages of one layer are views of one buffer, and their size is what the planner was told."""

import pytest
import torch

from headrace.runtime.kv_store import KVStore
from headrace.runtime.store import LayerShape

CPU = torch.device("cpu")
SHAPES = {
    3: LayerShape(2, 16, 8, 0, 0, 0),
    7: LayerShape(1, 32, 32, 0, 0, 0),
}


def test_views_have_the_layers_shapes_and_start_at_zero() -> None:
    with KVStore(SHAPES, 5, torch.bfloat16, CPU) as store:
        kv = store.layer(3)
        assert kv.k.shape == (5, 2, 64, 16)
        assert kv.v.shape == (5, 2, 64, 8)
        assert store.layer(7).k.shape == (5, 1, 64, 32)
        assert not kv.k.any() and not kv.v.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_are_those_of_the_plan(dtype: torch.dtype) -> None:
    with KVStore(SHAPES, 5, dtype, CPU) as store:
        for layer, shape in SHAPES.items():
            assert store.page_bytes(layer) == KVStore.page_nbytes(shape, dtype)
        assert KVStore.page_nbytes(SHAPES[3], dtype) == 64 * 2 * (16 + 8) * dtype.itemsize
        assert store.nbytes == 5 * sum(KVStore.page_nbytes(s, dtype) for s in SHAPES.values())


def test_a_page_of_a_layer_is_one_extent() -> None:
    with KVStore(SHAPES, 5, torch.float32, CPU) as store:
        kv = store.layer(3)
        kv.k[2] = 1.0
        kv.v[2] = 2.0
        start = (kv.k[2].data_ptr() - kv.k[0].data_ptr()) // 4
        page = store.page_bytes(3) // 4
        assert start == 2 * page
        whole = kv.k.as_strided((5 * page,), (1,), 0)
        assert whole[start : start + page].all()
        assert not whole[:start].any() and not whole[start + page :].any()


def test_close_frees_and_may_be_repeated() -> None:
    store = KVStore(SHAPES, 5, torch.float32, CPU)
    store.close()
    store.close()
    assert store.nbytes == 0
