// Runs on the audio thread: microphone in, Parley's voice out, both against one clock.
//
// In:  {kind: "push", itemId, start, pcm}, {kind: "end", itemId}, {kind: "flush"}
//      {kind: "attend", on}                 whether what the microphone hears is for Parley
// Out: {kind: "microphone", pcm, level}     every 20 ms, pcm16 at 24 kHz
//      {kind: "voice", level, playing, underruns}  every 20 ms while playing, and once after
//      {kind: "played", progress}           every 100 ms while playing, and when it stops
//      {kind: "flushed", cut, progress}     the answer to "flush"
//      {kind: "audible", itemId, answered_s}  the item's first audible sample; seconds since
//                                           the last voiced sample for Parley, null if none

import { PlaybackBuffer } from "./playback_buffer.js";
import { Resampler, joined } from "./resampler.js";
import { VoiceDetector } from "./voice_detector.js";

const WIRE_HZ = 24000;
const FRAME = WIRE_HZ / 50;
const FRAMES_PER_REPORT = 5;
const PULL = 120; // samples taken from the buffer at a time: 5 ms
const NONE = new Float32Array(0);

class Conversation extends AudioWorkletProcessor {
  #toWire = new Resampler(sampleRate, WIRE_HZ);
  #fromWire = new Resampler(WIRE_HZ, sampleRate);
  #buffer = new PlaybackBuffer();
  #detector = new VoiceDetector();
  #attending = true;
  #lastVoiced = null; // in frames of the context's clock
  #frame = new Int16Array(FRAME);
  #frameCount = 0;
  #frameEnergy = 0;
  #ready = NONE; // resampled audio on its way out
  #voiceCount = 0;
  #voiceEnergy = 0;
  #unreportedFrames = 0;

  constructor() {
    super();
    this.port.onmessage = ({ data }) => this.#receive(data);
  }

  process([microphone], [[speaker]]) {
    if (microphone.length) this.#listen(microphone[0]);
    this.#speak(speaker);
    return true;
  }

  #receive(message) {
    switch (message.kind) {
      case "push":
        this.#buffer.push(message.itemId, message.start, fromPcm16(message.pcm));
        break;
      case "end":
        this.#buffer.end(message.itemId);
        break;
      case "attend":
        this.#attending = message.on;
        break;
      case "flush": {
        const cut = this.#buffer.flush();
        const progress = this.#buffer.takeProgress();
        this.port.postMessage({ kind: "flushed", cut, progress });
        this.#told();
      }
    }
  }

  #listen(samples) {
    const heard = this.#toWire.push(samples);
    const since = this.#detector.push(heard);
    if (since !== null && this.#attending) {
      const end = currentFrame + samples.length;
      this.#lastVoiced = end - (since * sampleRate) / WIRE_HZ;
    }
    for (const sample of heard) {
      this.#frameEnergy += sample * sample;
      const scaled = Math.round(sample * 32768);
      this.#frame[this.#frameCount++] = Math.max(-32768, Math.min(32767, scaled));
      if (this.#frameCount === FRAME) this.#sendFrame();
    }
  }

  #sendFrame() {
    const level = Math.sqrt(this.#frameEnergy / FRAME);
    const pcm = this.#frame.buffer;
    this.port.postMessage({ kind: "microphone", pcm, level }, [pcm]);
    this.#frame = new Int16Array(FRAME);
    this.#frameCount = this.#frameEnergy = 0;
  }

  #speak(out) {
    const wasPlaying = this.#buffer.playing;
    const pieces = [this.#ready];
    let length = this.#ready.length;
    while (length < out.length) {
      const piece = this.#pull(length);
      pieces.push(piece);
      length += piece.length;
    }
    const ready = pieces.reduce(joined);
    out.set(ready.subarray(0, out.length));
    this.#ready = ready.slice(out.length);
    if (wasPlaying && !this.#buffer.playing) this.#report();
  }

  /** The next few milliseconds at the context's rate; `ahead` samples go out before them. */
  #pull(ahead) {
    const samples = new Float32Array(PULL);
    this.#buffer.pull(samples);
    const audible = this.#buffer.audible;
    if (audible) {
      const at = currentFrame + ahead + (audible.offset * sampleRate) / WIRE_HZ;
      const voiced = this.#lastVoiced;
      const answered_s = voiced === null ? null : (at - voiced) / sampleRate;
      this.port.postMessage({ kind: "audible", itemId: audible.itemId, answered_s });
    }
    if (this.#buffer.playing) this.#measure(samples);
    return this.#fromWire.push(samples);
  }

  #measure(samples) {
    for (const sample of samples) this.#voiceEnergy += sample * sample;
    this.#voiceCount += samples.length;
    if (this.#voiceCount >= FRAME) {
      this.#tell();
      if (++this.#unreportedFrames >= FRAMES_PER_REPORT) this.#report();
    }
  }

  #tell() {
    const level = Math.sqrt(this.#voiceEnergy / Math.max(1, this.#voiceCount));
    const { playing, underruns } = this.#buffer;
    this.port.postMessage({ kind: "voice", level: playing ? level : 0, playing, underruns });
    this.#voiceCount = this.#voiceEnergy = 0;
  }

  #report() {
    const progress = this.#buffer.takeProgress();
    if (progress.length) this.port.postMessage({ kind: "played", progress });
    this.#told();
  }

  /** Progress was just sent: the next 100 ms begin, and silence is told at once. */
  #told() {
    this.#unreportedFrames = 0;
    if (!this.#buffer.playing) this.#tell();
  }
}

function fromPcm16(pcm) {
  return Float32Array.from(pcm, (sample) => sample / 32768);
}

registerProcessor("conversation", Conversation);
