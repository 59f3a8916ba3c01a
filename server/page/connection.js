// The websocket: JSON events as text, audio as binary frames, reconnection with backoff.

const SUBPROTOCOL = "parley.v1";
const KEY_SUBPROTOCOL = "openai-insecure-api-key.";
const BACKOFF_MS = [500, 1000, 2000, 4000, 8000];
const FINAL = new Set(["session_limit_reached", "session_expired", "idle_timeout"]);
const MAX_UNSENT_BYTES = 48000; // a second of audio: more waiting means the network is too slow
const AUDIO_KIND = 1;
const MAX_REFUSALS = 2; // handshakes refused by a server that answers otherwise

export class Connection {
  #on; // event(event), audio(itemId, start, pcm), lost(retry_s), refused(code, message)
  #socket = null;
  #key = "";
  #attempt = 0;
  #refusals = 0;
  #timer = null;
  #lastError = null;

  constructor(handlers) {
    this.#on = handlers;
    addEventListener("online", () => {
      if (this.#timer !== null) this.#connect();
    });
  }

  /** Keep a connection until `close`, or until the server refuses. */
  open(key) {
    this.#key = key;
    this.#attempt = this.#refusals = 0;
    this.#connect();
  }

  close() {
    clearTimeout(this.#timer);
    this.#timer = null;
    const socket = this.#socket;
    this.#socket = null;
    socket?.close(1000);
  }

  send(event) {
    if (this.#socket?.readyState === WebSocket.OPEN) this.#socket.send(JSON.stringify(event));
  }

  /** pcm16 at 24 kHz. Returns false if it was dropped because the network is too slow. */
  sendAudio(pcm) {
    if (this.#socket?.readyState !== WebSocket.OPEN) return true;
    if (this.#socket.bufferedAmount > MAX_UNSENT_BYTES) return false;
    this.#socket.send(pcm);
    return true;
  }

  #connect() {
    clearTimeout(this.#timer);
    this.#timer = this.#lastError = null;
    const url = new URL("/v1/realtime", location.href);
    url.protocol = url.protocol.replace("http", "ws");
    const protocols = this.#key ? [SUBPROTOCOL, KEY_SUBPROTOCOL + this.#key] : [SUBPROTOCOL];
    let socket;
    try {
      socket = new WebSocket(url, protocols);
    } catch {
      this.close();
      this.#on.refused("invalid_api_key", "This key holds characters that a browser cannot send.");
      return;
    }
    this.#socket = socket;
    socket.binaryType = "arraybuffer";
    let opened = false;
    socket.onopen = () => {
      opened = true;
      this.#refusals = 0;
    };
    socket.onmessage = ({ data }) => {
      if (socket === this.#socket) this.#receive(data);
    };
    socket.onclose = () => {
      if (socket === this.#socket) this.#closed(opened);
    };
  }

  #receive(data) {
    if (typeof data !== "string") {
      this.#receiveAudio(data);
      return;
    }
    const event = JSON.parse(data);
    this.#lastError = event.type === "error" ? event.error : null;
    if (event.type === "session.created") this.#attempt = 0;
    this.#on.event(event);
  }

  /** Kind, length of the item's id, the id, uint32 first sample, pcm16 at 24 kHz. */
  #receiveAudio(data) {
    const header = new DataView(data);
    if (data.byteLength < 6 || header.getUint8(0) !== AUDIO_KIND) return;
    const end = 2 + header.getUint8(1);
    const itemId = String.fromCharCode(...new Uint8Array(data, 2, end - 2));
    const pcm = new Int16Array(data.slice(end + 4));
    this.#on.audio(itemId, header.getUint32(end, true), pcm);
  }

  async #closed(opened) {
    const socket = this.#socket;
    const reason = opened ? this.#lastError : await this.#refusal();
    if (socket !== this.#socket) return; // closed or opened anew meanwhile
    this.#socket = null;
    if (reason?.final || FINAL.has(reason?.code)) {
      this.#on.refused(reason.code, reason.message);
      return;
    }
    const wait_ms = BACKOFF_MS[Math.min(this.#attempt++, BACKOFF_MS.length - 1)];
    const spread_ms = wait_ms * (0.75 + Math.random() / 2);
    this.#timer = setTimeout(() => this.#connect(), spread_ms);
    this.#on.lost(spread_ms / 1000);
  }

  /** A refused handshake tells a page nothing: ask where the same rules hold. */
  async #refusal() {
    const headers = this.#key ? { Authorization: `Bearer ${this.#key}` } : {};
    try {
      const { status } = await fetch("/metrics", { method: "HEAD", headers });
      if (status === 401) return { final: true, code: "invalid_api_key" };
      if (status < 500 && ++this.#refusals >= MAX_REFUSALS) return { final: true, code: "handshake_refused" };
    } catch {
      // nobody answers: that is what reconnecting is for
    }
    return null;
  }
}
