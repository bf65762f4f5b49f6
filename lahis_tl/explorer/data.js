// The page's data: what there is, and its numbers.

const element = (id) => document.getElementById(id);
const about = JSON.parse(element('data-about').textContent);
const [LAYERS, HEADS] = about.grid;
const SIZE = LAYERS * HEADS;

function trouble(text) {
  element('trouble').textContent = text;
  element('trouble').hidden = false;
}

async function unpack() {
  if (!('DecompressionStream' in window)) {
    throw new Error('This browser cannot unpack the data. Chrome 80, Firefox 113, Safari 16.4 or newer can.');
  }
  const packed = Uint8Array.from(atob(element('data-block').textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream('gzip'));
  return new Response(stream).arrayBuffer();
}

const halfPrecision = (() => {
  const table = new Float32Array(65536);
  for (let bits = 0; bits < 65536; bits++) {
    const sign = bits & 0x8000 ? -1 : 1;
    const exponent = (bits >> 10) & 31;
    const fraction = bits & 1023;
    if (exponent === 31) table[bits] = fraction ? NaN : sign * Infinity;
    else if (exponent === 0) table[bits] = sign * fraction * 2 ** -24;
    else table[bits] = sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
  }
  return table;
})();

const block = await unpack().catch((error) => { trouble(error.message); throw error; });

// Whole arrays, made once.
const made = new Map();
function numbers(place) {
  if (made.has(place)) return made.get(place);
  const kind = { f32: Float32Array, f16: Uint16Array, u8: Uint8Array, i8: Int8Array }[place.as];
  const stored = new kind(block, place.at, place.n);
  const value = place.as === 'f16' ? (bits) => halfPrecision[bits] : (step) => step;
  const found = place.scale === undefined ? stored : Float32Array.from(stored, (x) => value(x) * place.scale);
  made.set(place, found);
  return found;
}

// One language's [layer, head] numbers of a map, flat; undefined where it has none. The same array each time.
const rowsMade = new Map();
function ofLanguage(map, language, place) {
  const row = map.languages.indexOf(language);
  if (row < 0 || !place) return undefined;
  if (!rowsMade.has(place)) {
    rowsMade.set(place, map.languages.map((_, i) => numbers(place).subarray(i * SIZE, (i + 1) * SIZE)));
  }
  return rowsMade.get(place)[row];
}

const label = (flat) => `L${Math.floor(flat / HEADS)}H${flat % HEADS}`;

function parseLabel(text) {
  const found = /^\s*L?(\d+)\s*[H.,\s-]\s*(\d+)\s*$/i.exec(text);
  if (!found) return undefined;
  const [layer, head] = [Number(found[1]), Number(found[2])];
  return layer < LAYERS && head < HEADS ? layer * HEADS + head : undefined;
}

// An own value of a plain object: a language may be called "constructor".
const own = (object, key) => (Object.hasOwn(object, key) ? object[key] : undefined);
const known = (values) => values.reduce((n, value) => n + !Number.isNaN(value), 0);

// Ranks from 1, the highest first; heads without a number have none.
const ranked = new WeakMap();
function ranks(values) {
  if (!ranked.has(values)) {
    const order = Array.from(values.keys()).filter((i) => !Number.isNaN(values[i])).sort((a, b) => values[b] - values[a]);
    const found = new Array(values.length);
    order.forEach((flat, i) => { found[flat] = i + 1; });
    ranked.set(values, found);
  }
  return ranked.get(values);
}

// The attention of one head on a sample, as rows of queries.
function patternOf(sample, flat) {
  const n = sample.tokens.length;
  const cells = numbers(sample.pattern).subarray(flat * n * (n + 1) / 2);
  const rows = [];
  for (let query = 0, cell = 0; query < n; query++, cell += query) {
    rows.push(Array.from(cells.subarray(cell, cell + query + 1), (step) => (step / sample.pattern.steps) ** 2));
  }
  return rows;
}

// The effect of one head at each position of a sample.
function effectsOf(sample, flat) {
  const n = sample.tokens.length;
  const scale = numbers(sample.effects.scales)[flat] / sample.effects.steps.steps;
  return Array.from(numbers(sample.effects.steps).subarray(flat * n, (flat + 1) * n), (step) => step * scale);
}
