// Draws the figures of what is chosen, offers their data as CSV, lets the table of models be sorted and filtered, and
// loads a page that is written anew while a study runs.
"use strict";
(() => {
  const { narrow, leastWidth, named, forPhone, withoutMenus } = layouts;
  const unpacked = {};
  const read = (id) => JSON.parse(unpacked[id] ?? document.getElementById(id).textContent);

  const state = {};
  const figures = {};
  // what the reader had chosen before the page was loaded again
  const before = history.state?.report ?? {};
  // the button that was pressed in every menu of every figure, by its words
  const pressed = before.pressed ?? {};
  let dark = before.dark ?? window.matchMedia("(prefers-color-scheme: dark)").matches;

  // long data are gzip in base64
  async function unpack() {
    for (const element of document.querySelectorAll("script[data-packed]")) {
      const bytes = Uint8Array.from(atob(element.textContent), (character) => character.charCodeAt(0));
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream(element.dataset.packed));
      unpacked[element.id] = await new Response(stream).text();
      element.remove();
    }
  }

  const fits = (of) => Object.entries(of).every(([name, value]) => state[name] === value);

  // the figures are made for a light page; in the dark only what surrounds the data changes
  function coloured(layout) {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const out = { ...layout, paper_bgcolor: colour("--card"), plot_bgcolor: colour("--card") };
    out.font = { ...layout.font, color: colour("--ink") };
    for (const name of Object.keys(layout)) {
      if (/^[xy]axis\d*$/.test(name)) {
        out[name] = {
          ...layout[name], gridcolor: colour("--grid"), linecolor: colour("--soft"), zerolinecolor: colour("--line"),
        };
      }
    }
    return out;
  }

  // the dark end of a colour scale cannot be seen on a dark page
  function lifted(trace) {
    const parts = dark && /^rgb\((\d+), (\d+), (\d+)\)$/.exec(trace.line?.color ?? "");
    if (!parts || 0.2126 * parts[1] + 0.7152 * parts[2] + 0.0722 * parts[3] > 90) return trace;
    const lighter = parts.slice(1).map((channel) => Math.round(Number(channel) / 2 + 127));
    return { ...trace, line: { ...trace.line, color: `rgb(${lighter.join(", ")})` } };
  }

  // a part of a figure's points
  function picked({ pick, ...trace }) {
    if (!pick) return trace;
    const of = (values) => (Array.isArray(values) ? pick.map((place) => values[place]) : values);
    const bars = trace.error_x && { ...trace.error_x, array: of(trace.error_x.array) };
    return {
      ...trace, x: of(trace.x), y: of(trace.y), customdata: of(trace.customdata), error_x: bars,
      marker: { ...trace.marker, color: of(trace.marker.color) },
    };
  }

  function drawFigure(place) {
    // plotly.js would offer a button that sends the chart to its maker's server; the numbers stay in this file
    const options = {
      responsive: true,
      displaylogo: false,
      showSendToCloud: false,
      plotlyServerURL: "",
      displayModeBar: narrow ? false : undefined,
      modeBarButtonsToRemove: ["sendDataToCloud", "sendChartToCloud", "lasso2d", "select2d"],
    };
    const name = place.dataset.figure;
    const figure = figures[name] ??= read("plot-" + name);
    const variant = figure.variants.find((one) => fits(one.of));
    const box = place.closest("figure");
    const button = box.querySelector(".download");
    button.disabled = !variant || "reason" in variant;
    box.classList.toggle("absent", button.disabled);
    if (button.disabled) {
      Plotly.purge(place);
      menusOf(box).replaceChildren();
      place.style.minHeight = "0";
      const reason = variant ? variant.reason : "the measure is not in it.";
      box.querySelector(".caption").textContent = "No figure for this choice: " + reason;
      return;
    }
    const whole = variant.traces.map(([number, own]) => picked({ ...structuredClone(figure.traces[number]), ...own }));
    const traces = narrow ? whole.map(named) : whole;
    button.dataset.place = variant.table;
    box.querySelector(".caption").textContent = variant.caption;
    const plain = withoutMenus(structuredClone(variant.layout));
    const layout = coloured(narrow ? forPhone(plain, traces, place.parentElement.clientWidth) : plain);
    place.style.minHeight = layout.height + "px";
    place.style.minWidth = leastWidth(layout);
    Plotly.react(place, traces.map(lifted), layout, options);
    offerMenus(place, name, variant.layout.updatemenus ?? []);
  }

  // what a button says, less the counts of the models at hand
  const words = (button) => button.label.replace(/ \(.*/, "");

  function menusOf(box) {
    const found = box.querySelector(".menus");
    if (found) return found;
    const made = document.createElement("div");
    made.className = "menus";
    box.querySelector(".scroll").before(made);
    return made;
  }

  // a figure that is drawn anew keeps what the reader chose in it, and the focus stays
  function offerMenus(place, name, menus) {
    const held = menusOf(place.closest("figure"));
    if (held.childElementCount !== menus.length) {
      held.replaceChildren(...menus.map((menu) => document.createElement(menu.type === "buttons" ? "div" : "select")));
    }
    menus.forEach((menu, number) => {
      const element = held.children[number];
      const chosen = Math.max(0, menu.buttons.findIndex((button) => words(button) === pressed[name]?.[number]));
      const apply = (option) => Plotly[menu.buttons[option].method](place, ...structuredClone(menu.buttons[option].args));
      const choose = (option) => {
        (pressed[name] ??= {})[number] = words(menu.buttons[option]);
        apply(option);
      };
      element.setAttribute("aria-label", menu.name);
      if (chosen > 0) apply(chosen);
      (menu.type === "buttons" ? offerButtons : offerOptions)(element, menu, chosen, choose);
    });
  }

  function fill(element, menu, tag) {
    while (element.childElementCount > menu.buttons.length) element.lastChild.remove();
    while (element.childElementCount < menu.buttons.length) element.append(document.createElement(tag));
    menu.buttons.forEach((button, place) => { element.children[place].innerHTML = button.label; });
    return [...element.children];
  }

  function offerButtons(element, menu, chosen, choose) {
    element.setAttribute("role", "group");
    const buttons = fill(element, menu, "button");
    const show = (active) => buttons.forEach((one, place) => one.setAttribute("aria-pressed", String(place === active)));
    buttons.forEach((one, place) => {
      one.type = "button";
      one.onclick = () => { choose(place); show(place); };
    });
    show(chosen);
  }

  function offerOptions(element, menu, chosen, choose) {
    fill(element, menu, "option");
    element.selectedIndex = chosen;
    element.onchange = () => choose(element.selectedIndex);
  }

  const drawFigures = () => document.querySelectorAll(".plot").forEach(drawFigure);

  function follow() {
    for (const part of document.querySelectorAll("[data-of]")) part.hidden = !fits(JSON.parse(part.dataset.of));
    drawFigures();
  }

  function offerChoices() {
    for (const control of document.querySelectorAll("[data-control]")) {
      const chosen = before.state?.[control.dataset.control];
      if ([...control.options].some((option) => option.value === chosen)) control.value = chosen;
      state[control.dataset.control] = control.value;
      control.addEventListener("change", () => {
        state[control.dataset.control] = control.value;
        follow();
      });
    }
    document.querySelector(".controls").addEventListener("submit", (event) => event.preventDefault());
    const button = document.getElementById("theme");
    const show = () => {
      document.documentElement.dataset.theme = dark ? "dark" : "light";
      button.setAttribute("aria-pressed", String(dark));
      drawFigures();
    };
    button.addEventListener("click", () => { dark = !dark; show(); });
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    button.setAttribute("aria-pressed", String(dark));
    follow();
  }

  function toCsv(table) {
    const cell = (value) => {
      const text = value === null ? "" : String(value);
      return /[",\r\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
    };
    return [table.columns, ...table.data].map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
  }

  function offerDownloads() {
    for (const button of document.querySelectorAll(".download")) {
      button.addEventListener("click", () => {
        const found = read("data-" + button.dataset.table);
        const table = Array.isArray(found) ? found[Number(button.dataset.place)] : found;
        const blob = new Blob([toCsv(table)], { type: "text/csv" });
        const link = document.createElement("a");
        link.href = URL.createObjectURL(blob);
        link.download = button.dataset.table + ".csv";
        link.click();
        setTimeout(() => URL.revokeObjectURL(link.href), 1000);
      });
    }
  }

  // "width=8" and "test_acc>0.9" ask one column; any other word must occur somewhere in the row.
  function condition(word, columns) {
    const parts = /^(.+?)(<=|>=|!=|=|<|>)(.*)$/.exec(word);
    const column = parts ? columns.indexOf(parts[1]) : -1;
    if (column < 0) {
      const needle = word.toLowerCase();
      return (row) => row.some((value) => value !== null && String(value).toLowerCase().includes(needle));
    }
    const [, , sign, wanted] = parts;
    const number = wanted === "" ? NaN : Number(wanted);
    const equal = (value) => typeof value === "number" ? value === number : String(value ?? "") === wanted;
    const tests = {
      "=": equal,
      "!=": (value) => !equal(value),
      "<": (value) => value !== null && value < number,
      ">": (value) => value !== null && value > number,
      "<=": (value) => value !== null && value <= number,
      ">=": (value) => value !== null && value >= number,
    };
    return (row) => tests[sign](row[column]);
  }

  function compare(a, b) {
    if (a === b) return 0;
    if (typeof a === "number" && typeof b === "number") return a - b;
    return String(a) < String(b) ? -1 : 1;
  }

  function modelTable() {
    const { columns, data } = read("data-models");
    const size = 25;
    const state = { rows: data, sort: -1, falling: false, page: 0 };
    const numeric = columns.map((_, place) => data.some((row) => typeof row[place] === "number"));
    const table = document.getElementById("model-table");
    const head = table.createTHead().insertRow();
    const body = table.createTBody();
    const previous = document.getElementById("previous");
    const next = document.getElementById("next");
    const filter = document.getElementById("filter");

    const format = (value) => {
      if (value === null) return "\u2013";
      return typeof value === "number" && !Number.isInteger(value) ? String(Number(value.toPrecision(4))) : String(value);
    };

    function show() {
      const pages = Math.max(1, Math.ceil(state.rows.length / size));
      state.page = Math.min(state.page, pages - 1);
      body.replaceChildren();
      for (const row of state.rows.slice(state.page * size, (state.page + 1) * size)) {
        const line = body.insertRow();
        row.forEach((value, place) => {
          const cell = line.insertCell();
          cell.textContent = format(value);
          if (numeric[place]) cell.className = "number";
        });
      }
      document.getElementById("count").textContent = state.rows.length + " of " + data.length + " models";
      document.getElementById("page").textContent = "page " + (state.page + 1) + " of " + pages;
      previous.disabled = state.page === 0;
      next.disabled = state.page === pages - 1;
    }

    function arrange() {
      const tests = filter.value.split(/\s+/).filter(Boolean).map((word) => condition(word, columns));
      state.rows = data.filter((row) => tests.every((test) => test(row)));
      if (state.sort >= 0) {
        const sign = state.falling ? -1 : 1;
        // a missing value comes last in either direction
        state.rows.sort((left, right) => {
          const [a, b] = [left[state.sort], right[state.sort]];
          return a === null || b === null ? (a === null) - (b === null) : sign * compare(a, b);
        });
      }
      state.page = 0;
      show();
    }

    columns.forEach((name, place) => {
      const cell = document.createElement("th");
      cell.scope = "col";
      if (numeric[place]) cell.className = "number";
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = name;
      button.addEventListener("click", () => {
        state.falling = state.sort === place && !state.falling;
        state.sort = place;
        for (const other of head.cells) other.removeAttribute("aria-sort");
        cell.setAttribute("aria-sort", state.falling ? "descending" : "ascending");
        arrange();
      });
      cell.append(button);
      head.append(cell);
    });
    filter.addEventListener("input", arrange);
    previous.addEventListener("click", () => { state.page -= 1; show(); });
    next.addEventListener("click", () => { state.page += 1; show(); });
    filter.value = before.search ?? "";
    arrange();
  }

  function stayCurrent() {
    const seconds = Number(document.body.dataset.refresh);
    if (!seconds) {
      document.querySelector(".live")?.remove();
      return;
    }
    const button = document.getElementById("live");
    let following = before.following ?? true;
    const show = () => button.setAttribute("aria-pressed", String(following));
    button.addEventListener("click", () => { following = !following; show(); });
    show();
    setInterval(() => {
      if (!following || document.hidden) return;
      const search = document.getElementById("filter")?.value;
      history.replaceState({ report: { state, pressed, dark, following, search, top: window.scrollY } }, "");
      location.reload();
    }, 1000 * seconds);
    if (before.top) window.scrollTo(0, before.top);
  }

  async function start() {
    await unpack();
    if (document.getElementById("model-table")) {
      offerDownloads();
      modelTable();
      offerChoices();
    }
    stayCurrent();
  }

  start();
})();
