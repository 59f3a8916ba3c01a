// The page: what one sees and presses. The conversation itself is in conversation.js.

import { Conversation } from "./conversation.js";
import { Strip } from "./strip.js";
import { Transcript } from "./transcript.js";

const VOICES = "alloy ash ballad cedar coral echo marin sage shimmer verse".split(" ");
const LEAST_SCALE_S = 0.6; // of the bars of the response times

const STATES = {
  off: "Not connected",
  connecting: "Connecting",
  lost: "Connection lost, reconnecting",
  listening: "Listening",
  hearing: "Hearing you",
  thinking: "Thinking",
  speaking: "Speaking",
  muted: "Microphone muted",
  typing: "Ready for your message",
  ready: "Hold Space or the button to talk",
};

const PROBLEMS = {
  insecure:
    "Browsers allow audio only on secure pages: open this page over https:// or on localhost. " +
    "Until then you can write, and Parley answers in writing.",
  microphone_insecure:
    "Browsers allow the microphone only on secure pages: open this page over https:// or on " +
    "localhost. You can write below.",
  microphone_denied:
    "The microphone is blocked for this page. Allow it in the browser’s address bar, then stop " +
    "and start again. You can write below.",
  microphone_absent: "No microphone was found. Connect one and start again, or write below.",
  microphone_busy: "The microphone is there but cannot be opened: another program may have it.",
  microphone_failed: "The microphone could not be opened. You can write below.",
  microphone_lost: "The microphone was disconnected. You can write below.",
  network_slow: "The network is too slow: some of what you say is lost.",
  talk_too_short: "Hold the button (or Space) for as long as you speak.",
  session_limit_reached: "The server is full: all its sessions are taken. Try again in a moment.",
  session_expired: "This conversation has reached its longest time. Start again to go on.",
  idle_timeout: "Nothing happened for a long time, so the server ended the conversation.",
  handshake_refused:
    "The server is there but refuses this page: its address may not be allowed " +
    "(--allowed_origins), or a proxy in between passes no websockets.",
  failed: "Something on this page failed. Stop and start again.",
};

const PASSING = new Set(["network_slow", "talk_too_short"]);
const PASSING_MS = 5000;

const $ = (id) => document.getElementById(id);
const strip = new Strip($("strip"));
const transcript = new Transcript($("transcript"));
let key = "";
let passing = 0; // the timer of a message that goes by itself

const conversation = new Conversation(
  {
    changed: () => show(),
    person: (itemId) => welcomeOver(() => transcript.person(itemId)),
    personDelta: (itemId, delta) => welcomeOver(() => transcript.personDelta(itemId, delta)),
    personFinal: (itemId, text) => welcomeOver(() => transcript.personFinal(itemId, text)),
    personFailed: (itemId) => transcript.personFailed(itemId),
    drop: (itemId) => transcript.drop(itemId),
    parleyDelta: (itemId, delta) => welcomeOver(() => transcript.parleyDelta(itemId, delta)),
    parleyFinal: (itemId, text) => transcript.parleyFinal(itemId, text),
    parleyPaused: (itemId) => transcript.parleyPaused(itemId),
    parleyResumed: () => transcript.parleyResumed(),
    parleyCut: (itemId, status) => transcript.parleyCut(itemId, status),
    parleyDone: () => transcript.parleyDone(),
    over: () => transcript.over(),
    history: () => transcript.history(),
    reconnected: () => {
      transcript.note("Reconnected");
      hideProblem();
    },
    lost: (retry_s) => {
      problem("lost", `The connection was lost. Trying again in ${retry_s.toFixed(1)} s …`);
    },
    answered,
    cutIn: (itemId) => transcript.mark(itemId, "spoke over you"),
    problem,
    microphoneLevel: (level) => strip.person(level),
    voiceLevel: (level) => strip.parley(level),
  },
  () => ({
    voice: $("voice").value,
    speed: Number($("speed").value),
    instructions: $("instructions").value.trim(),
  }),
);

function show() {
  const { state, link, microphone, pushToTalk } = conversation;
  const on = link !== "off";
  document.body.dataset.state = state;
  document.body.dataset.link = link;
  setText($("state"), STATES[state]);
  setText($("start-text"), on ? "Stop" : "Start talking");
  $("mute").hidden = link !== "open" && microphone === "off";
  $("mute").setAttribute("aria-pressed", String(microphone === "muted"));
  setText($("mute"), { off: "Use microphone", on: "Mute", muted: "Unmute" }[microphone]);
  $("hold").hidden = !(on && pushToTalk);
  $("hold").disabled = microphone !== "on" || link !== "open";
  $("hold").classList.toggle("held", conversation.talking);
  $("voice").disabled = on && conversation.spoke;
  strip.run(on);
}

