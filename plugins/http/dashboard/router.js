/** Hash routes: `#/issues/ID`. What stands in the address is decoded here, and nowhere else. */

/** @type {Array<[RegExp, string]>} */
const ROUTES = [
  [/^\/?$/, "issues"],
  [/^\/issues$/, "issues"],
  [/^\/issues\/([^/]+)$/, "issue"],
  [/^\/agents$/, "agents"],
  [/^\/agents\/([^/]+)$/, "agent"],
  [/^\/results$/, "results"],
  [/^\/results\/([^/]+)$/, "result"],
  [/^\/events$/, "events"],
  [/^\/approvals$/, "approvals"],
  [/^\/health$/, "health"],
];

/** @returns {{name: string, id: string, query: URLSearchParams}} */
export function route(hash = location.hash) {
  const [path, query] = hash.replace(/^#/, "").split("?");
  for (const [form, name] of ROUTES) {
    const found = form.exec(path);
    if (found) return { name, id: decoded(found[1] ?? ""), query: new URLSearchParams(query) };
  }
  return { name: "lost", id: path, query: new URLSearchParams() };
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

export const to = (name, id) => `#/${name}${id ? `/${encodeURIComponent(id)}` : ""}`;

/** The code that `cco dashboard` put into the address, which is taken off it at once. */
export function takeCode() {
  const found = /^#code=(.+)$/.exec(location.hash);
  if (!found) return null;
  history.replaceState(null, "", `${location.pathname}#/issues`);
  return decoded(found[1]);
}
