// The layer × head map, its marks, and the set of heads.

const mapDiv = element('map');
const currentMap = () => about.maps[state.score];
const currentRule = () => about.rules[state.rule];

function counts(rule) {
  const found = new Float32Array(SIZE);
  for (const heads of Object.values(rule.kept)) for (const flat of heads) found[flat] += 1;
  return found;
}

// What each panel of the map shows: title, numbers, language.
function panelsShown() {
  const map = currentMap();
  if (state.view === 'count' || !map) return [{ title: '', values: counts(currentRule()), language: state.language }];
  if (state.view === 'all') {
    return map.languages.map((language) => ({ title: plain(language), values: ofLanguage(map, language, map.values), language }));
  }
  const values = ofLanguage(map, state.language, map.values);
  if (state.view === 'language') return [{ title: '', values, language: state.language }];
  const minus = ofLanguage(map, state.minus, map.values);
  return [{ title: '', values: values.map((value, i) => value - minus[i]), language: state.language }];
}

const grid2d = (values) => Array.from({ length: LAYERS }, (_, layer) => values.slice(layer * HEADS, (layer + 1) * HEADS));
const axes = (i) => (i ? { xaxis: `x${i + 1}`, yaxis: `y${i + 1}` } : { xaxis: 'x', yaxis: 'y' });

function mapTitle() {
  const map = currentMap();
  if (state.view === 'count' || !map) return `languages that keep the head (${plain(currentRule().name)})`;
  const name = plain(map.name) + (map.unit ? ` (${plain(map.unit)})` : '');
  if (state.view === 'difference') return `${name}: ${plain(state.language)} − ${plain(state.minus)}`;
  return state.view === 'all' ? name : `${name}: ${plain(state.language)}`;
}

function colorAxis(panels) {
  let least = Infinity, most = -Infinity;
  for (const { values } of panels) {
    for (const value of values) { if (value < least) least = value; if (value > most) most = value; }
  }
  const bar = { thickness: 12, title: { text: state.view === 'count' ? 'languages' : plain(currentMap().unit), side: 'right' } };
  if (least < 0) { // signed: centred on 0
    const reach = Math.max(-least, most);
    return { colorscale: diverging(), cmin: -reach, cmax: reach, colorbar: bar };
  }
  return { colorscale: SEQUENTIAL, cmin: 0, cmax: most > 0 ? most : 1, colorbar: bar };
}

function drawMap() {
  const panels = panelsShown();
  const columns = panels.length > 1 ? Math.min(panels.length, mapDiv.clientWidth < 620 ? 3 : 5) : 1;
  const rows = Math.ceil(panels.length / columns);
  const traces = [];
  const cell = Math.min(18, Math.max(rows > 1 ? 3 : 6, (rows > 1 ? 260 : 560) / LAYERS));
  const height = rows * (LAYERS * cell + 46) + 90;
  const more = { height, uirevision: state.view, coloraxis: colorAxis(panels), showlegend: false, annotations: [], shapes: [],
    title: { text: mapTitle(), font: { size: 14 }, x: 0.01, xanchor: 'left', y: 1, yanchor: 'top', pad: { t: 6 } },
    dragmode: state.lasso ? 'lasso' : 'zoom', margin: { t: panels.length > 1 ? 52 : 34, r: 10, b: 40, l: 44 } };
  const unit = state.view === 'count' || !currentMap() ? 'languages' : currentMap().unit;
  panels.forEach((panel, i) => {
    const order = ranks(panel.values);
    const suffix = i ? i + 1 : '';
    const [row, column] = [Math.floor(i / columns), i % columns];
    const [gapX, gapY] = [0.02, 40 / height];
    const [width, tall] = [(1 - gapX * (columns - 1)) / columns, (1 - gapY * (rows - 1)) / rows];
    more[`xaxis${suffix}`] = { domain: [column * (width + gapX), column * (width + gapX) + width], anchor: `y${suffix}`,
      title: row === rows - 1 && column === 0 ? { text: 'head' } : undefined, showgrid: false, zeroline: false,
      range: [-0.5, HEADS - 0.5], showticklabels: row === rows - 1, ...(i ? { matches: 'x' } : {}) };
    const top = 1 - row * (tall + gapY);
    more[`yaxis${suffix}`] = { domain: [Math.max(0, top - tall), top], anchor: `x${suffix}`,
      title: column === 0 && row === 0 ? { text: 'layer' } : undefined, showgrid: false, zeroline: false,
      range: [LAYERS - 0.5, -0.5], showticklabels: column === 0, ...(i ? { matches: 'y' } : {}) };
    if (panel.title) {
      more.annotations.push({ text: panel.title, showarrow: false, xref: `x${suffix} domain`, yref: `y${suffix} domain`,
        x: 0, y: 1, xanchor: 'left', yanchor: 'bottom', font: { size: 12 } });
    }
    traces.push({ type: 'heatmap', z: grid2d(panel.values), coloraxis: 'coloraxis', ...axes(i), meta: panel.language,
      customdata: grid2d(Array.from(order, (r) => r ?? '–')),
      hovertemplate: `L%{y}H%{x}: %{z:.3~g} ${plain(unit)}, rank %{customdata} of ${known(panel.values)}<extra>${panel.title}</extra>` });
  });
  traces.push(...panels.flatMap((panel, i) => marks(panel, i)));
  more.shapes = selection(panels.length);
  return Plotly.react(mapDiv, traces, layout(more), CONFIG);
}

