// Streaming resampling between two whole rates: a polyphase windowed sinc that keeps its state
// between calls. Equal rates pass through untouched.

const ZERO_CROSSINGS = 16;
const PASS_BAND = 0.94; // of the lower rate's band; what lies above is suppressed

export class Resampler {
  #phases; // per phase, the taps for `2 * half` input samples
  #step; // input samples per output sample, as whole part and phases
  #half;
  #waiting; // input samples still needed
  #phase = 0;

  constructor(fromHz, toHz) {
    if (fromHz === toHz) return;
    const common = gcd(fromHz, toHz);
    const count = toHz / common;
    const cutoff = PASS_BAND * Math.min(1, toHz / fromHz);
    this.#half = Math.ceil(ZERO_CROSSINGS / cutoff);
    this.#step = fromHz / common;
    this.#phases = Array.from({ length: count }, (_, phase) => this.#taps(phase / count, cutoff));
    this.#waiting = new Float32Array(this.#half - 1);
  }

  /** Float32Array at the first rate → what is ready at the second. */
  push(samples) {
    if (!this.#phases) return samples;
    const count = this.#phases.length;
    const input = joined(this.#waiting, samples);
    const width = 2 * this.#half;
    const out = [];
    let start = 0;
    while (start + width <= input.length) {
      const taps = this.#phases[this.#phase];
      let sum = 0;
      for (let tap = 0; tap < width; tap++) sum += taps[tap] * input[start + tap];
      out.push(sum);
      this.#phase += this.#step;
      start += Math.floor(this.#phase / count);
      this.#phase %= count;
    }
    // A step is shorter than the filter is wide: `start` lies within the input.
    this.#waiting = input.slice(start);
    return Float32Array.from(out);
  }

  #taps(fraction, cutoff) {
    const taps = new Float64Array(2 * this.#half);
    let sum = 0;
    for (let tap = 0; tap < taps.length; tap++) {
      const at = tap - (this.#half - 1) - fraction;
      const window = 0.5 + 0.5 * Math.cos((Math.PI * at) / (this.#half + 1));
      taps[tap] = sinc(cutoff * at) * window;
      sum += taps[tap];
    }
    return taps.map((tap) => tap / sum);
  }
}

export function joined(first, second) {
  const both = new Float32Array(first.length + second.length);
  both.set(first);
  both.set(second, first.length);
  return both;
}

function sinc(x) {
  return x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x);
}

function gcd(a, b) {
  return b === 0 ? a : gcd(b, a % b);
}
