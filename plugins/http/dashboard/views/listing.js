/** What the views of lists share: a list of the store with a filter and a choice, and what stands in its place. */
import { h, slot } from "../dom.js";
import { VirtualList } from "../list.js";
import { awaited, empty, filterField } from "../parts.js";
import { older, store } from "../store.js";

/**
 * A view of the list `name` of the store. `now` is what is filtered by; `top` and `choice` get it, and a function that
 * changes it.
 * @param {object} how
 * @param {string} how.title
 * @param {string} how.name
 * @param {() => void} how.draw
 * @param {{filter: string}} how.now
 * @param {(item: object) => string} how.key
 * @param {(item: object) => Node} how.row
 * @param {(now: object) => object[]} how.chosen
 * @param {(now: object, set: (change: object) => void) => any[]} how.top
 * @param {(now: object, set: (change: object) => void) => any} how.choice
 * @param {(list: VirtualList, items: object[]) => any} how.body
 */
export function listView({ title, name, draw, now, key, row, chosen, top, choice, body }) {
  const list = new VirtualList({ label: title, key, row, estimate: 74, atEnd: older(name) });
  const set = (change) => {
    Object.assign(now, change);
    draw();
  };
  const filter = () => filterField(now.filter, (words) => set({ filter: words }), `Filter ${name}`);
  return {
    title,
    list,
    stop: () => list.detach(),
    drawn: () => list.set(chosen(now)),
    render: () => [
      ...top(now, set),
      h("div.tools", { key: "tools" }, filter(), choice(now, set)),
      body(list, chosen(now)),
    ],
  };
}

/** The rows; what `nothing` gives where the store has none, and `none` where none fits the filter. */
export function listBody({ name, list, items, nothing, none, kind = "" }) {
  if (!(store[name].size ?? store[name].length)) return store.loaded.has(name) ? nothing() : awaited(name);
  if (!items.length) return empty("None fits", none);
  return h(`div.rows${kind}`, { key: "rows" }, slot(list.element));
}