/** Set only what differs: a changed node is read out and laid out anew. */
function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function welcomeOver(change) {
  $("welcome").hidden = true;
  change();
}

function answered(itemId, seconds) {
  const text = `${seconds.toFixed(2)} s`;
  transcript.mark(itemId, `answered in ${text}`);
  $("answer-last").textContent = text;
  const scale_s = Math.max(LEAST_SCALE_S, ...conversation.answers_s);
  $("answer-bars").replaceChildren(
    ...conversation.answers_s.map((one) => {
      const bar = document.createElement("li");
      bar.style.setProperty("--height", `${(Math.max(0, one) / scale_s) * 100}%`);
      bar.title = `${one.toFixed(2)} s`;
      bar.append(Object.assign(document.createElement("span"), { textContent: one.toFixed(2) }));
      return bar;
    }),
  );
}

function problem(code, message) {
  if (code === "invalid_api_key") {
    askForKey(message);
    return;
  }
  const own = PROBLEMS[code];
  $("notice-text").textContent = own ?? message ?? PROBLEMS.failed;
  $("notice").dataset.code = code;
  $("notice").hidden = false;
  clearTimeout(passing);
  if (PASSING.has(code)) passing = setTimeout(hideProblem, PASSING_MS);
}

function hideProblem() {
  $("notice").hidden = true;
}

function askForKey(message) {
  const refused = key ? "The server did not accept this API key." : "This server wants an API key.";
  problem("key", message ?? refused);
  $("key-form").hidden = false;
  $("key").focus();
}

async function start(withMicrophone) {
  hideProblem();
  try {
    await conversation.start(key, withMicrophone);
  } catch (error) {
    conversation.stop();
    problem("failed");
    throw error;
  }
}

// What can be pressed.

for (const voice of VOICES) $("voice").append(new Option(voice, voice));
$("settings").open = matchMedia("(min-width: 60rem)").matches;

$("start").addEventListener("click", () => {
  if (conversation.link === "off") start(true);
  else conversation.stop();
});

$("mute").addEventListener("click", () => {
  if (conversation.microphone === "off") conversation.openMicrophone();
  else conversation.mute(conversation.microphone === "on");
});

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  $("key").value = "";
  $("key-form").hidden = true;
  start(true);
});

$("compose").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text) return;
  $("text").value = "";
  if (conversation.link === "off") start(false);
  conversation.say(text);
});

$("notice-close").addEventListener("click", hideProblem);

$("push-to-talk").addEventListener("click", (event) => {
  conversation.setPushToTalk(event.target.checked);
  // After a mouse click Space is for talking, not for this switch.
  if (event.detail > 0) event.target.blur();
});

for (const id of ["voice", "speed", "instructions"]) {
  $(id).addEventListener("change", () => conversation.settingsChanged());
}
$("speed").addEventListener("input", () => {
  $("speed-value").textContent = `${Number($("speed").value).toFixed(1)}×`;
});

const hold = $("hold");
hold.addEventListener("pointerdown", (event) => {
  hold.setPointerCapture(event.pointerId);
  conversation.beginTalk();
});
for (const end of ["pointerup", "pointercancel", "lostpointercapture"]) {
  hold.addEventListener(end, () => conversation.endTalk());
}
hold.addEventListener("contextmenu", (event) => event.preventDefault());

/** Whether Space has a meaning of its own where the focus is. */
function takesSpace(target) {
  return target !== hold && target.closest("input, textarea, select, button, summary") !== null;
}

addEventListener("keydown", (event) => {
  if (event.code !== "Space" || !conversation.pushToTalk || takesSpace(event.target)) return;
  event.preventDefault();
  if (!event.repeat) conversation.beginTalk();
});
addEventListener("keyup", (event) => {
  if (event.code === "Space") conversation.endTalk();
});
addEventListener("blur", () => conversation.endTalk());
addEventListener("pagehide", () => conversation.stop());

/** Read-only, for tests and the curious. */
window.parley = Object.freeze({
  status: () => ({
    state: conversation.state,
    link: conversation.link,
    microphone: conversation.microphone,
    answers_s: [...conversation.answers_s],
    underruns: conversation.underruns,
    ...conversation.counts,
  }),
});

show();
