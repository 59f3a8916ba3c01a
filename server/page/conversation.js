// One conversation: server events, audio and the person's actions come together here.
// It knows no page; what changes is told to `view`.

import { AudioEngine, MicrophoneError } from "./audio.js";
import { Connection } from "./connection.js";

const SHORTEST_TALK_MS = 150; // held shorter than this, push-to-talk was a slip
const MAX_ANSWERS = 8;
const CUT_IN_S = 0.1; // nobody answers a voice so soon: it had not ended

export class Conversation {
  link = "off"; // off, connecting, open, lost
  microphone = "off"; // off, on, muted
  pushToTalk = false;
  spoke = false; // Parley was heard: its voice stays
  answers_s = []; // response times of the last turns, newest last
  counts = { frames_sent: 0, reports: 0, flushes: 0, played_samples: 0 };
  #view; // changed(), person*, parley*, note(text), problem(code, message), levels
  #settings; // () → {voice, speed, instructions}
  #audio;
  #connection;
  #hearing = false;
  #yields = true; // to the person's speech; else the server alone decides
  #answers = true; // every turn of the person gets a response
  #transcribed = true; // the person's words come as text
  #thinking = false;
  #responses = new Set();
  #committed = false; // a spoken turn waits for its answer
  #utterance = null; // the item that is being spoken, not yet committed
  #talk = null; // push-to-talk: {since, cutting, ending}
  #congested = false;
  #start = null; // the start that counts
  #unsaid = []; // written before the connection was there
  #resume = false; // this connection continues an earlier conversation

