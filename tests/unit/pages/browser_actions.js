// Acts on both pages as a user does, and writes the findings into the harness, which the browser then prints.
var found = { errors: [] };
const column = (table, at) => [...table.tBodies[0].rows].map((row) => row.cells[at].textContent);
const shown = (elements) => [...elements].filter((each) => each.offsetParent);
const act = (frame) => {
  const page = frame.contentDocument, view = frame.contentWindow, one = (what) => page.querySelector(what);
  const press = (each, key) => each.dispatchEvent(new view.KeyboardEvent("keydown", { key, bubbles: true }));
  const enter = (each, value, event) => { each.value = value; each.dispatchEvent(new view.Event(event)); };
  const here = found[frame.id] = {
    requests: view.performance.getEntriesByType("resource").length,
    sideways: page.documentElement.scrollWidth - view.innerWidth,
  };
  const table = one("table"), heads = table.tHead.rows[0].cells;
  here.first_column = heads[0].offsetWidth;
  heads[1].click();
  here.up = column(table, 1);
  press(heads[1], "Enter");
  here.down = column(table, 1);
  press(heads[0], " ");
  here.names = column(table, 0);
  if (frame.id === "report") {
    here.all = one("#shown").textContent;
    enter(one("select[data-by=who]"), "1", "change");
    here.better = [one("#shown").textContent, shown(page.querySelectorAll("article")).length];
    return;
  }
  const row = one("table tr[data-g='3']"), line = one("figure .line[data-g='3']");
  here.stops = [...page.querySelectorAll("tr[data-g]")].filter((each) => each.tabIndex === 0).length;
  press(row, "Enter");
  here.pinned = [row.className, line.classList.contains("pin"), one(".legend [data-g='3']").ariaPressed];
  row.click();
  here.unpinned = page.body.classList.contains("pinned");
  const box = one("figure svg").getBoundingClientRect();
  const [x, y] = one("figure .line").getAttribute("d").slice(1).split("L")[9].split(" ");
  const place = { clientX: box.left + x * box.width / 430, clientY: box.top + y * box.height / 236 };
  one("figure svg").dispatchEvent(new view.MouseEvent("mousemove", place));
  here.tip = one("#tip").textContent;
  enter(one("#filter"), "GRAD", "input");
  here.plots = shown(page.querySelectorAll("figcaption")).map((each) => each.firstChild.data);
};
addEventListener("load", () => {
  try {
    document.querySelectorAll("iframe").forEach(act);
  } catch (error) {
    found.errors.push(error.stack);
  }
  document.getElementById("found").textContent = JSON.stringify(found);
});
