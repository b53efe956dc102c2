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
