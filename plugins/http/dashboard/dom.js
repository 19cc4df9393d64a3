/**
 * Elements, and how one tree becomes another. Everything from outside becomes text nodes: nothing here parses markup.
 *
 * A view gives a new tree at each change; `patch` makes the old one like it in place, so that focus, selection, scroll
 * and what a reader has unfolded stay.
 */
import { oneLine, visible } from "./format.js";

/** @typedef {Node | string | number | null | undefined | false | Child[]} Child */

const SVG = "http://www.w3.org/2000/svg";
const DRAWN = new Set(["svg", "path", "circle", "rect", "g"]);
const PROPERTIES = new Set(["value", "checked", "disabled", "hidden", "open", "selected", "multiple", "required"]);

/**
 * An element: `h("a.row", {href: "#/issues", onclick: open}, "text")`.
 * @param {string} name  tag and classes
 * @param {Object<string, any> | null} [attributes]  `key` tells siblings apart; `onNAME` is a listener
 * @param {...Child} children
 * @returns {any}
 */
export function h(name, attributes, ...children) {
  const [tag, ...classes] = name.split(".");
  const element = DRAWN.has(tag) ? document.createElementNS(SVG, tag) : document.createElement(tag || "div");
  if (classes.length) element.setAttribute("class", classes.join(" "));
  for (const [key, value] of Object.entries(attributes ?? {})) set(element, key, value);
  add(element, children);
  return element;
}

function set(element, name, value) {
  if (value === null || value === undefined || value === false) return;
  if (name === "key") element.$key = String(value);
  else if (name.startsWith("on")) listen(element, name.slice(2), value);
  else if (name === "class") element.classList.add(...String(value).split(" ").filter(Boolean));
  else if (name === "style") throw new Error("styles are classes");
  else if (name === "href") element.setAttribute("href", own(value));
  else if (PROPERTIES.has(name)) element[name] = value;
  else element.setAttribute(name, value === true ? "" : visible(oneLine(value)));
}

/** Links lead nowhere but into this page. */
function own(address) {
  if (/^(#|\/dashboard\/|blob:)/.test(address)) return address;
  throw new Error(`no link of this page: ${address}`);
}

function listen(element, type, listener) {
  element.$on ??= {};
  if (!(type in element.$on)) element.addEventListener(type, heard);
  element.$on[type] = listener;
}

function heard(event) {
  return event.currentTarget.$on[event.type]?.(event);
}

function add(element, children) {
  for (const child of children) {
    if (Array.isArray(child)) add(element, child);
    else if (child instanceof Node) element.append(child);
    else if (child !== null && child !== undefined && child !== false) element.append(visible(oneLine(child)));
  }
}

/** A place in a view's tree for an element that lives on by itself: a list, a log. */
export function slot(element) {
  const place = document.createElement("x-slot");
  place.$node = element;
  return place;
}

/** A tree with what belongs into its places. */
function whole(tree) {
  for (const place of tree.querySelectorAll?.("x-slot") ?? []) place.replaceWith(place.$node);
  return tree;
}

/** Makes what `parent` holds like `children`. */
export function fill(parent, ...children) {
  const wanted = document.createElement("div");
  add(wanted, children);
  patchChildren(parent, wanted);
}

/** Makes `old` like `wanted`, and gives the element that now stands there. */
export function patch(old, wanted) {
  if (wanted.$node) wanted = wanted.$node;
  if (old === wanted) return old;
  if (old.nodeType === Node.TEXT_NODE && wanted.nodeType === Node.TEXT_NODE) {
    if (old.data !== wanted.data) old.data = wanted.data;
    return old;
  }
  if (old.$own || wanted.$own || !alike(old, wanted)) {
    old.replaceWith(whole(wanted));
    return wanted;
  }
  patchAttributes(old, wanted);
  patchChildren(old, wanted);
  return old;
}

function alike(old, wanted) {
  return old.nodeName === wanted.nodeName && old.$key === wanted.$key;
}

function patchAttributes(old, wanted) {
  for (const { name } of [...old.attributes]) {
    if (!wanted.hasAttribute(name) && !(name === "open" && old.nodeName === "DETAILS")) old.removeAttribute(name);
  }
  for (const { name, value } of wanted.attributes) {
    if (old.getAttribute(name) !== value && !(name === "open" && old.nodeName === "DETAILS")) {
      old.setAttribute(name, value);
    }
  }
  if ("disabled" in old && old.disabled !== wanted.disabled) old.disabled = wanted.disabled;
  if (old.$on || wanted.$on) {
    for (const type of Object.keys(old.$on ?? {})) old.$on[type] = undefined;
    for (const [type, listener] of Object.entries(wanted.$on ?? {})) listen(old, type, listener);
  }
}

function patchChildren(old, wanted) {
  const keyed = new Map();
  for (const child of old.childNodes) if (child.$key !== undefined) keyed.set(child.$key, child);
  let place = old.firstChild;
  for (const next of [...wanted.childNodes]) {
    const target = next.$node ?? next;
    if (target.$source !== undefined && place?.$source === target.$source) {
      place = place.nextSibling; // the same text, which its reader may have unfolded
      continue;
    }
    const known = target.$own ? target : keyed.get(target.$key);
    if (known && known.parentNode === old) {
      if (known !== place) old.insertBefore(known, place);
      const there = patch(known, target);
      place = there.nextSibling;
    } else if (place && !target.$own && place.$key === undefined && !place.$own && target.$key === undefined) {
      const there = patch(place, target);
      place = there.nextSibling;
    } else {
      old.insertBefore(whole(target), place);
    }
  }
  while (place) {
    const next = place.nextSibling;
    place.remove();
    place = next;
  }
}

/** Marks an element as one that lives on by itself: `patch` leaves what it holds alone. */
export function owned(element) {
  element.$own = true;
  return element;
}
