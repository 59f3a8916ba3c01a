"""Speech as tokens: the interface of every tokenizer, and streaming state with a row per session.

Letters: R rows (sessions or recordings), F frames, D codebooks, N samples or steps of a layer.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from models.common.errors import FrameLengthError, VocabularyError


class RowState:
    """What a streaming pass keeps between calls. Everything begins as zeros.

    A tensor is made when its owner first asks for it, and stays where it is: its first dimension
    is the row, rows are recycled by themselves, and a row that is not active keeps its content.
    """

    def __init__(self, rows: int) -> None:
        self.capacity = rows
        self.rows = rows
        """A call is about so many rows, the first ones; the others are left alone."""
        self._kept: dict[Hashable, Tensor] = {}

    @property
    def tensors(self) -> dict[Hashable, Tensor]:
        """All that was made so far, [capacity, ...] each, by whose they are."""
        return self._kept

    @torch.inference_mode()
    def swap(self, first: int, second: int) -> None:
        """The two rows change places."""
        for tensor in self._kept.values():
            tensor[[first, second]] = tensor[[second, first]]

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        """Copies a row over another one."""
        for tensor in self._kept.values():
            tensor[target] = tensor[source]

    @torch.inference_mode()  # so that it also may where the tensors were made in that mode
    def reset(self, rows: Tensor | Sequence[int]) -> None:
        """Back to the beginning of a signal, these rows alone (numbers, or a mask [R])."""
        index = torch.as_tensor(rows)
        if index.dtype != torch.bool:
            index = index.long()
        for tensor in self._kept.values():
            tensor[index.to(tensor.device)] = 0

    def kept(self, owner: Hashable, shape: Sequence[int], like: Tensor) -> Tensor:
        """The owner's tensor [R, *shape], of the type and on the device of `like`."""
        if owner not in self._kept:
            self._kept[owner] = like.new_zeros((self.capacity, *shape))
        return self._kept[owner][: self.rows]

    def keep(self, owner: Hashable, value: Tensor, active: Tensor | None) -> None:
        """New content for the active rows (None: all). `value` is [R, ...] as it was kept."""
        tensor = self._kept[owner][: self.rows]
        if active is None:
            tensor.copy_(value)
        else:
            rows = active.to(tensor.device).view(-1, *[1] * (tensor.dim() - 1))
            tensor.copy_(torch.where(rows, value, tensor))

    def extend(self, owner: Hashable, x: Tensor, past: int, active: Tensor | None) -> Tensor:
        """`x` after the `past` steps that came before it. [R, C, N] -> [R, C, past + N]"""
        if past == 0:
            return x
        before = self.kept(owner, (*x.shape[1:-1], past), x)
        joined = torch.cat((before, x), dim=-1)
        self.keep(owner, joined[..., joined.shape[-1] - past :], active)
        return joined

    def count(self, owner: Hashable, steps: int, active: Tensor | None, like: Tensor) -> Tensor:
        """How many steps the rows had before this call, which brings so many more. [R] int64"""
        number = torch.empty(0, dtype=torch.long, device=like.device)
        had = self.kept(owner, (), number).clone()
        self.keep(owner, had + steps, active)
        return had


class SpeechTokenizer(Protocol):
    """Sound to codes and back, whole or as it comes.

    Without a state a call takes a whole signal and gives frame f of the output for frame f of the
    input. With a state it goes on where the rows were, and what it gives is `encode_latency_frames`
    (`decode_latency_frames`) late: frame f of the output stands for frame f - latency of the input,
    and before the first one come frames that mean nothing. Otherwise both are equal, up to what the
    whole pass cannot know behind the end of its signal.

    Rows that are not active keep their state; what is given for them means nothing.
    """

    name: str
    sample_rate_hz: int
    frame_samples: int
    num_codebooks: int
    codebook_size: int
    encode_latency_frames: int
    decode_latency_frames: int
    traceable: bool
    """With a state, no decision of a call depends on what is in a tensor."""

    @property
    def frame_rate_hz(self) -> float: ...

    def encoder_state(self, rows: int) -> RowState: ...

    def decoder_state(self, rows: int) -> RowState: ...

    def encode(
        self, samples: Tensor, state: RowState | None = None, active: Tensor | None = None
    ) -> Tensor:
        """Samples [R, F * frame_samples] float32 -> codes [R, F, D] int64. `active` is [R] bool.

        Raises FrameLengthError.
        """
        ...

    def decode(
        self, codes: Tensor, state: RowState | None = None, active: Tensor | None = None
    ) -> Tensor:
        """Codes [R, F, D] int64 -> samples [R, F * frame_samples] float32.

        Raises FrameLengthError, VocabularyError.
        """
        ...


