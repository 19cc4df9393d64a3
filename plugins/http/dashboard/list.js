/**
 * A list of any length of which only the rows in sight are in the document.
 *
 * Rows may have any height: it is guessed, then measured. What the reader looks at stays where it is while rows come,
 * go and unfold above it. To screen readers it is a list with all its items (aria-setsize, aria-posinset); one row can
 * be reached by Tab, the others from there by arrows, j and k.
 */
import { h, owned, patch } from "./dom.js";

const OVERSCAN = 600; // pixels above and below
const MOST = 150; // rows, however low they are

const left = new Map(); // the row that had the focus, by the list's label: a list that comes again begins there

export class VirtualList {
  /**
   * @param {object} how
   * @param {string} how.label  for screen readers
   * @param {(item: any) => string} how.key
   * @param {(item: any, index: number) => HTMLElement} how.row  its element that takes the focus has `data-focus`
   * @param {number} [how.estimate]  of a row's height
   * @param {() => void} [how.atEnd]  the last rows are in sight
   */
  constructor({ label, key, row, estimate = 56, atEnd = () => {} }) {
    Object.assign(this, { label, key, row, estimate, atEnd });
    this.items = [];
    this.heights = new Map();
    this.tops = [0];
    this.index = new Map();
    this.shown = new Map();
    this.active = 0;
    this.element = owned(h("div.list", { role: "list", "aria-label": label }));
    this.sizes = new ResizeObserver((entries) => this.measured(entries));
    this.draw = this.draw.bind(this);
  }

  /** Begins once the element stands in the document, inside of `main`. */
  begin() {
    this.scroller = this.element.closest("main");
    if (!this.scroller) return;
    this.scroller.addEventListener("scroll", this.draw, { passive: true });
    this.element.addEventListener("focusin", (event) => this.focused(event));
    this.element.addEventListener("keydown", (event) => this.pressed(event));
    this.resized = new ResizeObserver(() => this.draw());
    this.resized.observe(this.scroller);
  }

  detach() {
    this.scroller?.removeEventListener("scroll", this.draw);
    this.resized?.disconnect();
    this.sizes.disconnect();
  }

  /** @param {any[]} items */
  set(items) {
    if (!this.scroller) this.begin();
    const anchor = this.anchor();
    const holder = this.items[this.active] ? this.key(this.items[this.active]) : left.get(this.label);
    this.items = items;
    this.index = new Map(items.map((item, number) => [this.key(item), number]));
    this.active = Math.min(this.index.get(holder) ?? 0, Math.max(0, items.length - 1));
    this.lay();
    this.keep(anchor);
    this.draw();
  }

  lay() {
    const tops = new Array(this.items.length + 1);
    tops[0] = 0;
    this.items.forEach((item, number) => {
      tops[number + 1] = tops[number] + (this.heights.get(this.key(item)) ?? this.estimate);
    });
    this.tops = tops;
    this.element.style.height = `${tops.at(-1)}px`;
  }

  /** How far the list's beginning lies above the upper edge of what is in sight. */
  offset() {
    return this.scroller.getBoundingClientRect().top - this.element.getBoundingClientRect().top;
  }

  /** The row at the upper edge, and how much of it is above. None while the beginning is in sight: news are shown. */
  anchor() {
    if (!this.scroller) return null;
    const top = this.offset();
    if (top <= 0 || !this.items.length) return null;
    const number = this.at(top);
    return { key: this.key(this.items[number]), over: top - this.tops[number] };
  }

  keep(anchor) {
    const number = anchor && this.index.get(anchor.key);
    if (number === null || number === undefined) return;
    const off = this.tops[number] + anchor.over - this.offset();
    if (Math.abs(off) > 0.5) this.scroller.scrollTop += off;
  }

