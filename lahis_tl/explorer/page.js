// State of the page, kept in the address; what changes it; what is drawn again when it changes.

const state = { score: 0, view: 'language', language: '', minus: '', rule: 0, head: 0, set: new Set(), sample: 0,
  query: undefined, theme: '', lasso: false };

const languages = [...new Set([...about.maps.flatMap((map) => map.languages), ...about.rules.flatMap((rule) => Object.keys(rule.specific))])];

function fromAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  const pick = (name, allowed, fallback) => (allowed.includes(given.get(name)) ? given.get(name) : fallback);
  const index = (name, list) => Math.max(0, list.indexOf(given.get(name)));
  state.score = index('score', about.maps.map((map) => map.name));
  state.rule = given.get('rule') === 'none' && about.maps.length ? -1 : index('rule', about.rules.map((rule) => rule.name));
  state.language = pick('language', languages, languages[0]);
  state.minus = pick('minus', languages, languages.find((language) => language !== state.language) ?? languages[0]);
  state.view = pick('view', viewsPossible(), about.maps.length ? 'language' : 'count');
  state.set = new Set((given.get('set') ?? '').split(',').map(parseLabel).filter((flat) => flat !== undefined));
  const text = Number(given.get('text') ?? NaN);
  state.sample = text in about.samples ? text : Math.max(0, sampleIn(state.language));
  state.head = parseLabel(given.get('head') ?? '') ?? best();
  state.query = undefined;
  state.theme = pick('theme', ['light', 'dark'], '');
  fitLanguages();
}

function toAddress() {
  const parts = new URLSearchParams();
  if (about.maps.length) parts.set('score', currentMap().name);
  parts.set('view', state.view);
  parts.set('language', state.language);
  if (state.view === 'difference') parts.set('minus', state.minus);
  if (about.rules.length) parts.set('rule', currentRule()?.name ?? 'none');
  parts.set('head', label(state.head));
  if (state.set.size) parts.set('set', [...state.set].map(label).join(','));
  if (about.samples.length) parts.set('text', state.sample);
  if (state.theme) parts.set('theme', state.theme);
  history.replaceState(null, '', `#${parts}`);
}

function viewsPossible() {
  const most = Math.max(0, ...about.maps.map((map) => map.languages.length));
  return [...(most ? ['language'] : []), ...(most > 1 ? ['difference', 'all'] : []), ...(about.rules.length ? ['count'] : [])];
}

// A map may lack the language that another one has.
function fitLanguages() {
  const map = currentMap();
  if (!map) return;
  if (!map.languages.includes(state.language)) [state.language] = map.languages;
  if (!map.languages.includes(state.minus)) state.minus = map.languages.find((l) => l !== state.language) ?? state.language;
  if (map.languages.length < 2 && ['difference', 'all'].includes(state.view)) state.view = 'language';
  if (state.view === 'count' && !currentRule()) state.view = 'language';
}

const sampleIn = (language) => about.samples.findIndex((sample) => sample.language === language);

// The head of highest score in the chosen language.
function best() {
  const map = about.maps[state.score];
  const values = map && (ofLanguage(map, state.language, map.values) ?? ofLanguage(map, map.languages[0], map.values));
  return values ? ranks(values).indexOf(1) : 0;
}

const HEAD_ONLY = new Set(['head', 'sample', 'query']);

function change(part) {
  Object.assign(state, part);
  fitLanguages();
  const names = Object.keys(part);
  if (names.some((name) => !HEAD_ONLY.has(name))) draw();
  else {
    if ('head' in part) { moveSelection(); drawHead(); }
    drawText();
    fillControls();
  }
  toAddress();
}