// The rule's heads of the panel's language, the general ones, the set, and in lasso mode a point for each head.
function marks(panel, i) {
  const points = (heads, symbol, name, size, more = {}) => ({
    type: 'scatter', mode: 'markers', ...axes(i), x: heads.map((f) => f % HEADS), y: heads.map((f) => Math.floor(f / HEADS)),
    marker: { symbol, size, color: dark() ? '#ffffff' : '#000000', line: { width: 1.5, color: '#ffffff' }, ...more }, name, hoverinfo: 'skip',
  });
  const found = [];
  const rule = currentRule();
  if (rule && state.view !== 'count') {
    found.push(points(own(rule.specific, panel.language) ?? [], 'diamond', 'specific', 7, { color: '#e0218a' }));
    found.push(points(rule.general, 'circle-open', 'general', 7, { color: '#ffffff' }));
  }
  found.push(points([...state.set], 'x', 'set', 7, { color: '#00b3a4' }));
  if (state.lasso) {
    const all = Array.from({ length: SIZE }, (_, flat) => flat);
    found.push(points(all, 'circle', 'lasso', 4, { opacity: 0.25, color: color('text'), line: { width: 0 } }));
  }
  return found;
}

function selection(panels) {
  const [layer, head] = [Math.floor(state.head / HEADS), state.head % HEADS];
  return Array.from({ length: panels }, (_, i) => ({
    type: 'rect', xref: i ? `x${i + 1}` : 'x', yref: i ? `y${i + 1}` : 'y', x0: head - 0.5, x1: head + 0.5, y0: layer - 0.5, y1: layer + 0.5,
    line: { color: '#ff3b30', width: 2.5 }, fillcolor: 'rgba(0,0,0,0)',
  }));
}

function moveSelection() {
  const panels = mapDiv.data.filter((trace) => trace.type === 'heatmap').length;
  return Plotly.relayout(mapDiv, { shapes: selection(panels) });
}

const asPython = () => {
  const heads = [...state.set].sort((a, b) => a - b);
  return `lt.HeadSet(lt.HeadGrid(${LAYERS}, ${HEADS}), [${heads.map((flat) => `"${label(flat)}"`).join(', ')}])`;
};

function drawSet() {
  element('set-size').textContent = `Set: ${state.set.size} head${state.set.size === 1 ? '' : 's'}`;
  element('code').value = asPython();
  element('take').hidden = !currentRule() || state.view === 'count';
  element('lasso').setAttribute('aria-pressed', String(state.lasso));
}

async function copySet() {
  element('code').select();
  try {
    await navigator.clipboard.writeText(asPython());
  } catch {
    document.execCommand('copy'); // where pages from disk may not write to the clipboard
  }
  element('copy').textContent = 'Copied';
  setTimeout(() => { element('copy').textContent = 'Copy as Python'; }, 1200);
}
