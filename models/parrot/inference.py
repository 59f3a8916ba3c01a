"""A recording of the person in, the conversation out: left the person, right our answer.

    python -m models.parrot.inference --model DIR --input_audio FILE --output_audio FILE.wav

As it would have been live: the person's codes come as late as a streaming encoder gives them, each
frame is answered by the next one, and the decoder is as late as it is.

C = 2 channels, T frames, D codebooks, N samples.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from models.common.errors import ModelError
from models.common.sampling import Sampling
from models.common.tokens import SpeechTokenizer, hushed, rest_code, silent_frame
from models.parrot.backbones import load
from models.parrot.codec import CONFIG
from models.parrot.data import check_vocabulary
from models.parrot.domain import OFFSET, ONSET
from models.parrot.engine import DuplexLM, Memory, TorchEngine
from models.parrot.modeling import DualChannelModel
from models.parrot.shards import Vocabulary
from models.parrot.tokenizers import load_tokenizer

CHUNK_FRAMES = 500


def answer(engine: DuplexLM, user: Iterable[Tensor], seed: int = 0) -> Tensor:
    """The person's frames, [D] each -> ours, [T, D]: the t-th follows on the person's t-th."""
    engine.open("file", seed=seed)
    try:
        return torch.stack([engine.step({"file": frame})["file"] for frame in user])
    finally:
        engine.close("file")


def converse(engine: DuplexLM, tokenizer: SpeechTokenizer, person: Tensor, seed: int = 0) -> Tensor:
    """The person [N] at the tokenizer's rate -> both [C, N'], N' the whole frames that N fills."""
    step = tokenizer.frame_samples
    person = torch.nn.functional.pad(person, (0, -len(person) % step))
    heard, spoken = tokenizer.encoder_state(1), tokenizer.decoder_state(1)
    chunks = person[None].split(CHUNK_FRAMES * step, dim=1)
    user = torch.cat([tokenizer.encode(chunk, heard)[0] for chunk in chunks])  # [T, D]
    codes = answer(engine, tqdm(user, unit="frame", disable=None), seed)  # [T, D]
    parts = [tokenizer.decode(part[None], spoken)[0] for part in codes.split(CHUNK_FRAMES)]
    rest, late = silent_frame(tokenizer), tokenizer.decode_latency_frames
    sounding = torch.cat((rest.expand(late, -1), codes))[: len(codes)]
    sound = hushed(torch.cat(parts), sounding, rest, tokenizer)
    agent = torch.cat((torch.zeros(step), sound))[: len(person)]  # heard in the next frame
    return torch.stack((person, agent))


def open_model(model_folder: str, tokenizer: str) -> tuple[DualChannelModel, SpeechTokenizer]:
    """A checkpoint and its tokenizer; an empty name stands for the one in the checkpoint's folder,
    or else the shipped one. Raises `ArchitectureError`, `VocabularyError`."""
    model = load(model_folder)
    own = (Path(model_folder) / CONFIG).exists()
    codec = load_tokenizer(tokenizer or (model_folder if own else "tiny"))
    check_vocabulary(model.config, Vocabulary.of(codec, channels=2))
    return model, codec


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `inference` and `evaluate` both take."""
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--tokenizer", default="", help="a name, or a codec's folder")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest code")
    parser.add_argument(
        "--onset", type=float, default=ONSET, help="at temperature 0: P(speech) to begin, summed up"
    )
    parser.add_argument(
        "--offset", type=float, default=OFFSET, help="at temperature 0: P(silence) to stop"
    )
    parser.add_argument("--top_k", type=int, default=0)
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory_frames", type=int, help="how far back it looks; as trained")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: as torch chooses")


def make_engine(
    model: DualChannelModel, tokenizer: SpeechTokenizer, rows: int, given: argparse.Namespace
) -> TorchEngine:
    """From what `add_options` added. Raises `ConfigError`."""
    if given.threads:
        torch.set_num_threads(given.threads)
    memory = None
    if given.memory_frames:
        memory = Memory(given.memory_frames)
    rest = rest_code(tokenizer)
    sampling = Sampling(
        given.temperature, given.top_k, given.top_p, rest, given.onset, given.offset
    )
    return TorchEngine(model, rows, memory=memory, sampling=sampling)


def main() -> None:
    import soundfile

    from models.parrot.recordings import Limits, Recording, read

    parser = argparse.ArgumentParser(prog="python -m models.parrot.inference")
    add_options(parser)
    parser.add_argument("--input_audio", type=Path, required=True, help="the person, one channel")
    parser.add_argument("--output_audio", type=Path, required=True, metavar="FILE.wav")
    given = parser.parse_args()
    path: Path = given.input_audio
    limits = Limits(allow_silent=True, max_clipped_share=1.0)
    try:
        model, codec = open_model(given.model, given.tokenizer)
        engine = make_engine(model, codec, 1, given)
        samples, _ = read(Recording(path.name, (path,)), 1, codec.sample_rate_hz, limits)
        both = converse(engine, codec, torch.from_numpy(samples[0]), given.seed)
    except ModelError as error:
        sys.exit(f"inference: {error}")
    soundfile.write(given.output_audio, both.clamp(-1, 1).T.numpy(), codec.sample_rate_hz)


if __name__ == "__main__":
    main()
