/** Numbers, times and foreign text as a person reads them. Everything is pure. */

const number = new Intl.NumberFormat();
const short = new Intl.NumberFormat(undefined, { notation: "compact", maximumFractionDigits: 1 });
const money = new Intl.NumberFormat(undefined, { style: "currency", currency: "USD", currencyDisplay: "narrowSymbol" });
const cents = new Intl.NumberFormat(undefined, {
  style: "currency",
  currency: "USD",
  currencyDisplay: "narrowSymbol",
  maximumFractionDigits: 4,
});
const ago = new Intl.RelativeTimeFormat(undefined, { numeric: "auto", style: "short" });
const exactTime = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "long" });
const clock = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const day = new Intl.DateTimeFormat(undefined, { month: "short", day: "numeric" });

const SECOND = 1000;
const STEPS = [
  ["second", SECOND],
  ["minute", 60 * SECOND],
  ["hour", 3600 * SECOND],
  ["day", 86400 * SECOND],
];

export const count = (value) => (value === null || value === undefined ? "–" : number.format(Number(value)));
export const compact = (value) => (value === null || value === undefined ? "–" : short.format(Number(value)));
export const cost = (usd) =>
  usd === null || usd === undefined ? "–" : (usd > 0 && usd < 0.1 ? cents : money).format(Number(usd));
export const plural = (value, one, many = `${one}s`) => `${count(value)} ${value === 1 ? one : many}`;

/** "1.4 MB". */
export function bytes(value) {
  if (value === null || value === undefined) return "–";
  let rest = Number(value),
    unit = 0;
  while (rest >= 1000 && unit < 4) [rest, unit] = [rest / 1000, unit + 1];
  return `${unit && rest < 10 ? rest.toFixed(1) : Math.round(rest)} ${["B", "kB", "MB", "GB", "TB"][unit]}`;
}

/** "3 min. ago", in the reader's language. */
export function relative(moment, now = Date.now()) {
  const passed = Date.parse(moment) - now;
  if (Number.isNaN(passed)) return "–";
  if (Math.abs(passed) < 5 * SECOND) return "now";
  const [unit, size] = STEPS.findLast(([, size]) => Math.abs(passed) >= size) ?? STEPS[0];
  return ago.format(Math.round(passed / size), unit);
}

/** The whole moment in the reader's zone. */
export const exact = (moment) =>
  Number.isNaN(Date.parse(moment)) ? String(moment) : exactTime.format(new Date(moment));

/** The time of the day, with the date where it is another day. */
export function time(moment, now = new Date()) {
  const at = new Date(moment);
  if (Number.isNaN(at.valueOf())) return "–";
  return at.toDateString() === now.toDateString() ? clock.format(at) : `${day.format(at)}, ${clock.format(at)}`;
}

/** "2 min 5 s". What is known in whole seconds is shown in whole seconds. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined || Number.isNaN(seconds)) return "–";
  if (seconds < 10) return `${Math.max(0, seconds).toFixed(Number.isInteger(seconds) ? 0 : 1)} s`;
  const whole = Math.round(seconds);
  const parts = [
    [Math.floor(whole / 86400), "d"],
    [Math.floor(whole / 3600) % 24, "h"],
    [Math.floor(whole / 60) % 60, "min"],
    [whole % 60, "s"],
  ];
  const first = parts.findIndex(([value]) => value);
  return parts
    .slice(first, first + 2)
    .filter(([value]) => value)
    .map((part) => part.join(" "))
    .join(" ");
}

const SIGNALS = { 1: "SIGHUP", 2: "SIGINT", 6: "SIGABRT", 9: "SIGKILL", 11: "SIGSEGV", 15: "SIGTERM" };

/** The name of a signal, where it is one that is often seen. */
export const signalName = (number) => (number ? (SIGNALS[number] ?? `signal ${number}`) : null);

/** Whole seconds: the service's times have no more. */
export const between = (from, to) =>
  Math.floor((Date.parse(to ?? new Date().toISOString()) - Date.parse(from)) / SECOND);

// Control characters, direction overrides and what is invisible: shown by their names, as they change what is read.
// The joiners U+200C and U+200D and the variation selectors are left, as scripts and emoji need them.
const UNSEEN = new RegExp(
  String.raw`[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b]` +
    String.raw`|[\u200e\u200f\u2028-\u202e\u2060-\u206f\u2800\u3164\ufeff\uffa0\ufff9-\ufffb]|[\u{e0000}-\u{e007f}]`,
  "gu",
);

/** Any JSON value in one line: an object may have fields that its own `toString` stumbles over. */
export const oneLine = (value) => (typeof value === "object" && value ? JSON.stringify(value) : String(value ?? ""));

/** Text in which nothing hides. */
export function visible(text) {
  return text.replace(UNSEEN, (sign) => named(sign.codePointAt(0)));
}

function named(code) {
  if (code === 13) return "␍";
  if (code < 32) return String.fromCharCode(0x2400 + code);
  if (code === 127) return "␡";
  return `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
}

/** The beginning of a long text, and how much was left out. */
export function cut(text, length) {
  return text.length > length ? `${text.slice(0, length)}…` : text;
}

/** "python-specialist" out of "python-specialist-8f0c2d6b1a3e", beside the end by which two are told apart. */
export function shortId(id) {
  const found = /^(.+)-([0-9a-f]{8,})$/.exec(id);
  return found ? `${found[1]}·${found[2].slice(0, 4)}` : id;
}
