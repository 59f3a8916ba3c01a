"""Packed weights: the same products, for any number of rows."""

import pytest

pytest.importorskip("torch", reason="models need torch")

import torch
from torch import nn

from models.common.packed import PackedLinear, can_pack, pack

torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_products_are_those_of_plain_layers(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(48, 20, bias), nn.Sequential(nn.ReLU(), nn.Linear(20, 33)))
    plain.to(dtype)
    if not can_pack(torch.zeros(1, 1, dtype=dtype)):
        pytest.skip("nothing is packed on this processor")
    inputs = [torch.randn(*shape, 48).to(dtype) for shape in ((1,), (1, 1), (5, 3), (70,))]
    want = [plain(x) for x in inputs]
    pack(plain)
    assert [isinstance(layer, PackedLinear) for layer in (plain[0], plain[1][1])] == [True, True]
    near = {"rtol": 0.0, "atol": 1e-6 if dtype == torch.float32 else 2e-2}
    for x, sums in zip(inputs, want, strict=True):
        torch.testing.assert_close(plain(x), sums, **near)


def test_what_cannot_be_packed_stays() -> None:
    assert not can_pack(torch.zeros(2, 2, dtype=torch.float64))
    assert not can_pack(torch.zeros(2, 2, device="meta"))
    model = nn.Sequential(nn.Linear(2, 2).double(), nn.Embedding(2, 2))
    pack(model)
    assert type(model[0]) is nn.Linear
