"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const find = (selector, inside = document) => inside.querySelector(selector);
  const files = new Map(); // the chosen ones, by the name of the item
  let about;

  // As nearfar writes it elsewhere: never 0 or 1 for what lies between.
  function share(value) {
    if (value < 0.0001) return "below 0.0001";
    return value > 0.9999 ? "above 0.9999" : value.toPrecision(4).replace(/\.?0+$/, "");
  }

  const sentence = (text) => `${text[0].toUpperCase()}${text.slice(1)}.`;

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
    if (about.items !== "image") {
      const text = find(`#${name}`).value;
      if (!text.trim()) throw new Error(about.items === "text" ? "Write the texts first." : "Write the numbers first.");
      return { [about.items]: text };
    }
    const file = files.get(name);
    if (!file) throw new Error("Choose the images first.");
    return { image: await base64(file) };
  }

  async function question(names) {
    about ??= await ask("/about");
    const items = await Promise.all(names.map(item));
    const size = items.reduce((sum, one) => sum + (one.image?.length ?? 0) + 100, 0);
    if (about.items === "image" && size > about.most_bytes)
      throw new Error(`More than ${about.most_bytes / 2 ** 20} MiB cannot be sent. Choose smaller images.`);
    return Object.fromEntries(names.map((name, i) => [name, items[i]]));
  }

  // A form of items, what is asked about them, and the places that show the answer.
  function panel(form, names, address, places, show, more = () => ({})) {
    let asked = 0;
    const say = (error) => { find(".error", form).textContent = error; };
    const hide = () => {
      asked += 1; // an answer that comes late is not about what is shown by then
      for (const place of places) if (place) place.hidden = true;
    };
    async function submit() {
      const mine = ++asked;
      say("");
      try {
        const found = await ask(address, { ...await question(names), ...more() });
        if (mine !== asked) return;
        for (const place of places) if (place) place.hidden = false;
        show(found);
      } catch (error) {
        if (mine !== asked) return;
        hide();
        say(error.message);
      }
    }
    function choose(name, file) {
      shown(name, file);
      hide();
      say("");
      if (file && names.every((one) => files.has(one))) submit();
    }
    form.addEventListener("submit", (event) => { event.preventDefault(); submit(); });
    form.addEventListener("input", hide);
    form.addEventListener("reset", () => {
      for (const name of names) if (files.has(name)) choose(name);
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
    return submit;
  }

  function shown(name, file) {
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
  }

  function decide(place, word, same, distance, threshold) {
    const decision = find(".decision", place), axis = find(".axis", place);
    decision.textContent = word;
    decision.dataset.same = same;
    axis.replaceChildren(drawn(distance, threshold, axis.clientWidth));
    axis.setAttribute("aria-label",
      `The distance, ${distance.toFixed(4)}, ${same ? "is at most" : "is above"} the threshold, ${threshold.toFixed(4)}.`);
  }

  function element(name, attributes, text) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  }

  // Distances from 0 on a line: up to the threshold they are the same, and different beyond.
  function drawn(distance, threshold, width) {
    const margin = 8, end = Math.max(1.25 * distance, 2.5 * threshold) || 1;
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

  const priors = new Map(); // by the name of the slider; none until it is moved

  function move(slider, of) {
    const value = Number(slider.dataset.values.split(" ")[slider.value]), said = `${value} of all ${of}`;
    priors.set(slider.id, value);
    find(`#${slider.id}-said`).textContent = said;
    slider.setAttribute("aria-valuetext", said);
  }

  const answer = find("#answer"), pairs = find("#prior");
  let compared;
  panel(find("#comparison"), ["a", "b"], "/compare", [answer, find("#belief")], (found) => {
    const [decided, evidence] = found.said;
    decide(answer, found.same ? "Same" : "Different", found.same, found.distance, found.threshold);
    find(".detail", answer).textContent = sentence(decided.slice(decided.indexOf(":") + 2));
    find(".evidence", answer).textContent = sentence(evidence);
    compared = found;
    believe();
  });

  // The odds of "same" are those of the prior times the likelihood ratio.
  function believe() {
    if (!priors.has("prior")) return;
    const before = priors.get("prior"), odds = before / (1 - before) * compared.likelihood_ratio;
    find("#probability").textContent = `Probability of “same”: ${share(odds / (1 + odds))}`;
  }
  pairs?.addEventListener("input", () => { move(pairs, "pairs"); believe(); });

  const list = find("#found"), known = find("#known");
  if (list) {
    const search = panel(find("#query-form"), ["query"], "/search", [list, find("#found-belief")], (found) => {
      const [nearest] = found.candidates, is = found.found !== null;
      decide(list, is ? found.found : "Nobody known", is, nearest.distance, found.threshold);
      find(".detail", list).textContent = sentence(is ? `the nearest item is ${nearest.item}` : found.said.slice(found.said.indexOf(";") + 2));
      find("tbody", list).replaceChildren(...found.candidates.map(row));
      if (found.nobody !== null) find("#nobody").textContent = `Probability of nobody known: ${share(found.nobody)}`;
    }, () => (priors.has("known") ? { prior: priors.get("known") } : {}));
    known?.addEventListener("input", () => move(known, "searches"));
    known?.addEventListener("change", search); // each answer embeds the item again
  }

  function row(one) {
    const made = document.createElement("tr"), head = document.createElement("th");
    head.scope = "row";
    head.textContent = one.identity;
    made.append(head);
    const cells = [one.item, one.distance.toFixed(4)];
    if (known) {
      const ratio = one.likelihood_ratio, digits = ratio >= 10 ? Math.round(ratio).toLocaleString("en") : ratio.toPrecision(2);
      cells.push(`${one.at_limit ? (ratio >= 1 ? "≥ " : "≤ ") : ""}${digits}`, one.probability === null ? "–" : share(one.probability));
    }
    for (const text of cells) made.insertCell().textContent = text;
    return made;
  }

  // A file dropped beside its place would replace the page.
  for (const kind of ["dragover", "drop"]) document.addEventListener(kind, (event) => event.preventDefault());
})();
