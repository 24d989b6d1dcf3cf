/**
 * The live view's way to its page.
 *
 * @module
 */

import { DASH } from "./live-text.js";

/** @param {string} id */
export const el = (id) => /** @type {HTMLElement} */ (document.getElementById(id));

/**
 * @param {string} name
 * @param {Record<string, string>} [attributes]
 * @param {(string | Node)[]} children
 */
export function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** Touches the page only where something has changed. @param {Element} element @param {string} text */
export function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** @param {Element} element @param {[string, string]} figure value and unit */
export function figure(element, [value, unit]) {
  if (element.textContent === value + unit) return;
  element.replaceChildren(value, ...(unit ? [make("small", {}, unit)] : []));
  element.toggleAttribute("data-empty", value === DASH);
}
