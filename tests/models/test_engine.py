"""Rows of live sessions against each session alone with a growing cache, and against one pass."""

import pytest

pytest.importorskip("torch", reason="models need torch")
pytest.importorskip("transformers", reason="models need transformers")

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from models.common.errors import ConfigError, FrameLengthError, VocabularyError
from models.common.halves import can_halve
from models.common.sampling import Sampling, speak_or_rest
from models.parrot.attention import FrameCache
from models.parrot.backbones import DualMistral, DualQwen2
from models.parrot.engine import (
    DuplicateSession,
    Memory,
    NoFreeRow,
    TorchEngine,
    UnknownSession,
)
from models.parrot.modeling import DualChannelModel
from tests.models import tiny

EVERY = pytest.mark.parametrize(("backbone", "shape"), tiny.EVERY, ids=tiny.EVERY_ID)
LONG = Memory(frames=64, keep=0)


RESTING = Sampling(rest=5, onset=0.7, offset=0.15)
"""The random model then both speaks and rests, some frames each."""


class Alone:
    """One session, the plain way: a growing cache, the likeliest code, a batch of one."""

    def __init__(
        self,
        model: DualChannelModel,
        prefix: Tensor | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008
    ) -> None:
        self._model, self._cache, self._sampling = model, FrameCache(), sampling
        config = model.config
        self._agent = 1 - config.user_channel
        start = torch.full((1, 2, config.num_codebooks), config.start_id)
        frames = start if prefix is None else torch.cat((start, prefix))
        for frame in frames:
            logits = self._read(frame)
        self.due = torch.zeros(1, config.num_codebooks)
        self._choose(logits, frames[-1, self._agent])

    def step(self, user: Tensor) -> Tensor:
        channels = [user, self.next] if self._agent else [self.next, user]
        self._choose(self._read(torch.stack(channels)), self.next)
        return self.next

    def _read(self, frame: Tensor) -> Tensor:
        return self._model.step(frame[None], self._cache)[0, self._agent]  # [D, K]

    def _choose(self, logits: Tensor, last: Tensor) -> None:
        codes = logits[None, :, : self._model.config.codebook_size]
        if self._sampling.rest is None:
            self.next = codes[0].argmax(-1)
            return
        chosen, self.due = speak_or_rest(codes, self._sampling, last[None], self.due)
        self.next = chosen[0]


def engine(model: DualChannelModel, rows: int = 3, memory: Memory = LONG) -> TorchEngine:
    return TorchEngine(model, rows, memory=memory)


def user_frame(model: DualChannelModel, seed: int) -> Tensor:
    frame: Tensor = tiny.codes(model, rows=1, frames=1, seed=seed)[0, 0, 0]
    return frame


@EVERY
@pytest.mark.parametrize("sampling", [Sampling(), RESTING], ids=["likeliest", "resting"])
def test_staggered_sessions_equal_each_alone(
    sampling: Sampling, backbone: type[DualChannelModel], shape: dict[str, Any]
) -> None:
    """They come one by one, pause now and then, one leaves and one comes back."""
    model = tiny.model(backbone, **shape)
    live = TorchEngine(tiny.model(backbone, **shape), 3, memory=LONG, sampling=sampling)
    prefix, quiet = tiny.codes(model, rows=1, frames=3)[0], set[bool]()
    comes, goes = {0: "a", 2: "b", 3: "c", 9: "b"}, {7: "b"}
    alone: dict[str, Alone] = {}
    for t in range(14):
        if t in goes:
            live.close(goes[t])
            del alone[goes[t]]
        if t in comes:
            live.open(comes[t], prefix[:t])
            alone[comes[t]] = Alone(model, prefix[:t], sampling)
        users = {
            name: user_frame(model, 9 * t + i)
            for i, name in enumerate(alone)
            if (t + i) % 5  # the others stand idle
        }
        answers = live.step(users)
        assert answers.keys() == users.keys()
        for name, user in users.items():
            assert torch.equal(answers[name], alone[name].step(user)), (t, name)
            quiet |= set((answers[name] == RESTING.rest).tolist())
    assert sampling is not RESTING or quiet == {True, False}


