// When the person was last heard, by energy alone and on this machine: the start of the
// response time that the page shows. Nothing is decided by it.

const BLOCK = 120; // 5 ms at 24 kHz
const RUN_BLOCKS = 4; // so much in a row is voice and not a click
const LEAST_DB = -52;
const ABOVE_NOISE_DB = 12;
const NOISE_RISE_DB = 0.02; // per block: 4 dB a second

export class VoiceDetector {
  #noiseDb = -60;
  #run = 0;
  #sum = 0;
  #count = 0;

  /** Take samples at 24 kHz. Returns how many of them come after the last voiced one, or null. */
  push(samples) {
    let voicedEnd = null;
    for (let at = 0; at < samples.length; at++) {
      this.#sum += samples[at] * samples[at];
      if (++this.#count < BLOCK) continue;
      if (this.#judge(10 * Math.log10(this.#sum / BLOCK + 1e-12))) voicedEnd = at + 1;
      this.#sum = this.#count = 0;
    }
    return voicedEnd === null ? null : samples.length - voicedEnd;
  }

  #judge(levelDb) {
    const voiced = levelDb > Math.max(LEAST_DB, this.#noiseDb + ABOVE_NOISE_DB);
    this.#noiseDb = Math.max(-90, Math.min(levelDb, this.#noiseDb + NOISE_RISE_DB, -36));
    this.#run = voiced ? this.#run + 1 : 0;
    return this.#run >= RUN_BLOCKS;
  }
}
