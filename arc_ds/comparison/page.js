// Highlight: a click on a run in the legend or in a table.
const pins = new Set();
const drawPins = () => {
  document.body.classList.toggle("pinned", pins.size > 0);
  document.querySelectorAll("[data-g]").forEach((each) => {
    each.classList.toggle(each.tagName === "TR" ? "on" : "pin", pins.has(each.dataset.g));
    if (each.role === "button") each.setAttribute("aria-pressed", pins.has(each.dataset.g));
  });
};
document.querySelectorAll("tr[data-g], .legend [data-g]").forEach((each) => onAct(each, () => {
  const g = each.dataset.g;
  pins.has(g) ? pins.delete(g) : pins.add(g);
  drawPins();
}));
// The Tab key stops at the legend and at the first table alone: others repeat its rows.
[...document.querySelectorAll("table")].slice(1).forEach((table) => table.querySelectorAll("tr[data-g]").forEach((each) => { each.tabIndex = -1; }));
// Filter of the plots by the name of the metric.
const filter = document.getElementById("filter");
if (filter) filter.addEventListener("input", () => document.querySelectorAll("figure").forEach((each) => {
  each.classList.toggle("hide", !each.querySelector("figcaption").firstChild.data.toLowerCase().includes(filter.value.toLowerCase()));
}));
// Values under the pointer: the nearest drawn point.
const tip = document.body.appendChild(document.createElement("div")), cache = new WeakMap();
tip.id = "tip";
const pointsOf = (path) => {
  if (!cache.has(path)) cache.set(path, path.getAttribute("d").slice(1).replace(/h0/g, "").split(/[LM]/).map((p) => p.split(" ").map(Number)));
  return cache.get(path);
};
const show = (value) => (Math.abs(value) >= 1e6 || (value && Math.abs(value) < 1e-3) ? value.toExponential(3) : +value.toPrecision(6) + "");
// Places have a tenth of a pixel, so further digits would be wrong.
const rounded = (value, range, pixels) => {
  const unit = 10 ** Math.ceil(Math.log10(range / pixels / 10));
  return +(Math.round(value / unit) * unit).toPrecision(12);
};
document.querySelectorAll("figure svg").forEach((svg) => {
  svg.addEventListener("mouseleave", () => { tip.style.display = "none"; });
  svg.addEventListener("mousemove", (event) => {
    const box = svg.getBoundingClientRect(), [, , w, h] = svg.getAttribute("viewBox").split(" ").map(Number);
    const px = ((event.clientX - box.left) / box.width) * w, py = ((event.clientY - box.top) / box.height) * h;
    let best = null, distance = 900;
    svg.querySelectorAll("[data-l]").forEach((path) => {
      if (pins.size && !pins.has(path.dataset.g)) return;
      for (const [x, y] of pointsOf(path)) {
        const d = (x - px) ** 2 + (y - py) ** 2;
        if (d < distance) { distance = d; best = [path, x, y]; }
      }
    });
    if (!best) { tip.style.display = "none"; return; }
    const [path, x, y] = best, [x0, x1] = svg.dataset.x.split(",").map(Number), [y0, y1] = svg.dataset.y.split(",").map(Number);
    const [left, top, right, bottom] = svg.dataset.area.split(",").map(Number);
    const vx = rounded(x0 + ((x - left) / (right - left)) * (x1 - x0), x1 - x0, right - left);
    const vy = rounded(y1 - ((y - top) / (bottom - top)) * (y1 - y0), y1 - y0, bottom - top);
    tip.textContent = `${path.dataset.l}: ${show(svg.dataset.log === "1" ? +(10 ** vy).toPrecision(3) : vy)} at ${show(vx)}`;
    tip.style.display = "block";
    tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
    tip.style.top = event.clientY + 16 + "px";
  });
});