@EVERY
def test_logits_equal_one_plain_pass(
    backbone: type[DualChannelModel], shape: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    model, live = tiny.model(backbone, **shape), engine(tiny.model(backbone, **shape))
    predict = live._model.predict

    def spied(hidden: Tensor, channel: int) -> Tensor:
        seen.append(predict(hidden))
        return predict(hidden, channel)

    monkeypatch.setattr(live._model, "predict", spied)
    prefix = tiny.codes(model, rows=1, frames=5)[0]
    live.open("a", prefix)
    live.open("b")
    said = []
    for t in range(6):
        users = {"b": user_frame(model, 50 + t), "a": user_frame(model, t)}
        said.append((users["a"], live._state.last[0].clone()))
        live.step(users)
    start = torch.full((1, *prefix.shape[1:]), model.config.start_id)
    frames = torch.cat((start, prefix, torch.stack([torch.stack(pair) for pair in said])))
    whole = tiny.logits(model, frames[None])[0]
    ours = torch.stack([seen[0][0, -1], *(logits[0, -1] for logits in seen[2:])])
    torch.testing.assert_close(ours, whole[-7:], **tiny.EXACT)


@EVERY
def test_weights_of_half_precision_give_the_same_logits(
    backbone: type[DualChannelModel], shape: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_halve(torch.zeros(1, 1)):
        pytest.skip("no FBGEMM on this processor")
    model, ours = tiny.model(backbone, **shape), tiny.model(backbone, **shape)
    for parameter in (*model.parameters(), *ours.parameters()):
        parameter.data = parameter.data.half().float()
    live = engine(ours)
    assert not any(type(layer) is nn.Linear for layer in ours.model.modules())
    predict, seen = ours.predict, []

    def spied(hidden: Tensor, channel: int) -> Tensor:
        seen.append(predict(hidden, channel))
        return seen[-1]

    monkeypatch.setattr(ours, "predict", spied)
    live.open("a")
    said = []
    for t in range(5):
        said.append((user_frame(model, t), live._state.last[0].clone()))
        live.step({"a": said[-1][0]})
    frames = [torch.stack(pair) for pair in said]
    start = torch.full((1, *frames[0].shape), model.config.start_id)
    whole = tiny.logits(model, torch.cat((start, torch.stack(frames)))[None])[0]
    found = torch.stack([logits[0, -1] for logits in seen])
    torch.testing.assert_close(found, whole[:, 1 - model.config.user_channel], **tiny.EXACT)


@pytest.mark.parametrize(
    ("backbone", "windowed"),
    [
        (DualMistral, {"sliding_window": 3}),
        (DualQwen2, {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 1}),
    ],
)
@pytest.mark.parametrize("join", ["pair", "sum"])
def test_a_backbones_own_window_holds(
    backbone: type[DualChannelModel], windowed: dict[str, Any], join: str
) -> None:
    model = tiny.model(backbone, join=join, **windowed)
    live, alone = engine(tiny.model(backbone, join=join, **windowed)), Alone(model)
    live.open("a")
    for t in range(10):
        user = user_frame(model, t)
        assert torch.equal(live.step({"a": user})["a"], alone.step(user))


def test_the_person_may_be_the_second_channel() -> None:
    model, live = tiny.model(user_channel=1), engine(tiny.model(user_channel=1))
    live.open("a")
    alone = Alone(model)
    for t in range(6):
        user = user_frame(model, t)
        assert torch.equal(live.step({"a": user})["a"], alone.step(user))


@settings(max_examples=12, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(("step", "open", "close", "step")), st.integers(0, 4)),
        min_size=10,
        max_size=40,
    )
)
def test_any_coming_and_going_equals_batch_one(events: list[tuple[str, int]]) -> None:
    model, live = tiny.model(join="sum"), engine(tiny.model(join="sum"), rows=4)
    alone: dict[int, Alone] = {}
    for t, (event, which) in enumerate(events):
        if event == "open" and which not in alone and len(alone) < 4:
            prefix = tiny.codes(model, rows=1, frames=which, seed=t)[0]
            live.open(which, prefix)
            alone[which] = Alone(model, prefix)
        elif event == "close" and which in alone:
            live.close(which)
            del alone[which]
        else:
            users = {s: user_frame(model, 7 * t + s) for s in alone if s != which}
            answers = live.step(users)
            for session, user in users.items():
                assert torch.equal(answers[session], alone[session].step(user))


