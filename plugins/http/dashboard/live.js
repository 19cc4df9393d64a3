/**
 * One long poll for everything that happens, handed on in order and without a gap.
 *
 * It goes on from its cursor after a break of any length. While the tab is hidden it rests, and catches up after that.
 * Where the cursor is no longer known (410), all is loaded anew.
 */
import { get } from "./api.js";

const POLL_MS = 25_000;
const PATIENCE = [500, 1000, 2000, 4000, 8000, 10_000];
const STALE_MS = 60_000; // hidden for longer than this: the poll is given up

export const live = {
  /** @type {"starting" | "live" | "resting" | "lost" | "ended"} */
  state: "starting",
  /** @type {any} why it is lost */ reason: null,
  cursor: "",
};

let take = async () => {};
let anew = async () => {};
let changed = () => {};
let running = null;
let wake = () => {};

/**
 * @param {(events: any[]) => void} onEvents
 * @param {() => Promise<void>} onAnew  load everything; the cursor is of before
 * @param {() => void} onState
 */
export function start(onEvents, onAnew, onState) {
  [take, anew, changed] = [onEvents, onAnew, onState];
  stop();
  running = new AbortController();
  run(running.signal);
}

export function stop() {
  running?.abort();
  running = null;
}

export function tryNow() {
  wake();
}

function become(state) {
  if (live.state === state) return;
  live.state = state;
  changed();
}

async function run(signal) {
  let failures = 0;
  let fresh = true;
  let rested = false;
  while (!signal.aborted) {
    try {
      rested ||= document.hidden;
      if (document.hidden) await visibleAgain(signal);
      if (fresh) await begin(signal);
      fresh = false;
      const recovered = failures > 0;
      const answer = await poll(signal, recovered || rested ? 0 : POLL_MS);
      failures = 0;
      rested = false;
      if (recovered) await anew();
      live.cursor = answer.next_cursor ?? answer.scanned_to;
      become("live");
      if (answer.events.length) take(answer.events);
    } catch (error) {
      if (signal.aborted) return;
      if (error.name === "AbortError") continue; // the tab was hidden
      if (error.status === 401) return become("ended");
      if (error.status === 410) {
        fresh = true;
        continue;
      }
      await lost(failures++, error, signal);
    }
  }
}

/** The cursor first, then the lists: what happens in between comes twice rather than never. */
async function begin(signal) {
  const answer = await get("/api/events/wait/*", { since: "latest", timeout: 0 }, signal);
  live.cursor = answer.scanned_to;
  await anew();
  become("live");
}

async function poll(signal, timeout) {
  const one = new AbortController();
  const end = () => one.abort();
  let late = 0;
  const hidden = () => {
    clearTimeout(late);
    if (document.hidden) late = setTimeout(end, STALE_MS);
  };
  signal.addEventListener("abort", end);
  document.addEventListener("visibilitychange", hidden);
  // A service that hangs, or a machine that slept: the connection is gone, and nobody says so.
  const overdue = setTimeout(() => one.abort(new Error("overdue")), timeout + 20_000);
  try {
    return await get("/api/events/wait/*", { since: live.cursor, timeout, limit: 500 }, one.signal);
  } finally {
    clearTimeout(overdue);
    clearTimeout(late);
    signal.removeEventListener("abort", end);
    document.removeEventListener("visibilitychange", hidden);
  }
}

function visibleAgain(signal) {
  become("resting");
  return new Promise((resolve) => {
    const look = () => {
      if (document.hidden && !signal.aborted) return;
      document.removeEventListener("visibilitychange", look);
      resolve();
    };
    document.addEventListener("visibilitychange", look);
    signal.addEventListener("abort", look, { once: true });
  });
}

async function lost(failures, error, signal) {
  const pause = PATIENCE[Math.min(failures, PATIENCE.length - 1)] * (0.8 + 0.4 * Math.random());
  live.reason = error;
  live.state = "lost";
  changed();
  await new Promise((resolve) => {
    wake = resolve;
    setTimeout(resolve, pause);
    signal.addEventListener("abort", resolve, { once: true });
  });
}
