'use strict';
const tip = document.getElementById('tip');
const numbers = (text) => text.split(' ').map(Number);
const short = (x) => (Math.abs(x) >= 1e5 || Number.isInteger(x) ? x.toLocaleString('en') : String(Number(x.toPrecision(5))));
let hovering = false;

// Index of the number nearest to x in an ascending list.
function nearest(list, x) {
  let low = 0, high = list.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (list[middle] > x) high = middle; else low = middle;
  }
  return Math.abs(list[high] - x) < Math.abs(list[low] - x) ? high : low;
}

for (const svg of document.querySelectorAll('svg.chart, svg.heat')) {
  const [left, top, width, height] = numbers(svg.dataset.area);
  const [x0, x1] = numbers(svg.dataset.x);
  const [y0, y1, log] = numbers(svg.dataset.y);
  const along = (y) => (log ? Math.log(y / y0) / Math.log(y1 / y0) : (y - y0) / (y1 - y0));
  const hover = svg.querySelector('.hover');
  let lines = null, rows = null;

  // The numbers of all lines near a step, and a mark at each.
  function readChart(step) {
    lines ??= [...svg.querySelectorAll('.line')].map((line) => ({
      name: line.dataset.name, classes: line.classList,
      steps: numbers(line.dataset.steps), values: numbers(line.dataset.values),
    })).filter((line) => line.steps.length && line.steps[0] >= 0);
    if (!lines.length) return null;
    const at = lines[0].steps[nearest(lines[0].steps, step)];
    const x = left + width * (at - x0) / (x1 - x0);
    let marks = `<path d="M${x} ${top}v${height}"/>`, text = `step ${short(at)}`;
    for (const line of lines) {
      const i = nearest(line.steps, at);
      const color = [...line.classes].find((name) => /^c\d/.test(name));
      const markX = left + width * (line.steps[i] - x0) / (x1 - x0);
      marks += `<circle class="${color}" cx="${markX}" cy="${top + height * (1 - along(line.values[i]))}" r="3.5"/>`;
      text += `\n${line.name}: ${short(line.values[i])}` + (line.steps[i] === at ? '' : ` (step ${short(line.steps[i])})`);
    }
    return [marks, text];
  }

  // The load of the cell at a step and height.
  function readHeat(step, y) {
    rows ??= svg.dataset.values.split(';').map(numbers);
    const stride = Number(svg.dataset.stride), n = rows[0].length;
    const column = Math.min(n - 1, Math.floor((step - x0) / stride));
    const expert = Math.min(rows.length - 1, Math.floor((y - top) / height * rows.length));
    const first = Math.max(1, x0 + column * stride), last = x0 + (column + 1) * stride - 1;
    const percent = rows[expert][column];
    const marks = `<rect x="${left + width * column / n}" y="${top + height * expert / rows.length}"
      width="${Math.max(2, width / n)}" height="${height / rows.length}"/>`;
    const steps = last > first ? `steps ${short(first)} to ${short(last)}` : `step ${short(first)}`;
    return [marks, `expert ${expert}, ${steps}\n${percent}% of balanced\n${short(percent / rows.length)}% of the choices`];
  }

  svg.addEventListener('pointermove', (event) => {
    const box = svg.getBoundingClientRect(), unit = svg.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * unit, y = (event.clientY - box.top) * unit;
    const inside = x >= left && left + width >= x && y >= top && top + height >= y;
    const step = x0 + (x1 - x0) * (x - left) / width;
    const read = inside ? (svg.dataset.values ? readHeat(step, y) : readChart(step)) : null;
    hovering = read !== null;
    tip.hidden = !hovering;
    hover.innerHTML = read ? read[0] : '';
    if (!read) return;
    tip.textContent = read[1];
    const right = event.clientX + 16 + tip.offsetWidth > innerWidth;
    tip.style.left = `${right ? event.clientX - 16 - tip.offsetWidth : event.clientX + 16}px`;
    tip.style.top = `${Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 4)}px`;
  });
  svg.addEventListener('pointerleave', () => { hovering = false; tip.hidden = true; hover.innerHTML = ''; });
}

const time = document.querySelector('time');
const drawn = new Date(1000 * time.dataset.unix);
function age() {
  const minutes = Math.round((Date.now() - drawn) / 60000);
  const words = minutes >= 120 ? `${Math.round(minutes / 60)} hours ago` : minutes >= 2 ? `${minutes} minutes ago` : '';
  time.textContent = drawn.toLocaleString() + (words ? `, ${words}` : '');
}
age();
setInterval(age, 30000);

// A page of a run that goes on is drawn again and again; nobody wants it to change under the pointer or a selection.
if (document.body.dataset.status === 'running') {
  setInterval(() => {
    if (!hovering && !document.hidden && getSelection().isCollapsed) location.reload();
  }, 20000);
}
