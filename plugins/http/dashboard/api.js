/** Requests with the tab's token: kept in sessionStorage, renewed before it ends, and told of where it is refused. */

const KEPT = "cco-token";
let token = null;
let renewal = 0;
let refused = () => {};

/** What the service, or the way to it, answered. `status` is 0 where nothing answered at all. */
export class ApiError extends Error {
  constructor(status, body) {
    super(body?.message ?? (status ? `The service answered ${status}` : "The service does not answer"));
    this.status = status;
    this.code = body?.code ?? "";
    this.details = body?.details ?? {};
    this.requestId = body?.request_id ?? "";
  }
}

/** A number that a double cannot hold, as the text that came. */
export class ExactNumber {
  constructor(source) {
    this.source = source;
  }
  toString() {
    return this.source;
  }
  toJSON() {
    return this.source;
  }
}

function revive(_key, value, context) {
  const inexact =
    typeof value === "number" &&
    context?.source &&
    (!Number.isFinite(value) || (Number.isInteger(value) && !Number.isSafeInteger(value)));
  return inexact ? new ExactNumber(context.source) : value;
}

export const parse = (text) => JSON.parse(text, revive);

export const hasToken = () => token !== null;

/** @param {() => void} listener  called when the token is refused */
export function onRefusal(listener) {
  refused = listener;
}

export function readToken() {
  take(sessionStorage.getItem(KEPT));
}

/** @param {string | null} fresh */
export function take(fresh) {
  token = fresh;
  clearTimeout(renewal);
  if (!fresh) return sessionStorage.removeItem(KEPT);
  sessionStorage.setItem(KEPT, fresh);
  const left = endOf(fresh) - Date.now();
  renewal = setTimeout(renew, Math.min(Math.max(left - 240_000, left / 2), 2 ** 31 - 1));
}

function endOf(fresh) {
  try {
    const claims = fresh.split(".")[1].replaceAll("-", "+").replaceAll("_", "/");
    return JSON.parse(atob(claims)).exp * 1000;
  } catch {
    return Date.now() + 600_000; // no token of ours: the service will say so
  }
}

async function renew() {
  try {
    take((await post("/api/auth/refresh")).token);
  } catch (error) {
    if (error.status !== 401) renewal = setTimeout(renew, 15_000);
  }
}

/** The answer's JSON. @returns {Promise<any>} */
export async function call(method, path, { body, signal, headers } = {}) {
  const answer = await send(method, path, { body, signal, headers });
  const text = await answer.text().catch((error) => {
    throw error.name === "AbortError" ? error : new ApiError(0, null); // cut off halfway
  });
  return text ? parse(text) : null;
}

/** The answer itself, which is a good one. Raises ApiError. @returns {Promise<Response>} */
export async function send(method, path, { body, signal, headers } = {}) {
  const sent = { ...headers };
  const used = token;
  if (used) sent.Authorization ??= `Bearer ${used}`;
  if (body !== undefined) sent["Content-Type"] = "application/json";
  const options = {
    method,
    signal,
    headers: sent,
    body: body === undefined ? undefined : JSON.stringify(body),
    cache: "no-store",
    credentials: "omit",
    redirect: "error",
  };
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, null);
  }
  const fresh = answer.headers.get("X-Refreshed-Token");
  if (fresh && used === token) take(fresh);
  if (answer.ok) return answer;
  const problem = new ApiError(answer.status, await answer.json().catch(() => null));
  if (answer.status === 401 && used && used === token) {
    take(null);
    refused();
  }
  throw problem;
}

export const get = (path, query, signal) => call("GET", path + asQuery(query), { signal });
export const post = (path, body, headers) => call("POST", path, { body, headers });
export const remove = (path) => call("DELETE", path);

function asQuery(query) {
  const given = Object.entries(query ?? {}).filter(
    ([, value]) => value !== undefined && value !== null && value !== "",
  );
  return given.length ? `?${new URLSearchParams(given)}` : "";
}

/** A tab that a link of this page has opened asks the others for the token. It is gone with the last of them. */
const tabs = new BroadcastChannel(KEPT);
const ANSWER_MS = 300;

tabs.addEventListener("message", ({ data }) => {
  if (data.asked && token) tabs.postMessage({ token });
});

/** Whether another tab of this page had a token, which is now ours too. @returns {Promise<boolean>} */
export async function askOtherTabs() {
  const told = new Promise((resolve) => {
    tabs.addEventListener("message", ({ data }) => data.token && resolve(data.token));
    setTimeout(() => resolve(null), ANSWER_MS);
  });
  tabs.postMessage({ asked: true });
  const theirs = await told;
  if (theirs && !token) take(theirs);
  return token !== null;
}

/** A key for a request that may come twice. Only pages of a secure origin have `crypto.randomUUID`. */
export const newKey = () => crypto.getRandomValues(new Uint32Array(4)).join("-");

/** A part of a path. */
export const part = encodeURIComponent;

/** Trades a code, or takes a token that the service knows. Raises ApiError. */
export async function signIn(given) {
  const text = given.trim().replace(/^.*#code=/, "");
  if (/^[\w-]+\.[\w-]+\.[\w-]+$/.test(text)) {
    await call("GET", "/api/dashboard", { headers: { Authorization: `Bearer ${text}` } });
    take(text);
  } else take((await post("/api/dashboard/token", { code: text })).token);
}
