// What the page changes in the layout of a figure before it is drawn: room for the page's own menus, and for a phone.
"use strict";
const layouts = (() => {
  const narrow = window.matchMedia("(max-width: 640px)").matches;
  const axesOf = (layout, letter) => Object.keys(layout).filter((name) => RegExp(`^${letter}axis\\d*$`).test(name));
  const columnsOf = (layout) => new Set(axesOf(layout, "x").map((name) => layout[name].domain?.[0] ?? 0)).size;

  // pixels of the longest line of a text
  const widthOf = (text) => 7 * Math.max(...text.split("<br>").map((line) => line.length));

  // a phone has no room for long names: they are broken before their arguments
  const broken = (text, most) => (widthOf(text) > most ? text.replace(/ ?\(/, "<br>(").replace(/, ?(<br>)?/g, ",<br>") : text);

  // panels beside each other keep a width that can be read; a phone scrolls
  function leastWidth(layout) {
    const columns = columnsOf(layout);
    const names = axesOf(layout, "y").flatMap((name) => layout[name].ticktext ?? []);
    if (narrow) return 210 * columns + (columns > 1 ? 40 : 0) + Math.max(0, ...names.map(widthOf)) + "px";
    return columns > 1 ? 250 * columns + "px" : "";
  }

  // of ticks that would run into each other every other one stays, or fewer
  function thinned(axis, pixels) {
    const at = (value) => (axis.type === "log" ? Math.log10(value) : Number(value));
    const span = at(axis.tickvals.at(-1)) - at(axis.tickvals[0]);
    let end = -Infinity;
    const kept = axis.tickvals.map((_, place) => place).filter((place) => {
      const middle = (pixels * (at(axis.tickvals[place]) - at(axis.tickvals[0]))) / span;
      const half = widthOf(axis.ticktext[place]) / 2;
      if (!(middle - half > end)) return false;
      end = middle + half + 4;
      return true;
    });
    const of = (values) => kept.map((place) => values[place]);
    return { ...axis, tickvals: of(axis.tickvals), ticktext: of(axis.ticktext) };
  }

  // names of a legend as a phone has room for them
  const named = (trace) => (trace.name ? { ...trace, name: broken(trace.name, 200) } : trace);

  // a legend of three names to a line, for which the figures leave room, has fewer to a line here
  function taller(layout, traces) {
    const names = traces.filter((trace) => trace.showlegend && trace.name).map((trace) => trace.name);
    const lines = names.reduce((sum, name) => sum + (widthOf(name) > 90 ? name.split("<br>").length : 0.5), 0);
    const more = Math.max(0, 20 * Math.ceil(lines) - 20 * Math.ceil(names.length / 3));
    return { ...layout, height: layout.height + more, margin: { ...layout.margin, t: layout.margin.t + more } };
  }

  // the legend above titles of two lines
  function raised(layout) {
    const { t, b } = layout.margin;
    const legend = { ...layout.legend, y: layout.legend.y + RISE / (layout.height - t - b) };
    return { ...layout, legend, height: layout.height + RISE, margin: { ...layout.margin, t: t + RISE } };
  }

  function forPhone(layout, traces, pixels) {
    const out = taller(layout, traces);
    for (const name of axesOf(layout, "y")) {
      const own = traces.filter((trace) => (trace.yaxis ?? "y").replace("y", "yaxis") === name);
      const words = [...new Set(own.flatMap((trace) => (Array.isArray(trace.y) ? trace.y : [])))].filter((one) => typeof one === "string");
      if (words.length && words.some(isNaN)) out[name] = { ...layout[name], tickvals: words, ticktext: words.map((one) => broken(one, 140)) };
    }
    const columns = columnsOf(layout);
    for (const name of axesOf(layout, "x")) {
      const axis = layout[name];
      const title = axis.title?.text ? { ...axis.title, text: broken(axis.title.text, 140) } : axis.title;
      out[name] = { ...(Array.isArray(axis.tickvals) && Array.isArray(axis.ticktext) ? thinned(axis, (pixels - 90) / columns) : axis), title };
    }
    if (columns > 1) out.annotations = layout.annotations?.map((one) => ({ ...one, text: broken(one.text, 180) }));
    return out.annotations?.some((one) => one.text.includes("<br>")) ? raised(out) : out;
  }

  // pixels that the figures leave for their menus; of one more line of a title
  const MENU = 38;
  const RISE = 26;

  // plotly.js draws menus that no keyboard reaches: the page has its own instead, and gives back their room
  function withoutMenus({ updatemenus, ...layout }) {
    if (!updatemenus?.length) return layout;
    return { ...layout, height: layout.height - MENU, margin: { ...layout.margin, t: layout.margin.t - MENU } };
  }

  return { narrow, leastWidth, named, forPhone, withoutMenus };
})();