  constructor(view, settings) {
    this.#view = view;
    this.#settings = settings;
    this.#audio = new AudioEngine({
      microphone: (pcm, level) => this.#heard(pcm, level),
      voice: (level) => {
        view.voiceLevel(level);
        if (this.#audio.playing) this.#thinking = false;
        view.changed();
      },
      played: (progress) => this.#report(progress),
      audible: (itemId, answered_s) => this.#audible(itemId, answered_s),
      lost: () => {
        this.microphone = "off";
        view.problem("microphone_lost");
        view.changed();
      },
    });
    this.#connection = new Connection({
      event: (event) => this.#handle(event),
      audio: (itemId, start, pcm) => this.#audio.push(itemId, start, pcm),
      lost: (retry_s) => this.#lost(retry_s),
      refused: (code, message) => {
        this.stop();
        view.problem(code, message);
      },
    });
  }

  /** What is going on, in one word. */
  get state() {
    if (this.link !== "open") return this.link;
    if (this.#talk || this.#hearing) return "hearing";
    if (this.#audio.playing) return "speaking";
    if (this.#thinking) return "thinking";
    if (this.microphone === "off") return "typing";
    if (this.microphone === "muted") return "muted";
    return this.pushToTalk ? "ready" : "listening";
  }

  get underruns() {
    return this.#audio.underruns;
  }

  get talking() {
    return this.#talk !== null;
  }

  async start(key, withMicrophone) {
    const start = (this.#start = {});
    this.link = "connecting";
    this.spoke = this.#resume = false;
    this.#view.changed();
    if (AudioEngine.available) {
      await this.#audio.start();
      if (withMicrophone && start === this.#start) await this.openMicrophone();
    } else {
      this.#view.problem("insecure");
    }
    if (start === this.#start) this.#connection.open(key);
  }

  stop() {
    this.#start = null;
    this.#connection.close();
    this.#forget();
    this.#unsaid = [];
    this.link = "off";
    this.microphone = "off";
    this.#audio.stop();
    this.#view.changed();
  }

  async openMicrophone() {
    try {
      await this.#audio.openMicrophone();
      this.microphone = "on";
    } catch (error) {
      if (!(error instanceof MicrophoneError)) throw error;
      if (error.reason !== "stopped") this.#view.problem(`microphone_${error.reason}`);
    }
    this.#view.changed();
  }

  mute(muted) {
    this.#audio.mute(muted);
    this.microphone = muted ? "muted" : "on";
    this.#view.changed();
  }

  setPushToTalk(on) {
    this.pushToTalk = on;
    this.#talk = null;
    this.#hearing = false;
    this.#audio.attend(!on);
    const turn_detection = on ? null : { type: "server_vad" };
    this.#update({ audio: { input: { turn_detection } } });
    this.#view.changed();
  }

  /** The voice stays once it was heard; speed and instructions may change at any time. */
  settingsChanged() {
    const { voice, speed, instructions } = this.#settings();
    const output = this.spoke || !voice ? { speed } : { speed, voice };
    this.#update({ instructions, audio: { output } });
  }

  /** Push-to-talk: the person begins. */
  beginTalk() {
    const can = this.link === "open" && this.pushToTalk && this.microphone === "on";
    if (!can || this.#talk) return;
    this.#audio.attend(true);
    this.#talk = { since: performance.now(), ending: false, cutting: this.#interrupt() };
    this.#view.changed();
  }

  /** Push-to-talk: the person has ended; what the microphone still holds is sent first. */
  endTalk() {
    if (this.#talk) this.#talk.ending = true;
  }

  /** Say something by keyboard. */
  async say(text) {
    if (this.link !== "open") {
      this.#unsaid.push(text);
      return;
    }
    await this.#interrupt();
    const id = `item_${crypto.getRandomValues(new Uint32Array(3)).join("")}`;
    this.#view.personFinal(id, text);
    this.#createItem(id, "user", "input_text", text);
    this.#respond();
  }

  // Audio.

  #heard(pcm, level) {
    this.#view.microphoneLevel(this.microphone === "muted" ? 0 : level);
    if (this.link !== "open" || (this.pushToTalk && !this.#talk)) return;
    const sent = this.#connection.sendAudio(pcm);
    this.counts.frames_sent += sent ? 1 : 0;
    if (!sent && !this.#congested) this.#view.problem("network_slow");
    this.#congested = !sent;
    if (this.#talk?.ending) this.#finishTalk(this.#talk);
  }

  async #finishTalk({ since, cutting }) {
    this.#talk = null;
    this.#audio.attend(false);
    await cutting;
    if (performance.now() - since < SHORTEST_TALK_MS) {
      this.#connection.send({ type: "input_audio_buffer.clear" });
      this.#view.problem("talk_too_short");
    } else {
      this.#connection.send({ type: "input_audio_buffer.commit" });
      this.#committed = true;
      this.#respond();
    }
    this.#view.changed();
  }

  #audible(itemId, answered_s) {
    this.spoke = true;
    if (this.#committed && answered_s !== null) {
      if (answered_s < CUT_IN_S && !this.pushToTalk) {
        this.#view.cutIn(itemId);
      } else {
        this.answers_s = [...this.answers_s, answered_s].slice(-MAX_ANSWERS);
        this.#view.answered(itemId, answered_s);
      }
    }
    this.#committed = false;
  }

  #report(progress) {
    for (const { itemId, played } of progress) {
      this.counts.reports += 1;
      this.counts.played_samples = played;
      const report = { type: "parley.playback", item_id: itemId, played_samples: played };
      this.#connection.send(report);
    }
  }

  /** Fall silent at once and say exactly what was heard. */
  async #flush() {
    const { cut, progress } = await this.#audio.flush();
    this.#report(cut ? [...progress, cut] : progress);
    if (cut) {
      this.counts.flushes += 1;
      this.#view.parleyPaused(cut.itemId);
    }
  }

  /** By hand: the reply ends here. */
  async #interrupt() {
    await this.#flush();
    this.#connection.send({ type: "output_audio_buffer.clear" });
  }

  // Events.

  #handle(event) {
    const itemId = event.item_id;
    switch (event.type) {
      case "session.created":
        this.#configured(event.session);
        this.#opened();
        break;
      case "session.updated":
        this.#configured(event.session);
        break;
      case "input_audio_buffer.speech_started":
        this.#hearing = true;
        this.#utterance = itemId;
        if (!this.#audio.playing && this.#transcribed) this.#view.person(itemId);
        if (this.#yields) this.#flush();
        if (!this.#answers) this.#committed = true; // it may be answered before it is over
        break;
      case "input_audio_buffer.speech_stopped":
        this.#hearing = false;
        break;
      case "input_audio_buffer.committed":
        this.#utterance = null;
        if (this.#transcribed) this.#view.person(itemId);
        this.#view.parleyResumed();
        if (!this.pushToTalk && this.#answers) this.#thinking = this.#committed = true;
        break;
      case "input_audio_buffer.cleared":
        if (this.#utterance) this.#view.drop(this.#utterance);
        this.#utterance = null;
        this.#view.parleyResumed();
        break;
      case "conversation.item.input_audio_transcription.delta":
        this.#view.personDelta(itemId, event.delta);
        break;
      case "conversation.item.input_audio_transcription.completed":
        this.#view.personFinal(itemId, event.transcript);
        break;
      case "conversation.item.input_audio_transcription.failed":
        this.#view.personFailed(itemId);
        if (!this.pushToTalk) this.#thinking = this.#committed = false;
        break;
      case "response.created":
        this.#responses.add(event.response.id);
        this.#thinking = true;
        break;
      case "response.output_audio_transcript.delta":
      case "response.output_text.delta":
        this.#view.parleyDelta(itemId, event.delta);
        break;
      case "response.output_audio_transcript.done":
        this.#view.parleyFinal(itemId, event.transcript);
        break;
      case "response.output_audio.done":
        this.#audio.end(itemId);
        break;
      case "response.done":
        this.#responseDone(event.response);
        break;
      case "error":
        this.#thinking = false;
        this.#view.problem(event.error.code, event.error.message);
    }
    this.#view.changed();
  }

  #responseDone(response) {
    this.#responses.delete(response.id);
    const item = response.output[0];
    if (item && response.status !== "completed") this.#view.parleyCut(item.id, response.status);
    const text = response.output_modalities?.[0] === "text";
    if (response.status !== "completed" || !item || text) this.#thinking = false;
    this.#view.parleyDone();
  }

  #configured(session) {
    const input = session.audio?.input;
    this.#yields = input?.turn_detection?.interrupt_response !== false;
    this.#answers = input?.turn_detection?.create_response !== false;
    this.#transcribed = input?.transcription != null;
  }

  #opened() {
    this.link = "open";
    const { voice, speed, instructions } = this.#settings();
    const audio = { output: voice ? { speed, voice } : { speed } };
    if (this.pushToTalk) audio.input = { turn_detection: null };
    const session = { audio };
    if (instructions) session.instructions = instructions;
    if (!AudioEngine.available) session.output_modalities = ["text"];
    this.#update(session);
    if (this.#resume) {
      // A new session knows nothing: tell it what was said.
      for (const { role, text } of this.#view.history()) {
        this.#createItem(undefined, role, role === "user" ? "input_text" : "output_text", text);
      }
      this.#view.reconnected();
    }
    this.#resume = true;
    for (const text of this.#unsaid.splice(0)) this.say(text);
  }

  #lost(retry_s) {
    this.#forget();
    this.#audio.flush();
    this.link = "lost";
    this.#view.lost(retry_s);
    this.#view.changed();
  }

  #forget() {
    if (this.#utterance) this.#view.drop(this.#utterance);
    this.#utterance = this.#talk = null;
    this.#hearing = this.#thinking = this.#committed = this.#congested = false;
    this.#responses.clear();
    this.#view.over();
  }

  #update(session) {
    this.#connection.send({ type: "session.update", session: { type: "realtime", ...session } });
  }

  #createItem(id, role, type, text) {
    const item = { id, type: "message", role, content: [{ type, text }] };
    this.#connection.send({ type: "conversation.item.create", item });
  }

  #respond() {
    this.#thinking = true;
    this.#connection.send({ type: "response.create" });
    this.#view.changed();
  }
}
