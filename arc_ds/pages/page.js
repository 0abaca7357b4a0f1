"use strict";
// What acts on a click acts on Enter and Space too.
const onAct = (each, act) => {
  each.tabIndex = 0;
  each.addEventListener("click", act);
  each.addEventListener("keydown", (event) => {
    if (event.target !== each || (event.key !== "Enter" && event.key !== " ")) return;
    event.preventDefault();
    act();
  });
};
// Sorting by a column's head. Numbers stand in data-v.
document.querySelectorAll("table.sortable th").forEach((th) => onAct(th, () => {
  const body = th.closest("table").tBodies[0], at = th.cellIndex;
  const down = th.getAttribute("aria-sort") === "ascending";
  th.parentNode.querySelectorAll("th").forEach((each) => each.removeAttribute("aria-sort"));
  th.setAttribute("aria-sort", down ? "descending" : "ascending");
  const key = (row) => { const cell = row.cells[at], v = cell.dataset.v; return v === undefined ? cell.textContent : +v; };
  const empty = (k) => k === "–" || Number.isNaN(k);
  const order = (a, b) => {
    const x = key(a), y = key(b);
    if (empty(x) || empty(y)) return empty(x) - empty(y);
    const less = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y), "en", { numeric: true });
    return down ? -less : less;
  };
  [...body.rows].sort(order).forEach((row) => body.append(row));
}));
// A printed page shows what is folded.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((each) => { each.open = true; }));
