"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const find = (selector, inside = document) => inside.querySelector(selector);
  const form = find("#comparison");
  const files = new Map(); // of the items, by name
  let about, latest, asked = 0;

  // As nearfar writes it elsewhere: never 0 or 1 for what lies between.
  function share(value) {
    if (value < 0.0001) return "below 0.0001";
    return value > 0.9999 ? "above 0.9999" : value.toPrecision(4).replace(/\.?0+$/, "");
  }

  async function ask(address, question) {
    let answer;
    try {
      answer = await fetch(address, question && {
        method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(question),
      });
    } catch {
      throw new Error("no answer: is nearfar serve still running?");
    }
    const held = await answer.json();
    if (!answer.ok) throw new Error(held.error);
    return held;
  }

  function base64(file) {
    return new Promise((done, fail) => {
      const reader = new FileReader();
      reader.onload = () => done(reader.result.slice(reader.result.indexOf(",") + 1));
      reader.onerror = () => fail(new Error(`${file.name} cannot be read.`));
      reader.readAsDataURL(file);
    });
  }

  async function item(name) {
    if (about.items === "vector") {
      const text = find(`#${name}`).value.trim();
      if (!text) throw new Error("Write two vectors.");
      return { vector: text };
    }
    const file = files.get(name);
    if (!file) throw new Error("Choose two images.");
    return { image: await base64(file) };
  }

  async function compare() {
    const mine = ++asked; // an answer that comes late must not replace a later one
    say("");
    try {
      about ??= await ask("/about");
      const [a, b] = await Promise.all([item("a"), item("b")]);
      if (about.items === "image" && a.image.length + b.image.length + 100 > about.most_bytes)
        throw new Error(`The images are larger than ${about.most_bytes / 2 ** 20} MiB together. Choose smaller ones.`);
      const found = await ask("/compare", { a, b });
      if (mine === asked) show(found);
    } catch (error) {
      if (mine !== asked) return;
      hide();
      say(error.message);
    }
  }

  const say = (error) => { find(".error", form).textContent = error; };

  function hide() {
    latest = undefined;
    find("#answer").hidden = true;
    if (find("#belief")) find("#belief").hidden = true;
  }

  function show(found) {
    latest = found;
    const answer = find("#answer"), [decided, evidence] = found.said;
    const word = find(".decision", answer);
    word.textContent = found.same ? "Same" : "Different";
    word.dataset.same = found.same;
    find(".detail", answer).textContent = sentence(decided.slice(decided.indexOf(":") + 2));
    find(".evidence", answer).textContent = sentence(evidence);
    const axis = find(".axis", answer);
    axis.replaceChildren(drawn(found));
    axis.setAttribute("aria-label",
      `The distance, ${found.distance.toFixed(4)}, ${found.same ? "is at most" : "is above"} the threshold, ${found.threshold.toFixed(4)}.`);
    answer.hidden = false;
    if (find("#belief")) {
      find("#belief").hidden = false;
      believe();
    }
  }

  const sentence = (text) => `${text[0].toUpperCase()}${text.slice(1)}.`;

  function element(name, attributes, text) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  }

  // Distances from 0 on a line: up to the threshold they are the same, and different beyond.
  function drawn({ distance, threshold }) {
    const width = Math.max(find("#comparison").clientWidth - 42, 260), margin = 8;
    const end = Math.max(1.25 * distance, 2.5 * threshold) || 1;
    const at = (value) => margin + (width - 2 * margin) * Math.min(value / end, 1);
    // A label stays inside, however near the edge its mark is.
    const label = (value, y, text) => {
      const x = at(value), half = 3.6 * text.length;
      return element("text", { x: Math.min(Math.max(x, half), width - half), y, "text-anchor": "middle" }, text);
    };
    const svg = element("svg", { viewBox: `0 0 ${width} 76`, "aria-hidden": "true" });
    const cut = at(threshold);
    svg.append(
      element("rect", { class: "track same", x: margin, y: 32, width: cut - margin, height: 10 }),
      element("rect", { class: "track different", x: cut, y: 32, width: width - margin - cut, height: 10 }),
      element("line", { x1: cut, x2: cut, y1: 24, y2: 50, "stroke-dasharray": "5 4" }),
      element("circle", { cx: at(distance), cy: 37, r: 8 }),
      label(threshold, 70, `threshold ${threshold.toFixed(4)}`),
      label(distance, 18, `distance ${distance.toFixed(4)}`),
    );
    return svg;
  }

  // The odds of "same" are those of the prior times the likelihood ratio.
  function believe() {
    const slider = find("#prior"), prior = Number(slider.dataset.values.split(" ")[slider.value]);
    const odds = prior / (1 - prior) * latest.likelihood_ratio;
    const said = `${prior} of all pairs`;
    find("#prior-said").textContent = said;
    slider.setAttribute("aria-valuetext", said);
    find("#probability").textContent = `Probability of “same”: ${share(odds / (1 + odds))}`;
  }

  function choose(name, file) {
    const place = find(`[data-item="${name}"]`), picture = find(".shown", place), says = find(".says", place);
    URL.revokeObjectURL(picture.src);
    picture.hidden = true;
    if (!file) {
      files.delete(name);
      says.textContent = "Choose an image, or drop it here";
      return;
    }
    files.set(name, file);
    says.textContent = file.name;
    picture.onload = () => {
      picture.hidden = false;
      picture.classList.toggle("small", picture.naturalWidth < 176);
    };
    picture.onerror = () => { picture.hidden = true; }; // a format that the browser does not show
    picture.alt = file.name;
    picture.src = URL.createObjectURL(file);
    hide();
    if (files.size === 2) compare();
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    compare();
  });
  form.addEventListener("input", hide); // what was answered is not about these items any more
  form.addEventListener("reset", () => {
    asked += 1;
    for (const name of [...files.keys()]) choose(name);
    hide();
    say("");
  });
  for (const input of form.querySelectorAll("input[type=file]")) {
    const place = find(".drop", input.parentElement);
    input.addEventListener("change", () => { if (input.files.length) choose(input.id, input.files[0]); });
    for (const kind of ["dragenter", "dragover"]) place.addEventListener(kind, (event) => {
      event.preventDefault();
      place.classList.add("over");
    });
    for (const kind of ["dragleave", "drop"]) place.addEventListener(kind, () => place.classList.remove("over"));
    place.addEventListener("drop", (event) => {
      event.preventDefault();
      if (event.dataTransfer.files.length) choose(input.id, event.dataTransfer.files[0]);
    });
  }
  // A file dropped beside its place would replace the page.
  for (const kind of ["dragover", "drop"]) document.addEventListener(kind, (event) => event.preventDefault());
  find("#prior")?.addEventListener("input", () => { if (latest) believe(); });
})();
