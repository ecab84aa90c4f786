/** The lists of topics and sockets, and where their rows lead. */

import { create } from "./show.js";

export const topicHref = (name) => `#topics/${encodeURIComponent(name)}`;
export const socketHref = (id) => `#sockets/${encodeURIComponent(id)}`;

/** Fill a list, or say why it is empty: rows that were there stay, and with them the reader's focus. */
export function showRows(list, items, keyOf, hrefOf, cellsOf, chosen, empty) {
  if (!items.length) {
    list.replaceChildren(create("p", "nothing", empty));
    return;
  }
  const rows = new Map([...list.children].map((row) => [row.dataset.key, row]));
  const focused = list.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  const wanted = items.map((item) => {
    const key = keyOf(item);
    const row = rows.get(key) ?? create("a", "item");
    row.dataset.key = key;
    row.href = hrefOf(item);
    if (key === chosen) row.setAttribute("aria-current", "true");
    else row.removeAttribute("aria-current");
    row.replaceChildren(...cellsOf(item).map((text) => create("span", "", text)));
    return row;
  });
  const isSame = wanted.length === list.children.length && wanted.every((row, place) => row === list.children[place]);
  if (!isSame) list.replaceChildren(...wanted);
  if (focused !== null && !list.contains(document.activeElement)) {
    [...list.children].find((row) => row.dataset.key === focused)?.focus({ preventScroll: true });
  }
}

/** Links side by side; the same ones are left as they are, so that a click and the reader's focus outlive each look. */
export function showChips(list, links) {
  const key = JSON.stringify(links);
  if (list.dataset.key === key) return;
  list.dataset.key = key;
  list.replaceChildren(
    ...links.map(({ href, title, bold, text }) => {
      const link = create(href ? "a" : "span", "chip", ...(bold ? [create("b", "", bold), " "] : []), text);
      Object.assign(link, { href, title: title ?? "" });
      return link;
    }),
  );
}
