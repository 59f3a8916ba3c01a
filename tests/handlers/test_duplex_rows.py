"""Traced steps of the tokenizers against plain ones, as people come, stand idle and go."""

import pytest

pytest.importorskip("torch", reason="models need torch")
pytest.importorskip("transformers", reason="models need transformers")

import random
from typing import Any

import torch
from torch import Tensor

from handlers.duplex.rows import RowBank
from models.common.mimi import MimiTokenizer
from models.common.tokens import RowState, SpeechTokenizer
from models.common.traced import TracedStep
from models.parrot.codec import CodecConfig, TinyCodec
from tests.models.test_tokens_mimi import make as make_mimi

ROWS, TICKS = 5, 40


@pytest.fixture(scope="module", params=["tiny", "mimi"])
def speech(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> object:
    torch.manual_seed(0)
    if request.param == "mimi":
        return MimiTokenizer.from_pretrained(make_mimi(tmp_path_factory.mktemp("mimi")), 4)
    return TinyCodec(CodecConfig(width=16, fast_width=12)).eval().requires_grad_(False)


@pytest.mark.parametrize("way", ["encode", "decode"])
def test_traced_rows_are_the_plain_ones(speech: SpeechTokenizer, way: str) -> None:
    run: Any = speech.encode
    state = speech.encoder_state
    one = torch.zeros(speech.frame_samples)
    if way == "decode":
        run, state = speech.decode, speech.decoder_state
        one = torch.zeros(1, speech.num_codebooks, dtype=torch.long)
    assert speech.traceable
    plain, traced = RowBank(run, state, ROWS, "cpu"), RowBank(run, state, ROWS, "cpu", traced=True)
    for bank in (plain, traced):
        bank.warm_up(one)
    chance, noise = random.Random(1), torch.Generator().manual_seed(1)

    def frame() -> Tensor:
        if way == "decode":
            return torch.randint(0, speech.codebook_size, one.shape, generator=noise)
        return 0.1 * torch.randn(one.shape, generator=noise)

    present: list[int] = []
    for _ in range(TICKS):
        for row in range(ROWS):
            if chance.random() < 0.15:
                for bank in (plain, traced):
                    (bank.close if row in present else bank.open)(row)
                (present.remove if row in present else present.append)(row)
        given = {row: frame() for row in present if chance.random() < 0.8}
        if given:
            wanted, found = plain.step(given), traced.step(given)
            assert wanted.keys() == found.keys() == given.keys()
            for row in given:
                torch.testing.assert_close(found[row], wanted[row], rtol=0, atol=1e-4)


def test_what_changes_between_the_steps_is_seen() -> None:
    state = RowState(2)
    state.kept("sum", (1,), torch.zeros(1))

    def add_up(given: Tensor) -> Tensor:
        total = state.kept("sum", (1,), given) + given
        state.keep("sum", total, None)
        return total

    before = state.tensors["sum"]
    step = TracedStep(add_up, [state.tensors], torch.zeros(2, 1))
    assert state.tensors["sum"] is before
    assert step(torch.ones(2, 1)).tolist() == [[1], [1]]
    state.reset([0])
    assert step(torch.ones(2, 1)).tolist() == [[1], [2]]
    assert state.tensors["sum"].tolist() == [[1], [2]]
