"use strict";
(() => {
  const held = JSON.parse(document.getElementById("signals").textContent);
  const views = [];
  const state = {};
  const all = (selector) => [...document.querySelectorAll(selector)];

  function percent(rate) {
    if (rate === 0 || rate === 1) return `${100 * rate}\u00a0%`;
    if (rate < 0.0001) return `below ${percent(0.0001)}`;
    if (rate > 0.9999) return `above ${percent(0.9999)}`;
    return `${(100 * rate).toFixed(100 * rate < 1 || 100 * rate > 99 ? 2 : 1)}\u00a0%`;
  }

  // How many of the sorted numbers are at most this.
  function upTo(sorted, limit) {
    let low = 0, high = sorted.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (sorted[middle] <= limit) low = middle + 1; else high = middle;
    }
    return low;
  }

  function apply({ view, names }) {
    for (const [name, value] of Object.entries(state)) if (names.has(name)) view.signal(name, value);
    view.runAsync();
  }

  function set(changes) {
    Object.assign(state, changes);
    views.forEach(apply);
  }

  function moveMoment(index) {
    const said = held.moments[index];
    all('[data-moves="moment"]').forEach((slider) => {
      slider.value = index;
      slider.setAttribute("aria-valuetext", said);
    });
    all('[data-says="moment"]').forEach((output) => { output.textContent = said; });
    set({ moment: index });
  }

  function moveThreshold(threshold) {
    const slider = document.getElementById("threshold-slider");
    const point = upTo(held.curve.threshold, threshold) - 1;
    const far = point < 0 ? 0 : held.curve.far[point], frr = point < 0 ? 1 : 1 - held.curve.tar[point];
    slider.value = threshold;
    slider.setAttribute("aria-valuetext", threshold.toFixed(4));
    all('[data-says="threshold"]').forEach((output) => { output.textContent = threshold.toFixed(4); });
    document.getElementById("decided").textContent =
      `${percent(far)} of different pairs are accepted (FAR), ${percent(frr)} of same pairs are ` +
      "rejected (FRR).";
    all(".gallery li").forEach((pair) => mark(pair, threshold));
    set({ threshold, far, frr });
  }

  function mark(pair, threshold) {
    const accepted = Number(pair.dataset.distance) <= threshold;
    const right = accepted === (pair.dataset.kind === "same");
    pair.classList.toggle("wrong", !right);
    pair.querySelector(".mark").textContent = `${accepted ? "accepted" : "rejected"}, ${right ? "right" : "wrong"}`;
  }

  for (const place of all("[data-spec]")) {
    const spec = JSON.parse(document.getElementById(place.dataset.spec).textContent);
    const names = new Set((spec.params ?? []).map((param) => param.name));
    vegaEmbed(place, spec, { mode: "vega-lite", renderer: "svg", actions: false }).then(({ view }) => {
      views.push({ view, names });
      apply(views.at(-1));
      place.firstElementChild.setAttribute("aria-hidden", "true"); // its place says it in words
      place.dataset.drawn = "";
    });
  }

  if (held.moments) {
    all('[data-moves="moment"]').forEach((slider) =>
      slider.addEventListener("input", () => moveMoment(Number(slider.value))));
    const slider = document.getElementById("threshold-slider");
    slider.addEventListener("input", () => moveThreshold(Number(slider.value)));
    slider.addEventListener("keydown", (event) => {
      const steps = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1 }[event.key];
      if (!steps) return;
      event.preventDefault(); // a step of the browser's own would be a hundredth of all distances
      const fine = Number(slider.max) / 500;
      moveThreshold(Math.min(Math.max(Number(slider.value) + steps * fine, 0), Number(slider.max)));
    });
    document.getElementById("reset").addEventListener("click", () => moveThreshold(held.threshold));
    moveMoment(held.moments.length - 1);
    moveThreshold(held.threshold);
  }
})();
