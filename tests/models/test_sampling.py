"""Draws follow the distribution, the limits hold, and a row hears the same in any company."""

import pytest

pytest.importorskip("torch", reason="models need torch")

import torch
from torch import Tensor

from models.common.errors import ConfigError
from models.common.sampling import Sampling, due, gumbel, sample, speak_or_rest

ROWS = 20_000
LOGITS = torch.tensor([2.0, 0.0, 1.0, -1.0, 0.5])


def frequencies(sampling: Sampling, rows: int = ROWS, last: int = 0) -> Tensor:
    """How often each id comes after `last`, over as many seeds. [K]"""
    drawn = sample(
        LOGITS.expand(rows, 1, -1),
        sampling,
        torch.arange(rows),
        torch.zeros(rows).long(),
        torch.full((rows, 1), last),
    )
    return torch.bincount(drawn[:, 0], minlength=LOGITS.numel()) / rows


def close(found: Tensor, wanted: Tensor) -> None:
    """Within four standard errors."""
    error = (wanted * (1 - wanted) / ROWS).sqrt()
    assert ((found - wanted).abs() <= 4 * error).all(), (found, wanted)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    close(frequencies(Sampling(temperature)), (LOGITS / temperature).softmax(-1))


def test_the_draws_of_one_session_follow_it_too() -> None:
    draws = torch.arange(ROWS)
    drawn = sample(LOGITS.expand(ROWS, 1, -1), Sampling(1.0), torch.full((ROWS,), 7), draws)
    close(torch.bincount(drawn[:, 0], minlength=5) / ROWS, LOGITS.softmax(-1))


def test_top_k_takes_the_likeliest() -> None:
    best = torch.tensor([True, False, True, False, False])
    close(frequencies(Sampling(1.0, top_k=2)), LOGITS.masked_fill(~best, -torch.inf).softmax(-1))
    close(frequencies(Sampling(1.0, top_k=99)), LOGITS.softmax(-1))


def test_top_p_takes_as_few_as_reach_it() -> None:
    first, second = LOGITS.softmax(-1)[[0, 2]].tolist()
    assert frequencies(Sampling(1.0, top_p=first - 0.01))[0] == 1
    two = frequencies(Sampling(1.0, top_p=first + 0.01))
    assert (two > 0).tolist() == [True, False, True, False, False]
    assert frequencies(Sampling(1.0, top_p=first + second + 0.01)).count_nonzero() == 3


def test_no_temperature_takes_the_likeliest() -> None:
    assert frequencies(Sampling(), rows=10)[0] == 1


def test_a_row_draws_the_same_in_any_company() -> None:
    logits = torch.randn(6, 3, 50)
    seeds, draws = torch.tensor([5, 9, 2**40 + 5, 0, -1, 5]), torch.tensor([0, 3, 0, 1, 2, 1])
    together = sample(logits, Sampling(1.0, 20, 0.9), seeds, draws)
    for row in range(6):
        one = slice(row, row + 1)
        alone = sample(logits[one], Sampling(1.0, 20, 0.9), seeds[one], draws[one])
        assert torch.equal(alone, together[one])


def test_seeds_draws_and_places_have_noise_of_their_own() -> None:
    seeds, draws = torch.meshgrid(torch.arange(30), torch.arange(30), indexing="ij")
    noise = gumbel(seeds.flatten(), draws.flatten(), torch.Size([2, 40]))
    assert noise.isfinite().all()
    assert noise.unique().numel() > 0.99 * noise.numel()
    correlation = torch.corrcoef(noise.flatten(1)[:80])
    assert (correlation - torch.eye(80)).abs().max() < 0.6  # 80 places: 5.4 standard errors


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"onset": 0.0},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Sampling(**wrong)  # type: ignore[arg-type]


def test_speech_begins_where_all_its_codes_together_are_likely() -> None:
    shares = LOGITS.softmax(-1)  # of the first one 0.53
    silent = Sampling(rest=0, onset=0.6)
    assert frequencies(silent, rows=10)[0] == 1
    spoken = Sampling(rest=0, onset=float(1 - shares[0]) - 0.01)
    assert frequencies(spoken, rows=10)[2] == 1
    assert frequencies(Sampling(rest=3, onset=0.9), rows=10, last=3)[0] == 1


def test_speech_ends_where_silence_is_likelier_than_all_sounds() -> None:
    assert float(LOGITS.softmax(-1)[0]) > 0.5
    assert frequencies(Sampling(rest=0, onset=0.1), rows=10, last=2)[0] == 1
    assert frequencies(Sampling(rest=2, onset=0.9), rows=10, last=0)[0] == 1
    assert frequencies(Sampling(rest=2, onset=0.9), rows=10, last=2)[2] == 1


def test_a_sound_ends_as_soon_as_silence_is_as_likely_as_said() -> None:
    silence = float(LOGITS.softmax(-1)[2])
    for offset, goes_on in ((silence + 0.01, True), (silence - 0.01, False)):
        found = frequencies(Sampling(rest=2, onset=0.9, offset=offset), rows=10, last=0)
        assert bool(found[2] == 0) is goes_on
    with pytest.raises(ConfigError, match="offset=1"):
        Sampling(offset=1.0)


def test_who_has_just_stopped_does_not_begin_again_for_what_was_given_up() -> None:
    silence = float(LOGITS.softmax(-1)[2])
    sampling = Sampling(rest=2, onset=1.0, offset=silence - 0.01)
    last = torch.zeros(1, 1, dtype=torch.long)  # a sound
    chosen, behind = speak_or_rest(LOGITS[None, None], sampling, last, torch.zeros(1, 1))
    assert (int(chosen), float(behind)) == (2, 0.0)
    chosen, behind = speak_or_rest(LOGITS[None, None], sampling, chosen, behind)
    assert int(chosen) == 2
    assert float(behind) == pytest.approx(1 - silence)
    chosen, behind = speak_or_rest(LOGITS[None, None], sampling, chosen, behind)
    assert int(chosen) != 2  # by now it is due


def test_who_could_begin_at_any_of_some_moments_begins_once_it_has_come_together() -> None:
    likely = float(1 - LOGITS.softmax(-1)[0])
    rest = Sampling(rest=0, onset=2.2 * likely)
    none = torch.zeros(1, dtype=torch.long)
    logits, last, before = LOGITS[None, None], none[None], torch.zeros(1, 1)
    drawn = []
    for _ in range(3):
        drawn.append(int(sample(logits, rest, none, none, last, before)))
        before = due(logits.softmax(-1)[..., 0], before)
    assert drawn == [0, 0, 2]
    assert (
        int(sample(logits, rest, none, none, last + 1, before)) == 0
    )  # after a sound, it isn't due
