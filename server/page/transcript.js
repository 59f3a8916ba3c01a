// The written conversation. Words are only ever set as text, never as markup.

const MAX_TURNS = 200;
const MAX_HISTORY = 40;
const NEAR_END_PX = 80;

export class Transcript {
  #list;
  #turns = new Map(); // item id → its parts of the page

  #atEnd = true;

  constructor(list) {
    this.#list = list;
    list.addEventListener("scroll", () => {
      this.#atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < NEAR_END_PX;
    });
    new ResizeObserver(() => this.#followEnd()).observe(list);
  }

  /** The person's turn, empty at first. */
  person(itemId) {
    return this.#turn(itemId, "person", "You");
  }

  personDelta(itemId, delta) {
    this.#append(this.person(itemId), delta);
  }

  personFinal(itemId, text) {
    if (text.trim()) this.#settle(this.person(itemId), text);
    else this.drop(itemId);
  }

  personFailed(itemId) {
    const turn = this.person(itemId);
    this.#settle(turn, turn.text.textContent || "…");
    this.mark(itemId, "not understood");
  }

  /** It was no turn after all. */
  drop(itemId) {
    this.#turns.get(itemId)?.root.remove();
    this.#turns.delete(itemId);
  }

  parleyDelta(itemId, delta) {
    this.#append(this.#turn(itemId, "parley", "Parley"), delta);
  }

  /** What was really said: after an interruption less than was written. */
  parleyFinal(itemId, text) {
    if (this.#turns.has(itemId)) this.#settle(this.#turns.get(itemId), text);
  }

  parleyPaused(itemId) {
    this.#turns.get(itemId)?.root.classList.add("paused");
  }

  parleyResumed() {
    for (const turn of this.#list.querySelectorAll(".paused")) turn.classList.remove("paused");
  }

  parleyCut(itemId, status) {
    const turn = this.#turns.get(itemId);
    if (!turn) return;
    if (!turn.text.textContent.trim()) {
      this.drop(itemId);
      return;
    }
    turn.root.classList.add("cut");
    this.mark(itemId, status === "cancelled" ? "interrupted" : "broken off");
  }

  /** No reply is being written any more. */
  parleyDone() {
    for (const turn of this.#list.querySelectorAll(".parley[aria-busy]")) {
      turn.removeAttribute("aria-busy");
    }
    this.parleyResumed();
  }

  /** The connection is gone: nothing more is added to any turn. */
  over() {
    this.parleyDone();
    for (const { root, text } of [...this.#turns.values()]) {
      root.removeAttribute("aria-busy");
      if (!text.textContent.trim()) this.drop(root.dataset.item);
    }
  }

  /** A small remark beside a turn. */
  mark(itemId, text) {
    const turn = this.#turns.get(itemId);
    if (turn) turn.marks.append(element("span", "mark", text));
  }

  /** A line between the turns. */
  note(text) {
    this.#add(element("p", "note", text));
  }

  /** The last turns, as [{role, text}]. */
  history() {
    return [...this.#turns.values()]
      .map(({ root, text }) => ({
        role: root.classList.contains("person") ? "user" : "assistant",
        text: text.textContent,
      }))
      .filter(({ text }) => text)
      .slice(-MAX_HISTORY);
  }

  #turn(itemId, side, name) {
    const known = this.#turns.get(itemId);
    if (known) return known;
    const root = element("article", `turn ${side}`);
    const text = element("p", "text");
    const marks = element("span", "marks");
    const head = element("header", "", name);
    head.append(marks);
    root.append(head, text);
    root.dataset.item = itemId;
    root.setAttribute("aria-busy", "true");
    const turn = { root, text, marks };
    this.#turns.set(itemId, turn);
    this.#add(root);
    if (this.#turns.size > MAX_TURNS) this.drop(this.#turns.keys().next().value);
    return turn;
  }

  #append(turn, delta) {
    turn.text.append(delta);
    this.#followEnd();
  }

  #settle(turn, text) {
    turn.text.textContent = text.trim();
    turn.root.removeAttribute("aria-busy");
    this.#followEnd();
  }

  #add(node) {
    this.#list.append(node);
    this.#followEnd();
  }

  /** Who reads the end goes on reading the end. */
  #followEnd() {
    if (this.#atEnd) this.#list.scrollTop = this.#list.scrollHeight;
  }
}

function element(tag, className, text = "") {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.textContent = text;
  return node;
}