class TokenizerBase:
    """What every tokenizer has in common: the frame rate, fresh states, the check of the input."""

    sample_rate_hz: int
    frame_samples: int
    num_codebooks: int
    codebook_size: int
    traceable = False

    @property
    def frame_rate_hz(self) -> float:
        return self.sample_rate_hz / self.frame_samples

    def encoder_state(self, rows: int) -> RowState:
        return RowState(rows)

    def decoder_state(self, rows: int) -> RowState:
        return RowState(rows)

    def check_samples(self, samples: Tensor, state: RowState | None) -> None:
        """Raises FrameLengthError unless these are [R, F * frame_samples], R as in the state."""
        if samples.dim() != 2 or samples.shape[1] % self.frame_samples or not samples.shape[1]:
            raise FrameLengthError(
                f"samples {list(samples.shape)} are not whole frames of {self.frame_samples}"
            )
        _check_rows(len(samples), state)

    def check_codes(self, codes: Tensor, state: RowState | None) -> None:
        """Raises FrameLengthError or VocabularyError unless these are codes [R, F, D]."""
        if codes.dim() != 3 or codes.shape[2] != self.num_codebooks or not codes.shape[1]:
            raise FrameLengthError(
                f"codes {list(codes.shape)} are not frames of {self.num_codebooks} codebooks"
            )
        _check_rows(len(codes), state)
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.codebook_size:
            raise VocabularyError(f"codes outside of 0 … {self.codebook_size - 1}")


SETTLED_FRAMES = 25
"""Of silence, after which a tokenizer has forgotten what was before."""


HOLD_S, FADE_S = 0.02, 0.01
"""So long the sound of the frame in which it ends stays, and so long it fades. Of one ending in
fifty the code of silence comes right behind a loud frame: held for 10 ms, "four" was "garden"."""


def silent_frame(speech: SpeechTokenizer, device: str = "cpu") -> Tensor:
    """Its codes, where silence has lasted for a while. [D], on the CPU"""
    silence = torch.zeros(1, SETTLED_FRAMES * speech.frame_samples, device=device)
    return speech.encode(silence)[0, -1].cpu()


def rest_code(speech: SpeechTokenizer, device: str = "cpu") -> int | None:
    """The code of silence, where one code is a whole frame."""
    return int(silent_frame(speech, device)) if speech.num_codebooks == 1 else None


def hush(frame_samples: int, rate_hz: int) -> Tensor:
    """What the decoded frames are multiplied with, by their `silent_before`. [3, frame_samples]

    Codes of speech end in such as sound silent already. Where a model breaks off in a word there
    are none, and the decoder goes on for about a frame.
    """
    gains = torch.zeros(3, frame_samples)
    gains[0] = 1.0
    hold, fade = round(HOLD_S * rate_hz), round(FADE_S * rate_hz)
    gains[1] = ((hold + fade - torch.arange(frame_samples)) / fade).clamp(0.0, 1.0)
    return gains


def silent_before(silent_frames: int, latency_frames: int) -> int:
    """Of the frame that sounds now, after so many codes of silence one behind the other: 0 where it
    is heard, 1 where it fades, 2 where nothing is left. With a latency the code behind that frame
    is known, and the last one before silence fades; without, the first one of it."""
    return min(max(silent_frames - max(latency_frames - 1, 0), 0), 2)


def hushed(sound: Tensor, codes: Tensor, rest: Tensor, speech: SpeechTokenizer) -> Tensor:
    """What was decoded of a whole signal, [F * frame_samples], times the `hush` of its codes
    [F, D], `rest` [D] being those of silence; as it is live."""
    late, silent_frames, at = speech.decode_latency_frames, 0, []
    silent = (codes == rest).all(-1).tolist()
    for number, one in enumerate([*silent, *silent[-1:] * late]):
        silent_frames = silent_frames + 1 if one else 0
        if number >= late:
            at.append(silent_before(silent_frames, late))
    gains = hush(speech.frame_samples, speech.sample_rate_hz)
    return sound * gains[at].flatten()


def _check_rows(rows: int, state: RowState | None) -> None:
    if state is not None and rows != state.rows:
        raise FrameLengthError(f"{rows} rows given to a state of {state.rows}")
