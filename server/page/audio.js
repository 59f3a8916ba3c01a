// Microphone and speaker: one AudioContext, one worklet for both directions.

const WIRE_HZ = 24000;
const MICROPHONE = {
  audio: { channelCount: 1, echoCancellation: true, noiseSuppression: true, autoGainControl: true },
};

/** No microphone. `reason`: insecure, denied, absent, busy, failed, or stopped (not wanted now). */
export class MicrophoneError extends Error {
  constructor(reason) {
    super(reason);
    this.reason = reason;
  }
}

export class AudioEngine {
  underruns = 0;
  playing = false;
  #context = null;
  #node = null;
  #stream = null;
  #source = null;
  #on; // microphone(pcm, level), voice(level), played(progress), audible(itemId, answered_s), lost()
  #flushes = [];
  #attending = true;

  constructor(handlers) {
    this.#on = handlers;
  }

  /** Whether there is audio at all: without a secure page there is none, in either direction. */
  static get available() {
    return typeof AudioContext === "function" && "audioWorklet" in AudioContext.prototype;
  }

  /** Begin to play. Call it from a click: browsers want one. */
  async start(options = { sampleRate: WIRE_HZ }) {
    const context = new AudioContext({ ...options, latencyHint: "interactive" });
    this.#context = context;
    context.resume();
    try {
      await context.audioWorklet.addModule(new URL("audio_worklet.js", import.meta.url));
    } catch (error) {
      if (context === this.#context) throw error;
    }
    if (context !== this.#context) return; // stopped meanwhile
    this.#node = new AudioWorkletNode(context, "conversation", {
      outputChannelCount: [1],
      channelCount: 1,
      channelCountMode: "explicit",
    });
    this.#node.port.onmessage = ({ data }) => this.#receive(data);
    this.#node.connect(context.destination);
    this.attend(this.#attending);
  }

  /** Ask for the microphone. Raises MicrophoneError. */
  async openMicrophone() {
    if (!navigator.mediaDevices?.getUserMedia) throw new MicrophoneError("insecure");
    const context = this.#context;
    let stream;
    try {
      stream = await navigator.mediaDevices.getUserMedia(MICROPHONE);
    } catch (error) {
      throw new MicrophoneError(reasonOf(error));
    }
    if (context !== this.#context) {
      for (const track of stream.getTracks()) track.stop();
      throw new MicrophoneError("stopped");
    }
    this.#stream = stream;
    await this.#connectMicrophone();
    stream.getAudioTracks()[0].onended = () => {
      this.closeMicrophone();
      this.#on.lost();
    };
  }

  closeMicrophone() {
    this.#source?.disconnect();
    for (const track of this.#stream?.getTracks() ?? []) {
      track.onended = null;
      track.stop();
    }
    this.#stream = this.#source = null;
  }

  /** A muted microphone goes on sending, silence. */
  mute(muted) {
    for (const track of this.#stream?.getAudioTracks() ?? []) track.enabled = !muted;
  }

  /** Whether what the microphone hears is meant for Parley: response times count from that. */
  attend(on) {
    this.#attending = on;
    this.#node?.port.postMessage({ kind: "attend", on });
  }

  async stop() {
    this.closeMicrophone();
    const context = this.#context;
    this.#node?.disconnect();
    this.#node = this.#context = null;
    this.playing = false;
    for (const resolve of this.#flushes.splice(0)) resolve({ cut: null, progress: [] });
    await context?.close();
  }

  /** Audio of an item from its sample `start` on; `pcm` is an Int16Array, which is given away. */
  push(itemId, start, pcm) {
    this.#node?.port.postMessage({ kind: "push", itemId, start, pcm }, [pcm.buffer]);
  }

  end(itemId) {
    this.#node?.port.postMessage({ kind: "end", itemId });
  }

  /** Fall silent now. Resolves to what was cut and the last progress of everything played. */
  flush() {
    if (!this.#node) return Promise.resolve({ cut: null, progress: [] });
    this.#node.port.postMessage({ kind: "flush" });
    return new Promise((resolve) => this.#flushes.push(resolve));
  }

  /** From the air into the worklet and out of it again, as far as the browser knows it. */
  get deviceLatency_s() {
    const input = this.#stream?.getAudioTracks()[0]?.getSettings().latency ?? 0;
    return input + (this.#context?.outputLatency || this.#context?.baseLatency || 0);
  }

  async #connectMicrophone() {
    try {
      this.#source = this.#context.createMediaStreamSource(this.#stream);
    } catch {
      // Some browsers do not resample a microphone: then the worklet does, at the device's rate.
      this.#node.disconnect();
      await this.#context.close();
      await this.start({});
      this.#source = this.#context.createMediaStreamSource(this.#stream);
    }
    this.#source.connect(this.#node);
  }

  #receive(message) {
    switch (message.kind) {
      case "microphone":
        this.#on.microphone(message.pcm, message.level);
        break;
      case "voice":
        this.playing = message.playing;
        this.underruns = message.underruns;
        this.#on.voice(message.level);
        break;
      case "played":
        this.#on.played(message.progress);
        break;
      case "audible": {
        const answered_s = message.answered_s;
        this.#on.audible(message.itemId, answered_s && answered_s + this.deviceLatency_s);
        break;
      }
      case "flushed":
        this.#flushes.shift()?.(message);
    }
  }
}

function reasonOf(error) {
  switch (error.name) {
    case "NotAllowedError":
    case "SecurityError":
      return "denied";
    case "NotFoundError":
    case "OverconstrainedError":
      return "absent";
    case "NotReadableError":
    case "AbortError":
      return "busy";
    default:
      return "failed";
  }
}
