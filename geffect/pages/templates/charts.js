"use strict";
// Charts that show the value under the pointer and zoom: their data are those of the pictures.
(() => {
  const INK = "#1d2129", GRID = "#e3e5ea", UNDEFINED = "#bdbdbd", SHOWN = 8;
  const FONT = "11px system-ui, sans-serif";
  const said = (value) => (value === null ? "undefined or infinite" : String(value));

  const place = ({ kind, low, high, threshold }) => {
    const spread = { log: Math.log10, symlog: (v) => Math.asinh(v / threshold) }[kind] ?? ((v) => v);
    const first = spread(low), across = spread(high) - first;
    return (value) => (spread(value) - first) / across;
  };

  const element = (name, words = "", style = {}) => {
    const made = document.createElement(name);
    made.textContent = words;
    Object.assign(made.style, style);
    return made;
  };

  // A box beside the pointer; `tell` gives its lines, each with the colour of a curve or none.
  const beside = (tell) => {
    let box;
    const show = (u) => {
      const told = u.cursor.left >= 0 ? tell(u) : null;
      box.hidden = !told;
      if (!told) return;
      box.replaceChildren(...told.map(([words, colour]) => {
        const line = element("div", words);
        if (colour) line.prepend(element("i", "", { background: colour }));
        return line;
      }));
      const { left, top } = u.cursor, right = left > u.over.clientWidth / 2;
      box.style.left = right ? "auto" : `${left + 12}px`;
      box.style.right = right ? `${u.over.clientWidth - left + 12}px` : "auto";
      box.style.top = `${Math.max(0, top - 10)}px`;
    };
    const init = (u) => {
      box = element("div");
      box.className = "tip";
      box.hidden = true;
      u.over.append(box);
    };
    return { hooks: { init, setCursor: show } };
  };

  const axis = (more) => ({
    stroke: INK, font: FONT, labelFont: FONT, labelSize: 16, gap: 4,
    ticks: { size: 4, stroke: GRID }, grid: { stroke: GRID, width: 1 }, ...more,
  });
  const steps = (label, more) => axis({ label, size: 26, incrs: [1, 2, 5].flatMap(
    (m) => [1, 10, 100, 1e3, 1e4, 1e5, 1e6].map((p) => m * p)).sort((a, b) => a - b), ...more });
  const room = (u, labels) => {
    if (!labels) return 40;
    u.ctx.save();
    u.ctx.font = FONT;
    const widest = Math.max(...labels.map((label) => u.ctx.measureText(label ?? "").width));
    u.ctx.restore();
    return Math.ceil(widest) + 12;
  };

  const lines = ({ across, y, tables, series }) => {
    const tell = (u) => {
      const { idx, top } = u.cursor;
      if (idx === null || idx === undefined) return null;
      const there = series.map((one, i) => [one, u.data[i + 1][idx]])
        .filter(([, value], i) => value !== undefined && u.series[i + 1].show);
      const far = ([, value]) => (value === null ? Infinity : Math.abs(u.valToPos(value, "y") - top));
      const near = [...there].sort((a, b) => far(a) - far(b)).slice(0, SHOWN);
      const told = there.filter((one) => near.includes(one))
        .map(([one, value]) => [`${one.name}: ${said(value)}`, one.colour]);
      return [[`${across} ${u.data[0][idx]}`], ...told];
    };
    return {
      data: uPlot.join(tables),
      height: 250,
      scales: { y: { range: () => [y.low, y.high], asinh: y.threshold,
        distr: { log: 3, symlog: 4 }[y.kind] ?? 1 } },
      axes: [steps(across), axis({ size: room, space: 0, splits: () => y.ticks.map(([value]) => value),
        filter: (u, splits) => splits, values: () => y.ticks.map(([, label]) => label) })],
      series: [{}, ...series.map((one) => ({ label: one.name, stroke: one.colour, dash: one.dash,
        width: 1.6, points: { show: tables[0][0].length < 40, size: 4 } }))],
      legend: { show: true, live: false },
      plugins: [beside(tell)],
    };
  };

  const map = ({ across, scale, steps: at, blocks, labels, rows, palette, says, bar }) => {
    const count = blocks.length, last = at.length - 1, to = place(scale);
    const ends = at.map((x, i) => (i ? (at[i - 1] + x) / 2 : x - (last ? (at[1] - x) / 2 : 0.5)));
    ends.push(last ? 2 * at[last] - ends[last] : at[last] + 0.5);
    const colour = (value) => (value === null ? UNDEFINED
      : palette[Math.max(0, Math.min(palette.length - 1,
        Math.round(to(value) * (palette.length - 1))))]);
    const tell = (u) => {
      const x = u.posToVal(u.cursor.left, "x"), row = Math.round(u.posToVal(u.cursor.top, "y"));
      const column = ends.findLastIndex((end) => end <= x);
      const value = rows[row]?.[column];
      if (value === undefined) return null;
      const words = says && value !== null ? says[value] : said(value);
      return [[`${across} ${at[column]}, ${blocks[row]}`], [words]];
    };
    const draw = (u) => {
      const { ctx, bbox } = u;
      ctx.save();
      ctx.beginPath();
      ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
      ctx.clip();
      const xs = ends.map((x) => Math.round(u.valToPos(x, "x", true)));
      rows.forEach((row, j) => {
        const [top, bottom] = [j - 0.5, j + 0.5].map((v) => Math.round(u.valToPos(v, "y", true)));
        row.forEach((value, i) => {
          ctx.fillStyle = colour(value);
          ctx.fillRect(xs[i], top, xs[i + 1] - xs[i], bottom - top);
        });
      });
      ctx.restore();
    };
    const tall = Math.min(Math.max(15 * count, 30), 330), stride = Math.ceil(count * 13 / tall);
    const marked = blocks.map((_, i) => i)
      .filter((i) => i === count - 1 || (i % stride === 0 && count - 1 - i >= stride / 2));
    const under = element("div");
    under.className = "scale";
    const colours = says ? palette.map((one, i) => `${one} ${50 * i}% ${50 * (i + 1)}%`) : palette;
    const strip = element("div", "", { background: `linear-gradient(90deg, ${colours})` });
    strip.className = "strip";
    const written = element("div");
    written.className = "labels";
    written.append(...bar.map(([share, label]) => element("span", label, { left: `${100 * share}%` })));
    under.append(strip, written);
    return {
      data: [at, at.map(() => null)],
      height: tall + 60,
      scales: {
        x: { range: (u, low, high) =>
          (low <= at[0] && high >= at[last] ? [ends[0], ends[last + 1]] : [low, high]) },
        y: { dir: -1, range: () => [-0.5, count - 0.5] },
      },
      axes: [steps(across, { grid: { show: false } }), axis({ grid: { show: false }, size: room, space: 0,
        splits: () => marked, filter: (u, splits) => splits,
        values: () => marked.map((i) => labels[i]) })],
      series: [{}, { paths: () => null, points: { show: false } }],
      legend: { show: false },
      plugins: [beside(tell), { hooks: { draw } }],
      under,
    };
  };

  const show = (host) => {
    const told = JSON.parse(host.querySelector("script").textContent);
    const { data, scales, under, ...options } = { lines, map }[told.kind](told);
    host.classList.add("drawn");
    const chart = new uPlot({
      ...options, width: host.clientWidth, scales: { ...scales, x: { time: false, ...scales.x } },
      cursor: { y: false, drag: { x: true, y: false } }, padding: [8, 8, 0, 0],
    }, data, host);
    if (under) host.append(under);
    new ResizeObserver(() => {
      if (host.clientWidth && host.clientWidth !== chart.width) {
        chart.setSize({ width: host.clientWidth, height: options.height });
      }
    }).observe(host);
  };

  document.documentElement.classList.add("live");
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      seen.unobserve(entry.target);
      show(entry.target);
    }
  }, { rootMargin: "300px" });
  for (const host of document.querySelectorAll(".chart")) seen.observe(host);
})();
