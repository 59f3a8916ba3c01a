"""Weights of half precision: the same products, and only where nothing is lost."""

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="models need torch")

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from models.common.halves import HalfLinear, can_halve, halve, product, round_files
from models.common.traced import TracedStep

torch.set_num_threads(1)


def halves(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).half().float()


def needs_fbgemm() -> None:
    if not can_halve(torch.zeros(1, 1)):
        pytest.skip("no FBGEMM on this processor")


@pytest.mark.parametrize("bias", [False, True])
def test_products_are_those_of_plain_layers(bias: bool) -> None:
    needs_fbgemm()
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(48, 20, bias), nn.Sequential(nn.ReLU(), nn.Linear(20, 33)))
    for layer in (plain[0], plain[1][1]):
        layer.weight.data = layer.weight.data.half().float()
    inputs = [torch.randn(*shape, 48) for shape in ((1,), (1, 1), (5, 3), (70,), (2, 0))]
    inputs.append(torch.randn(6, 96)[:, :48])
    want = [plain(x) for x in inputs]
    halve(plain)
    assert [isinstance(layer, HalfLinear) for layer in (plain[0], plain[1][1])] == [True, True]
    for x, sums in zip(inputs, want, strict=True):
        torch.testing.assert_close(plain(x), sums, rtol=0.0, atol=1e-6)


def test_a_weight_that_is_no_half_stays_as_it_is() -> None:
    weight = halves(4, 3)
    weight[2, 1] += 1e-5
    assert not can_halve(weight)
    assert not can_halve(torch.full((1, 1), 1e6))  # beyond the greatest
    assert not can_halve(torch.full((1, 1), 1e-9))
    assert not can_halve(torch.full((1, 1), torch.nan))
    assert not can_halve(torch.zeros(1, 1, device="meta"))
    assert not can_halve(torch.zeros(1, 1, dtype=torch.float64))
    layer = nn.Linear(3, 4)
    layer.weight.data = weight
    model = nn.Sequential(layer)
    halve(model)
    assert model[0] is layer
    x = torch.randn(2, 3)
    torch.testing.assert_close(product(weight)(x), x @ weight.T)


def test_a_traced_step_keeps_its_weights() -> None:
    needs_fbgemm()
    weight, x = halves(7, 5), torch.randn(3, 5)
    step = TracedStep(product(weight.clone()), [], x)
    torch.testing.assert_close(step(x), x @ weight.T, rtol=0.0, atol=1e-6)


def test_a_checkpoint_is_rounded_matrix_by_matrix(tmp_path: Path) -> None:
    torch.manual_seed(0)
    given = {"matrix": torch.randn(6, 5), "vector": torch.randn(5), "ids": torch.arange(4)[None]}
    save_file(given, tmp_path / "model.safetensors", {"format": "pt"})
    changes = round_files(tmp_path)
    assert 0 < changes["model.safetensors"] < 2**-10
    made = load_file(tmp_path / "model.safetensors")
    assert torch.equal(made["matrix"], given["matrix"].half().float())
    assert torch.equal(made["vector"], given["vector"])
    assert torch.equal(made["ids"], given["ids"])
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert round_files(tmp_path) == {"model.safetensors": 0.0}