  /** The number of the row that covers a height. */
  at(height) {
    let [low, high] = [0, this.items.length - 1];
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (this.tops[middle] <= height) low = middle;
      else high = middle - 1;
    }
    return Math.max(0, low);
  }

  draw() {
    if (!this.scroller) return;
    const top = this.offset();
    const first = this.at(Math.max(0, top - OVERSCAN));
    const last = Math.min(this.at(top + this.scroller.clientHeight + OVERSCAN), first + MOST - 1);
    const wanted = new Set();
    for (let number = first; number <= last && number < this.items.length; number++) wanted.add(number);
    const held = this.holder();
    if (held !== undefined)
      wanted.add(held); // its row has the focus
    else if (this.items.length) wanted.add(this.active);
    this.show([...wanted].sort((one, other) => one - other));
    if (last >= this.items.length - 1) this.atEnd();
  }

  holder() {
    const row = document.activeElement?.closest?.("[role=listitem]");
    return row && this.element.contains(row) ? this.index.get(row.$key) : undefined;
  }

  show(numbers) {
    const keys = new Set(numbers.map((number) => this.key(this.items[number])));
    for (const [key, row] of this.shown) if (!keys.has(key)) this.drop(key, row);
    let before = null;
    for (const number of numbers) {
      const row = this.put(this.items[number], number);
      const place = before ? before.nextSibling : this.element.firstChild;
      if (row !== place) this.element.insertBefore(row, place);
      row.style.transform = `translateY(${this.tops[number]}px)`;
      before = row;
    }
  }

  /** One item that cannot be drawn leaves the others alone. */
  drawn(item, number) {
    try {
      return this.row(item, number);
    } catch (error) {
      console.error(error);
      return h("p.problem", { "data-focus": true }, `This row cannot be drawn: ${error.message}`);
    }
  }

  drop(key, row) {
    this.sizes.unobserve(row);
    row.remove();
    this.shown.delete(key);
  }

  put(item, number) {
    const key = this.key(item);
    const wanted = h(
      "div.item",
      { key, role: "listitem", "aria-setsize": this.items.length, "aria-posinset": number + 1 },
      this.drawn(item, number),
    );
    const focus = wanted.querySelector("[data-focus]");
    focus?.setAttribute("tabindex", number === this.active ? "0" : "-1");
    let row = this.shown.get(key);
    if (row) return patch(row, wanted);
    row = wanted;
    this.shown.set(key, row);
    this.sizes.observe(row);
    return row;
  }

  measured(entries) {
    const anchor = this.anchor();
    let differs = false;
    for (const { target, borderBoxSize } of entries) {
      const height = borderBoxSize[0].blockSize;
      if (!height || this.heights.get(target.$key) === height) continue;
      this.heights.set(target.$key, height);
      differs = true;
    }
    if (!differs) return;
    this.lay();
    this.keep(anchor);
    this.draw();
  }

  focused(event) {
    const row = event.target.closest("[role=listitem]");
    const number = row && this.index.get(row.$key);
    if (number === undefined || number === null) return;
    left.set(this.label, row.$key);
    if (number === this.active) return;
    this.active = number;
    this.draw();
  }

  pressed(event) {
    const steps = { ArrowDown: 1, ArrowUp: -1, Home: -Infinity, End: Infinity, PageDown: 10, PageUp: -10 };
    if (!(event.key in steps) || event.target.matches("input, textarea, select, pre")) return;
    if (!event.target.closest("[data-focus]")) return;
    event.preventDefault();
    this.move(steps[event.key]);
  }

  /** Takes the focus to another row. */
  move(step) {
    if (!this.items.length) return;
    const from = this.holder() === undefined && Math.abs(step) === 1 ? this.active - step : this.active;
    this.active = Math.max(0, Math.min(this.items.length - 1, from + step));
    this.reveal(this.active);
    this.shown.get(this.key(this.items[this.active]))?.querySelector("[data-focus]")?.focus({ preventScroll: true });
  }

  reveal(number) {
    const top = this.offset();
    const [from, to] = [this.tops[number], this.tops[number + 1]];
    const height = this.scroller.clientHeight;
    if (from < top + 60) this.scroller.scrollTop += from - top - 60;
    else if (to > top + height - 60) this.scroller.scrollTop += to - top - height + 60;
    this.draw();
  }
}
