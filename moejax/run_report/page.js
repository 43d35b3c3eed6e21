// Reads values off charts and heatmaps under the pointer; without it the page only lacks these.
const tip = document.getElementById("tip");

function show(event, lines) {
  tip.replaceChildren(...lines.map(([text, colour]) => {
    const line = document.createElement("div");
    if (colour) {
      const mark = document.createElement("i");
      mark.style.background = colour;
      line.append(mark);
    }
    line.append(text);
    return line;
  }));
  tip.hidden = false;
  const left = event.clientX + 16, width = tip.offsetWidth;
  tip.style.left = `${left + width > innerWidth ? event.clientX - width - 16 : left}px`;
  tip.style.top = `${Math.max(4, Math.min(event.clientY + 12, innerHeight - tip.offsetHeight - 4))}px`;
}

function inside(svg, event) {
  return new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
}

function valueAt(axis, place) {
  const [low, high, begin, end, logarithmic] = axis.split(" ").map(Number);
  const share = (place - begin) / (end - begin);
  return logarithmic ? low * (high / low) ** share : low + share * (high - low);
}

function near(points, x) {
  let low = 0, high = points.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < x) low = middle; else high = middle;
  }
  return x - points[low][0] < points[high][0] - x ? points[low] : points[high];
}

for (const svg of document.querySelectorAll("svg.chart")) {
  const lines = [...svg.querySelectorAll("polyline.line")].map(line => ({
    label: line.dataset.label, colour: line.getAttribute("stroke"),
    points: line.getAttribute("points").split(" ").map(point => point.split(",").map(Number)),
  }));
  const cursor = svg.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "path"));
  cursor.setAttribute("class", "cursor");
  svg.addEventListener("pointermove", event => {
    const x = inside(svg, event).x;
    const found = lines.map(line => [line, near(line.points, x)]);
    const nearest = found.reduce((a, b) => Math.abs(b[1][0] - x) < Math.abs(a[1][0] - x) ? b : a)[1][0];
    const here = found.filter(([, point]) => Math.abs(point[0] - nearest) < 8).sort((a, b) => a[1][1] - b[1][1]);
    cursor.setAttribute("d", `M${nearest} 8V214`);
    show(event, [
      [`step ${Math.round(valueAt(svg.dataset.x, nearest)).toLocaleString("en")}`],
      ...here.slice(0, 16).map(([line, point]) => [
        `${line.label} ${Number(valueAt(svg.dataset.y, point[1]).toPrecision(4)).toLocaleString("en", { maximumSignificantDigits: 4 })}`,
        line.colour,
      ]),
    ]);
  });
  svg.addEventListener("pointerleave", () => { tip.hidden = true; cursor.removeAttribute("d"); });
}

for (const svg of document.querySelectorAll("svg.heatmap")) {
  const [left, top, width, height] = svg.dataset.box.split(" ").map(Number);
  const rows = svg.dataset.rows.split(" "), columns = svg.dataset.columns.split(" ");
  svg.addEventListener("pointermove", event => {
    const load = event.target.dataset.load;
    const { x, y } = inside(svg, event);
    const row = Math.floor((y - top) / height * rows.length), column = Math.floor((x - left) / width * columns.length);
    if (load === undefined || !(row in rows) || !(column in columns)) { tip.hidden = true; return; }
    show(event, [[`${svg.dataset.row} ${rows[row]}, ${svg.dataset.column} ${columns[column]}`], [`${load}× the even share`]]);
  });
  svg.addEventListener("pointerleave", () => { tip.hidden = true; });
}
