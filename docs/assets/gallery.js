// The gallery's filter. Without scripts the form stays hidden and every card is shown.
(() => {
  const form = document.getElementById("gallery-filter");
  const text = document.getElementById("gallery-text");
  const family = document.getElementById("gallery-family");
  const count = document.getElementById("gallery-count");
  const boxes = [...form.querySelectorAll("input[name=supports]")];
  const cards = [...document.querySelectorAll("#gallery > .card")].map((card) => ({
    card,
    words: card.textContent.toLowerCase().replaceAll("_", " "),
    family: card.dataset.family,
    supports: new Set(card.dataset.supports.split(" ")),
  }));

  function show() {
    const words = text.value.toLowerCase().replaceAll("_", " ").split(/\s+/).filter(Boolean);
    const wanted = boxes.filter((box) => box.checked).map((box) => box.value);
    let shown = 0;
    for (const entry of cards) {
      const fits =
        (!family.value || entry.family === family.value) &&
        wanted.every((name) => entry.supports.has(name)) &&
        words.every((word) => entry.words.includes(word));
      entry.card.hidden = !fits;
      shown += fits;
    }
    count.textContent = `${shown} of ${cards.length} mechanisms`;
  }

  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(show)); // the fields are empty only afterwards
  form.hidden = false;
  show();
})();
