// The chosen head: its score in every language, with all that is known about it.

function setsOf(flat) {
  const rule = currentRule();
  if (!rule) return '';
  const specific = Object.keys(rule.specific).filter((language) => rule.specific[language].includes(flat));
  const parts = [];
  if (specific.length) parts.push(`specific to ${specific.join(', ')}`);
  if (rule.general.includes(flat)) parts.push('general');
  const kept = Object.values(rule.kept).filter((heads) => heads.includes(flat)).length;
  parts.push(`kept by ${kept} of ${Object.keys(rule.kept).length} languages`);
  return `${rule.name}: ${parts.join(', ')}`;
}

function knowledge(map, language, flat) {
  const values = ofLanguage(map, language, map.values);
  const certain = (name) => ofLanguage(map, language, map.certain[name])?.[flat];
  return { value: values?.[flat], rank: values && ranks(values)[flat], lower: certain('lower'), upper: certain('upper'),
    selection: certain('selection'), verified: certain('verified') };
}

function drawHead() {
  const flat = state.head;
  const map = currentMap();
  element('head-name').textContent = `Head ${label(flat)}`;
  element('head-sets').textContent = setsOf(flat);
  if (!map) return undefined;
  const rows = map.languages.map((language) => ({ language, ...knowledge(map, language, flat) }));
  drawFacts(rows, map, flat);
  return drawScores(rows, map);
}

// As with the pattern: the axes are drawn anew only if they change.
let scoresDrawn = '';
function drawScores(rows, map) {
  const withInterval = rows.some((row) => row.lower !== undefined);
  const y = rows.map((row) => row.value);
  const above = rows.map((row) => Math.max(0, row.upper - row.value));
  const below = rows.map((row) => Math.max(0, row.value - row.lower));
  const wanted = `${state.score} ${state.language} ${dark()}`;
  if (scoresDrawn === wanted) {
    const bars = withInterval ? { 'error_y.array': [above], 'error_y.arrayminus': [below] } : {};
    return Plotly.restyle('scores', { y: [y], ...bars }, [0]);
  }
  scoresDrawn = wanted;
  const trace = { type: 'scatter', mode: 'markers', x: rows.map((row) => plain(row.language)), y,
    marker: { size: rows.map((row) => (row.language === state.language ? 12 : 8)), color: color('accent') },
    hovertemplate: '%{x}: %{y:.3~g}<extra></extra>' };
  if (withInterval) {
    trace.error_y = { type: 'data', symmetric: false, thickness: 1.5, color: color('quiet'), array: above, arrayminus: below };
  }
  const title = `${plain(map.name)} by language${withInterval ? `, ${map.level}% intervals` : ''}`;
  return Plotly.react('scores', [trace], layout({ height: 230, margin: { t: 34, r: 10, b: 34, l: 62 },
    title: { text: title, font: { size: 13 }, x: 0.01, xanchor: 'left' },
    xaxis: { type: 'category' }, yaxis: { title: { text: plain(map.unit) }, rangemode: 'tozero', zeroline: true } }), CONFIG);
}

function drawFacts(rows, map, flat) {
  const exact = about.maps.find((other) => other.exact && other !== map);
  const columns = [['language', (row) => row.language], [map.unit || 'score', (row) => short(row.value)]];
  const has = (name) => rows.some((row) => row[name] !== undefined);
  if (has('lower')) columns.push([`${map.level}% interval`, (row) => `${short(row.lower)} to ${short(row.upper)}`]);
  const ranked = known(ofLanguage(map, map.languages[0], map.values));
  columns.push([`rank of ${ranked}`, (row) => row.rank ?? '–']);
  if (has('selection')) columns.push([`in top ${map.topK ?? 'k'}`, (row) => `${Math.round(row.selection * 100)} %`]);
  if (has('verified')) columns.push(['how', (row) => (row.verified ? 'exact' : 'estimate')]);
  if (exact) {
    columns.push(['exact effect', (row) => {
      const found = knowledge(exact, row.language, flat);
      const interval = found.lower === undefined ? '' : ` (${short(found.lower)} to ${short(found.upper)})`;
      return found.value === undefined || Number.isNaN(found.value) ? '–' : `${short(found.value)}${interval}`;
    }]);
  }
  const cell = (tag, text) => Object.assign(document.createElement(tag), { textContent: text });
  const head = document.createElement('thead');
  head.append(document.createElement('tr'));
  head.firstChild.append(...columns.map(([name]) => cell('th', name)));
  const body = document.createElement('tbody');
  for (const row of rows) {
    const line = document.createElement('tr');
    line.className = row.language === state.language ? 'current' : '';
    line.append(...columns.map(([, text]) => cell('td', text(row))));
    body.append(line);
  }
  element('facts').replaceChildren(head, body);
}