function draw() {
  document.documentElement.dataset.theme = state.theme || (matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light');
  fillControls();
  drawMap();
  drawSet();
  drawHead();
  drawText();
}

function options(select, names, values, chosen) {
  const wanted = names.map((name, i) => `${values[i]}\u0000${name}`).join('\u0001');
  if (select.dataset.wanted !== wanted) {
    select.replaceChildren(...names.map((name, i) => new Option(name, values[i])));
    select.dataset.wanted = wanted;
  }
  select.value = chosen;
  select.closest('label').hidden = names.length < 2 && select.id !== 'language';
}

function fillControls() {
  const map = currentMap();
  const known = map ? map.languages : languages;
  options(element('score'), about.maps.map((m) => m.name), about.maps.map((_, i) => i), state.score);
  const views = viewsPossible();
  for (const option of element('view').options) option.hidden = option.disabled = !views.includes(option.value);
  element('view').value = state.view;
  options(element('language'), known, known, state.language);
  options(element('minus'), known, known, state.minus);
  element('minus-label').hidden = state.view !== 'difference';
  const rules = about.rules.map((rule) => rule.name);
  const unmarked = rules.length && about.maps.length ? ['not marked'] : [];
  options(element('rule'), [...rules, ...unmarked], [...rules.keys(), -1], state.rule);
  options(element('sample'), about.samples.map((s, i) => `${s.language} · ${s.tokens.join('').replace(/\s+/g, ' ').slice(0, 40)} (${i + 1})`),
    about.samples.map((_, i) => i), state.sample);
}

function walk(key) {
  const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[key];
  if (!step) return false;
  const layer = Math.min(LAYERS - 1, Math.max(0, Math.floor(state.head / HEADS) + step[0]));
  const head = Math.min(HEADS - 1, Math.max(0, (state.head % HEADS) + step[1]));
  change({ head: layer * HEADS + head });
  return true;
}

function toggled(flat) {
  const set = new Set(state.set);
  if (!set.delete(flat)) set.add(flat);
  return set;
}

// With a language goes a text in it, where there is one.
function textIn(language) {
  const sample = sampleIn(language);
  return sample < 0 ? {} : { sample, query: undefined };
}

function listen() {
  const on = (id, event, act) => element(id).addEventListener(event, act);
  on('score', 'change', (e) => change({ score: Number(e.target.value) }));
  on('view', 'change', (e) => change({ view: e.target.value }));
  on('language', 'change', (e) => change({ language: e.target.value, ...textIn(e.target.value) }));
  on('minus', 'change', (e) => change({ minus: e.target.value }));
  on('rule', 'change', (e) => change({ rule: Number(e.target.value) }));
  on('sample', 'change', (e) => change({ sample: Number(e.target.value), query: undefined }));
  on('theme', 'click', () => change({ theme: dark() ? 'light' : 'dark' }));
  on('lasso', 'click', () => change({ lasso: !state.lasso }));
  on('clear', 'click', () => change({ set: new Set() }));
  on('take', 'click', () => {
    const rule = currentRule();
    change({ set: new Set([...state.set, ...(own(rule?.specific ?? {}, state.language) ?? [])]) });
  });
  on('copy', 'click', copySet);
  on('search', 'input', (e) => {
    const flat = parseLabel(e.target.value);
    e.target.setCustomValidity(e.target.value && flat === undefined ? `from L0H0 to ${label(SIZE - 1)}` : '');
    if (flat !== undefined) change({ head: flat });
  });
  on('tokens', 'click', (e) => {
    const position = e.target.dataset.position;
    if (position === undefined || !currentSample().pattern) return;
    change({ query: Number(position) === state.query ? undefined : Number(position) });
  });
  document.addEventListener('keydown', (e) => {
    if (/^(INPUT|SELECT|TEXTAREA)$/.test(e.target.tagName) || e.ctrlKey || e.metaKey || e.altKey) return;
    if (walk(e.key)) e.preventDefault();
    else if (e.key === ' ' && e.target.tagName !== 'BUTTON') { change({ set: toggled(state.head) }); e.preventDefault(); }
  });
  mapDiv.on('plotly_click', ({ points, event }) => {
    const flat = points[0].y * HEADS + points[0].x;
    const language = mapDiv.data[points[0].curveNumber].meta;
    const part = state.view === 'all' && language && language !== state.language ? { language, ...textIn(language) } : {};
    change(event.shiftKey ? { ...part, head: flat, set: toggled(flat) } : { ...part, head: flat });
  });
  mapDiv.on('plotly_selected', (found) => {
    const heads = (found?.points ?? []).filter((point) => point.data.name === 'lasso').map((point) => point.y * HEADS + point.x);
    if (heads.length) change({ set: new Set([...state.set, ...heads]), lasso: false });
  });
  addEventListener('hashchange', () => { fromAddress(); draw(); });
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => { if (!state.theme) draw(); });
}

if (typeof Plotly === 'undefined') {
  trouble('The plotting library could not be fetched. Open the page with a network, or write it with plotlyjs="inline".');
} else {
  element('about').textContent = `${about.model} · ${LAYERS} layers × ${HEADS} heads · ${languages.length} languages`;
  fromAddress();
  draw();
  listen();
  document.documentElement.dataset.ready = 'yes';
}