def test_a_session_read_anew_equals_one_opened_with_its_end() -> None:
    """Over many renewals: what a row holds is, at all times, a start and the newest frames."""
    memory = Memory(frames=40, keep=8)
    model, live = tiny.model(), engine(tiny.model(), rows=2, memory=memory)
    live.open("a")
    live.open("b")
    start = torch.full((1, 2, 1), model.config.start_id)
    past: dict[str, list[Tensor]] = {"a": [], "b": []}
    held, renewals = [1, 1], 0
    for t in range(150):
        users = {name: user_frame(model, 3 * t + i) for i, name in enumerate(past)}
        before = live._state.last.clone()
        answers = live.step(users)
        for row, (name, frames) in enumerate(past.items()):
            frames.append(torch.stack((users[name], before[row])))
            if t % 7 == 0 or held[row] < 11:
                whole = torch.cat((start, torch.stack(frames[-held[row] :])))
                wanted = tiny.logits(model, whole[None])[0, -1, 1, :, : tiny.CODES].argmax(-1)
                assert torch.equal(answers[name], wanted), (t, name)
            now = int(live._ring.stamps[row].amax()) + 1  # frames held, the start among them
            assert now <= memory.frames
            renewals += now <= held[row]
            held[row] = now
    assert renewals >= 6


def test_a_window_goes_on_for_ever() -> None:
    """One layer: what is seen is the sinks and the newest frames and nothing through others."""
    memory = Memory(frames=12, keep=0, sinks=2)
    model = tiny.model(num_hidden_layers=1)
    live = engine(tiny.model(num_hidden_layers=1), memory=memory)
    live.open("a")
    frames = [torch.full((2, 1), model.config.start_id)]
    for t in range(40):
        user = user_frame(model, t)
        frames.append(torch.stack((user, live._state.last[0].clone())))
        answer = live.step({"a": user})["a"]
    kept = torch.cat((torch.arange(2), torch.arange(31, 41)))
    seen = torch.stack(frames)[kept][None]
    within = model.frame_block()
    mask = torch.ones(1, 1, 24, 24, dtype=torch.bool)
    mask[..., 22:, 22:] = within
    with torch.no_grad():
        hidden = model.encode(seen, kept[None], mask)[:, -2:]
        wanted = model.predict(hidden)[0, 0, 1, :, : tiny.CODES].argmax(-1)
    assert torch.equal(answer, wanted)


def test_sampling_depends_on_the_seed_and_not_on_the_company() -> None:
    def talk(names: list[str], seed: int) -> list[int]:
        live = TorchEngine(tiny.model(), 3, memory=LONG, sampling=Sampling(1.0, top_k=8))
        for name in names:
            live.open(name, seed=seed if name == "a" else 99)
        model = tiny.model()
        users = [user_frame(model, t) for t in range(12)]
        return [int(live.step(dict.fromkeys(names, user))["a"]) for user in users]

    assert talk(["a"], 1) == talk(["x", "a", "y"], 1)
    assert talk(["a"], 1) != talk(["a"], 2)


def test_a_long_prefix_is_cut_to_its_end() -> None:
    memory = Memory(frames=40, keep=8)
    model, live = tiny.model(), engine(tiny.model(), rows=2, memory=memory)
    prefix = tiny.codes(model, rows=1, frames=100)[0]
    live.open("a", prefix)
    assert torch.equal(live._state.last[0], Alone(model, prefix[-8:]).next)


