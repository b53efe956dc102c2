"use strict";
// Draw every figure when it comes near the screen; those inside a closed <details> wait until it is opened.
const draw = (plot) => {
  const source = document.querySelector(`script[data-for="${CSS.escape(plot.id)}"]`);
  const figure = JSON.parse(source.textContent);
  Plotly.newPlot(plot, figure.data, figure.layout, { responsive: true, displayModeBar: false });
};
const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries.filter((e) => e.isIntersecting)) {
    watcher.unobserve(entry.target);
    draw(entry.target);
  }
}, { rootMargin: "800px" });
document.querySelectorAll(".plot").forEach((plot) => watcher.observe(plot));

// Sort the rows of a table's first body by a column; empty values stay last in both directions.
const compareBy = (column, sign) => (a, b) => {
  const [x, y] = [a, b].map((row) => row.children[column].dataset.sort ?? "");
  if (x === "" || y === "") return (x === "") - (y === "");
  const [p, q] = [Number(x), Number(y)];
  return sign * (Number.isNaN(p) || Number.isNaN(q) ? x.localeCompare(y) : p - q);
};
document.querySelectorAll("table.sortable").forEach((table) => {
  const headings = [...table.querySelectorAll("thead th")];
  headings.forEach((heading, column) => heading.querySelector("button").addEventListener("click", () => {
    const first = heading.dataset.first ?? "ascending";
    const other = first === "ascending" ? "descending" : "ascending";
    const order = heading.getAttribute("aria-sort") === first ? other : first;
    headings.forEach((each) => each.setAttribute("aria-sort", each === heading ? order : "none"));
    const body = table.tBodies[0];
    body.append(...[...body.rows].sort(compareBy(column, order === "ascending" ? 1 : -1)));
  }));
});

// Filter: whatever shows one mechanism alone is hidden unless the mechanism matches.
const cards = new Map([...document.querySelectorAll(".card")].map((card) => [card.dataset.mixer, card]));
const filter = document.querySelector("#results .filter");
const applyFilter = () => {
  const wanted = Object.fromEntries(new FormData(filter));
  const text = wanted.text.trim().toLowerCase();
  let shown = 0;
  for (const [name, card] of cards) {
    const matches = name.toLowerCase().includes(text) && (!wanted.family || card.dataset.family === wanted.family)
      && (!wanted.flag || card.dataset.flags.split("|").includes(wanted.flag));
    shown += matches;
    document.querySelectorAll(`[data-mixer="${CSS.escape(name)}"]`).forEach((part) => { part.hidden = !matches; });
  }
  filter.querySelector("output").textContent = shown === cards.size ? "" : `${shown} of ${cards.size} shown`;
};
filter.addEventListener("input", applyFilter);
filter.addEventListener("submit", (event) => event.preventDefault());
filter.addEventListener("reset", () => setTimeout(applyFilter));

// Details of a mechanism beside its name, on hover and on keyboard focus; Escape closes them.
const tip = document.getElementById("tip");
const showTip = (link) => {
  const card = cards.get(link.closest("[data-mixer]").dataset.mixer);
  tip.replaceChildren(...[...card.querySelectorAll("h3, h3 + p, .flags")].map((part) => part.cloneNode(true)));
  tip.hidden = false;
  const place = link.getBoundingClientRect();
  const below = place.bottom + 8 + tip.offsetHeight < innerHeight;
  tip.style.left = `${Math.max(8, Math.min(place.left, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${below ? place.bottom + 8 : Math.max(8, place.top - tip.offsetHeight - 8)}px`;
};
document.querySelectorAll(".sortable tbody th a").forEach((link) => {
  link.setAttribute("aria-describedby", "tip");
  for (const on of ["mouseenter", "focus"]) link.addEventListener(on, () => showTip(link));
  for (const off of ["mouseleave", "blur"]) link.addEventListener(off, () => { tip.hidden = true; });
});
addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });

// Two mechanisms side by side, from the rows of the table of results.
const pair = document.querySelector("#pair .filter");
const headings = [...document.querySelectorAll(".sortable thead th")].map((heading) => ({
  title: heading.querySelector("button").firstChild.textContent, note: heading.querySelector("small")?.textContent ?? "",
  sign: heading.dataset.first === "descending" ? 1 : -1,
}));
const rowOf = (name) => document.querySelector(`.sortable tr[data-mixer="${CSS.escape(name)}"]`);
// Ranks such as 1–4 and 3–9 overlap: the tests cannot tell these two; what has no rank is a plain number.
const ranksApart = (...texts) => {
  const ranks = texts.map((text) => text.match(/rank (\d+)(?:–(\d+))?/)).filter(Boolean);
  if (ranks.length < 2) return true;
  const [[p, q], [r, s]] = ranks.map((found) => [Number(found[1]), Number(found[2] ?? found[1])]);
  return q < r || s < p;
};
const fillPair = () => {
  const names = [...new FormData(pair).values()];
  const table = document.querySelector("table.pair");
  [...table.tHead.rows[0].cells].slice(1).forEach((cell, side) => { cell.textContent = names[side]; });
  table.tBodies[0].replaceChildren(...headings.slice(1).map(({ title, note, sign }, index) => {
    const row = document.createElement("tr");
    const head = Object.assign(document.createElement("th"), { scope: "row", textContent: title });
    head.append(Object.assign(document.createElement("small"), { textContent: note }));
    const cells = names.map((name) => rowOf(name).children[index + 1].cloneNode(true));
    const [a, b] = cells.map((cell) => (cell.dataset.sort ? Number(cell.dataset.sort) : NaN));
    const told = ranksApart(...cells.map((cell) => cell.textContent));
    cells.forEach((cell, side) => { cell.className = told && (side ? b - a : a - b) * sign > 0 ? "better" : ""; });
    row.append(head, ...cells);
    return row;
  }));
};
pair.addEventListener("change", fillPair);
fillPair();

// Matrices: a byte an entry, opacity by a root of the size so that small entries show.
const paint = (canvas) => {
  const bytes = Int8Array.from(atob(canvas.dataset.entries), (character) => character.charCodeAt(0));
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  bytes.forEach((value, index) => {
    image.data.set([...(value < 0 ? [222, 110, 38] : [13, 139, 161]), 255 * (Math.abs(value) / 127) ** 0.5], 4 * index);
  });
  context.putImageData(image, 0, 0);
};
document.querySelectorAll("canvas[data-entries]").forEach(paint);
