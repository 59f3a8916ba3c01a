// The last seconds of both sides as a moving strip: the person above, Parley below.

const SLOT_MS = 60;
const SLOT_PX = 4;
const BAR_PX = 2.5;
const FLOOR_DB = -54;

export class Strip {
  #canvas;
  #slots = []; // newest first, [person, parley] in 0 … 1
  #current = [0, 0];
  #slotEnd = 0;
  #running = false;

  constructor(canvas) {
    this.#canvas = canvas;
    new ResizeObserver(() => this.#draw()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#draw());
  }

  run(running) {
    if (running === this.#running) return;
    this.#running = running;
    if (running) {
      this.#slotEnd = performance.now() + SLOT_MS;
      this.#next();
    }
  }

  person(level) {
    this.#current[0] = Math.max(this.#current[0], height(level));
  }

  parley(level) {
    this.#current[1] = Math.max(this.#current[1], height(level));
  }

  #next() {
    if (!this.#running) return;
    requestAnimationFrame((now) => {
      const widest = Math.ceil(this.#canvas.clientWidth / SLOT_PX) + 1;
      if (now - this.#slotEnd > widest * SLOT_MS) this.#slotEnd = now; // the page was hidden
      const moved = now >= this.#slotEnd;
      while (now >= this.#slotEnd) {
        this.#slots.unshift(this.#current);
        this.#current = [0, 0];
        this.#slotEnd += SLOT_MS;
      }
      this.#slots.length = Math.min(this.#slots.length, widest);
      if (moved) this.#draw();
      this.#next();
    });
  }

  #draw() {
    const canvas = this.#canvas;
    const { clientWidth: width, clientHeight: size } = canvas;
    const ratio = devicePixelRatio || 1;
    canvas.width = width * ratio;
    canvas.height = size * ratio;
    const pen = canvas.getContext("2d");
    const style = getComputedStyle(canvas);
    const colours = ["--person", "--parley"].map((name) => style.getPropertyValue(name));
    pen.scale(ratio, ratio);
    const middle = size / 2;
    pen.fillStyle = style.getPropertyValue("--line");
    pen.fillRect(0, middle - 0.5, width, 1);
    this.#slots.forEach((slot, index) => {
      const x = width - (index + 1) * SLOT_PX;
      slot.forEach((level, side) => {
        if (level <= 0) return;
        const tall = Math.max(2, level * (middle - 3));
        pen.fillStyle = colours[side];
        pen.beginPath();
        pen.roundRect(x, side === 0 ? middle - 2 - tall : middle + 2, BAR_PX, tall, BAR_PX / 2);
        pen.fill();
      });
    });
  }
}

/** RMS level → 0 … 1 on a decibel scale. */
function height(level) {
  return Math.max(0, Math.min(1, 1 - (20 * Math.log10(level + 1e-9)) / FLOOR_DB));
}