@EVERY
def test_traced_steps_are_the_plain_ones(
    backbone: type[DualChannelModel], shape: dict[str, Any]
) -> None:
    """As sessions come, stand idle, go, and outlive the memory; two extents of it, too."""
    memory, model = Memory(frames=20, sinks=2), tiny.model(backbone, **shape)
    sampling = Sampling(temperature=1.0, top_k=5)
    plain = TorchEngine(tiny.model(backbone, **shape), 3, memory=memory, sampling=sampling)
    traced = TorchEngine(model, 3, memory=memory, sampling=sampling, traced=True)
    assert traced._steps is not None
    prefix, open_names = tiny.codes(model, rows=1, frames=4)[0], []
    for t in range(40):
        for name, begins, ends in (("a", 0, 14), ("b", 3, 99), ("c", 5, 30), ("a", 18, 99)):
            if t == begins:
                open_names.append(name)
                for each in (plain, traced):
                    each.open(name, prefix if name == "b" else None, seed=t)
            elif t == ends:
                open_names.remove(name)
                for each in (plain, traced):
                    each.close(name)
        users = {n: user_frame(model, t + i) for i, n in enumerate(open_names) if (t + i) % 4}
        wanted, found = plain.step(users), traced.step(users)
        assert all(torch.equal(found[name], wanted[name]) for name in users), t
    for name, tensor in vars(plain._state).items():
        if name not in ("user", "active"):
            live = traced._state.__dict__[name][: len(open_names)]
            torch.testing.assert_close(live, tensor[: len(open_names)], **tiny.EXACT)


def test_traced_steps_read_no_more_than_they_need() -> None:
    model = tiny.model()
    live = TorchEngine(model, 1, memory=Memory(frames=600), traced=True)
    assert live._steps is not None
    assert sorted(slots for _, slots in live._steps) == [256, 512, 608]
    alone = Alone(tiny.model())
    live.open("a")
    for t in range(270):  # past the first of them
        user = user_frame(model, t)
        assert torch.equal(live.step({"a": user})["a"], alone.step(user)), t


def test_a_step_has_no_graph_break() -> None:
    """What can be compiled whole looks at no tensor, so that it can be captured."""
    live, plain = (engine(tiny.model(num_hidden_layers=1)) for _ in range(2))
    for name in ("a", "b"):
        live.open(name)
        plain.open(name)
    users = {name: user_frame(live._model, i) for i, name in enumerate(("a", "b"))}
    live._advance = torch.compile(live._advance, fullgraph=True, backend="eager")  # type: ignore
    for _ in range(2):
        answers, wanted = live.step(users), plain.step(users)
        assert all(torch.equal(answers[name], wanted[name]) for name in users)


def test_misuse_is_named() -> None:
    live = engine(tiny.model(), rows=1)
    live.open("a")
    with pytest.raises(DuplicateSession, match="'a'"):
        live.open("a")
    with pytest.raises(NoFreeRow, match="all 1 rows"):
        live.open("b")
    with pytest.raises(UnknownSession, match="'b'"):
        live.step({"a": torch.zeros(1), "b": torch.zeros(1)})
    with pytest.raises(UnknownSession, match="'b'"):
        live.close("b")
    with pytest.raises(VocabularyError, match="0 to 12"):
        live.step({"a": torch.tensor([13])})
    with pytest.raises(FrameLengthError, match=r"\[1\]"):
        live.step({"a": torch.tensor([1, 2])})
    alone = Alone(tiny.model())
    for t in range(3):  # none of it has moved the session
        user = user_frame(live._model, t)
        assert torch.equal(live.step({"a": user})["a"], alone.step(user))
    live.close("a")
    with pytest.raises(FrameLengthError):
        live.open("b", torch.zeros(3, 2, 2))
    with pytest.raises(VocabularyError):
        live.open("b", torch.full((3, 2, 1), -1))
    live.open("b")
    assert live.step({}) == {}


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="rows=0"):
        engine(tiny.model(), rows=0)
    with pytest.raises(ConfigError, match="delays"):
        engine(tiny.model(num_codebooks=3, delays=[0, 1, 1]))
    with pytest.raises(ConfigError, match="too few to keep"):
        engine(tiny.model(), rows=8, memory=Memory(frames=64, keep=60))
    with pytest.raises(ConfigError):
        Memory(frames=4, keep=0, sinks=4)
