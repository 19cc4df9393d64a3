/** Line icons of 24 units, as paths. */
import { h } from "./dom.js";

const PATHS = {
  issues: "M5 4v16M5 8c0 4 14 2 14 8v4M5 4a1 1 0 1 0 .01 0M19 20a1 1 0 1 0 .01 0",
  agents:
    "M7 8h10a2 2 0 0 1 2 2v7a2 2 0 0 1-2 2H7a2 2 0 0 1-2-2v-7a2 2 0 0 1 2-2zM12 8V4" +
    "M9.5 13v1M14.5 13v1M2.5 13v2M21.5 13v2",
  results: "M7 3h7l5 5v13H7zM14 3v5h5M10 14l2 2 4-4",
  events: "M3 12h4l3-8 4 16 3-8h4",
  approvals: "M4 5h16v11H9l-5 4zM9 10.5l2 2 4-4",
  health: "M12 20s-8-4.6-8-11a4.5 4.5 0 0 1 8-2.8A4.5 4.5 0 0 1 20 9c0 6.400-8 11-8 11z",
  theme: "M12 3a9 9 0 1 0 0 18zM12 3a9 9 0 0 1 0 18",
  keys: "M3 7h18v10H3zM7 11h.01M11 11h.01M15 11h.01M8 14h8",
  play: "M7 5l12 7-12 7z",
  stop: "M7 7h10v10H7z",
  plus: "M12 5v14M5 12h14",
  export: "M12 4v11M8 11l4 4 4-4M5 20h14",
  send: "M4 12l16-8-5 16-4-6z",
  back: "M14 6l-6 6 6 6",
  more: "M10 6l6 6-6 6",
  close: "M6 6l12 12M18 6L6 18",
  pause: "M9 6v12M15 6v12",
  spawned: "M12 5v14M5 12h14",
  event: "M12 8a4 4 0 1 0 .01 0",
  result: "M5 12l5 5 9-10",
  routing: "M4 12h9M13 12c4 0 3-6 7-6M13 12c4 0 3 6 7 6",
  approval: "M12 16v.01M12 13c0-2 3-2.500 3-5a3 3 0 0 0-6-.5",
  ended: "M7 7h10v10H7z",
};

/** @param {string} name */
export const icon = (name) =>
  h(
    "svg.icon",
    { viewBox: "0 0 24 24", "aria-hidden": "true", focusable: "false" },
    h("path", { d: PATHS[name] ?? PATHS.event }),
  );
