// The listener's end of a reply: a jitter buffer that knows exactly what was played.
//
// No device and no clock: whoever plays calls `pull`, and the samples pulled are the time.
// All positions and depths are samples at 24 kHz.

const MS = 24;
const FADE = 3 * MS; // where sound breaks off or starts inside an item
const AUDIBLE = 10 ** (-46 / 20);

export const START_DEPTH = { first: 40 * MS, least: 20 * MS, most: 160 * MS };

export class PlaybackBuffer {
  underruns = 0;
  audible = null; // set by `pull`: {itemId, offset} of an item's first audible sample
  #pieces = [];
  #depth = 0;
  #startDepth = START_DEPTH.first;
  #waited = 0; // pulled in vain since audio waits to be started
  #playing = false;
  #now = null; // {itemId, played}: the item in play, or the last one
  #ended = null; // the last item known to be complete
  #gap = null; // silence since the item in play ran dry
  #clean = true; // the item in play had no underrun
  #lastAudible = null;
  #unreported = new Map();
  #level = 0; // of the last sample played
  #rise = 0; // samples of a fade-in still to play
  #fall = 0; // samples of a fade-out still to play

  /** Whether sound is coming out now. */
  get playing() {
    return this.#playing;
  }

  /** Audio that waits to be played. */
  get depth() {
    return this.#depth;
  }

  /** The depth that is waited for before playing, as adapted so far. */
  get startDepth() {
    return this.#startDepth;
  }

  /** Append an item's audio (Float32Array), beginning at `start` of that item. */
  push(itemId, start, samples) {
    if (!samples.length) return;
    if (this.#gap !== null && !this.#pieces.length) this.#judgeGap(itemId);
    this.#pieces.push({ itemId, start, samples });
    this.#depth += samples.length;
  }

  /** No more audio of that item comes: what is there need not wait, running dry is no fault. */
  end(itemId) {
    this.#ended = itemId;
    if (!this.#pieces.length) this.#gap = null;
  }

  /** Fill `out` with what comes next; silence where there is nothing to play. */
  pull(out) {
    out.fill(0);
    this.audible = null;
    let filled = 0;
    if (this.#mayPlay(out.length)) {
      while (filled < out.length && this.#pieces.length) filled += this.#playInto(out, filled);
    }
    if (filled === out.length) return;
    this.#breakOff();
    this.#fadeOut(out, filled);
    if (this.#gap !== null) this.#gap += out.length - filled;
  }

  /** Drop what waits. Returns {itemId, played} of the item that was cut; null if none was. */
  flush() {
    this.#breakOff();
    const head = this.#pieces[0];
    let cut = this.#now;
    if (head && cut?.itemId !== head.itemId) cut = { itemId: head.itemId, played: head.start };
    else if (!head && (!cut || this.#gap === null)) cut = null;
    this.#pieces = [];
    this.#depth = this.#waited = 0;
    this.#gap = null;
    if (cut) this.#unreported.delete(cut.itemId);
    return cut;
  }

  /** [{itemId, played}] of every item that was played further since the last call. */
  takeProgress() {
    const progress = [...this.#unreported].map(([itemId, played]) => ({ itemId, played }));
    this.#unreported.clear();
    return progress;
  }

  #mayPlay(count) {
    if (this.#playing || !this.#pieces.length) return this.#playing;
    const head = this.#pieces[0];
    const enough =
      this.#depth >= this.#startDepth ||
      this.#waited >= this.#startDepth ||
      head.itemId === this.#ended;
    if (!enough) {
      this.#waited += count;
      return false;
    }
    this.#playing = true;
    this.#waited = this.#fall = 0;
    this.#gap = null;
    this.#rise = head.start > 0 ? FADE : 0;
    return true;
  }

  #playInto(out, filled) {
    const piece = this.#pieces[0];
    if (this.#now && this.#now.itemId !== piece.itemId) this.#nextItem();
    const count = Math.min(out.length - filled, piece.samples.length);
    for (let at = 0; at < count; at++) {
      let sample = piece.samples[at];
      if (this.#rise > 0) sample *= 1 - this.#rise-- / FADE;
      out[filled + at] = sample;
      if (Math.abs(sample) >= AUDIBLE && this.#lastAudible !== piece.itemId) {
        this.#lastAudible = piece.itemId;
        this.audible = { itemId: piece.itemId, offset: filled + at };
      }
    }
    this.#level = out[filled + count - 1];
    this.#depth -= count;
    const played = piece.start + count;
    if (count === piece.samples.length) this.#pieces.shift();
    else this.#pieces[0] = { ...piece, start: played, samples: piece.samples.subarray(count) };
    this.#now = { itemId: piece.itemId, played };
    this.#unreported.set(piece.itemId, played);
    return count;
  }

  #nextItem() {
    if (this.#clean) this.#startDepth = Math.max(START_DEPTH.least, this.#startDepth >> 1);
    this.#clean = true;
  }

  /** Audio came after the buffer ran dry: an underrun, if it is the same item's. */
  #judgeGap(itemId) {
    if (this.#now?.itemId === itemId) {
      this.underruns += 1;
      this.#clean = false;
      this.#startDepth = Math.min(START_DEPTH.most, this.#startDepth + this.#gap);
    }
    this.#gap = null;
  }

  #breakOff() {
    if (!this.#playing) return;
    this.#playing = false;
    this.#gap = this.#now.itemId === this.#ended ? null : 0;
    this.#fall = FADE;
  }

  /** Let the last level sink to zero instead of dropping: no click. */
  #fadeOut(out, filled) {
    for (let at = filled; at < out.length && this.#fall > 0; at++) {
      out[at] = (this.#level * --this.#fall) / FADE;
    }
  }
}
