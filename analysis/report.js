// Draws the figures, offers their data as CSV, and lets the table of models be sorted and filtered.
"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);

  function drawFigures() {
    // plotly.js would offer a button that sends the chart to its maker's server; the numbers stay in this file
    const options = {
      responsive: true,
      displaylogo: false,
      showSendToCloud: false,
      plotlyServerURL: "",
      modeBarButtonsToRemove: ["sendDataToCloud", "sendChartToCloud", "lasso2d", "select2d"],
    };
    for (const place of document.querySelectorAll(".plot")) {
      const figure = read("plot-" + place.dataset.figure);
      Plotly.newPlot(place, figure.data, figure.layout, options);
    }
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
        const blob = new Blob([toCsv(read("data-" + button.dataset.table))], { type: "text/csv" });
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
    show();
  }

  offerDownloads();
  modelTable();
  drawFigures();
})();
