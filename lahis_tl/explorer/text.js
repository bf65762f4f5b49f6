// The chosen head on sample texts: effect of every token, attention, the tokens it works on most.

const currentSample = () => about.samples[state.sample];

function drawText() {
  const sample = currentSample();
  element('texts').hidden = !sample;
  if (!sample) return undefined;
  drawTokens(sample);
  drawExtremes();
  return drawPattern(sample);
}

// By most letters, not by the first: a text may begin with a special token in Latin letters.
function direction(tokens) {
  const letters = tokens.join('').match(/\p{L}/gu) ?? [];
  const rightToLeft = letters.filter((letter) => /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]/.test(letter));
  return rightToLeft.length * 2 > letters.length ? 'rtl' : 'ltr';
}

function tint(share) {
  const end = share < 0 ? ends().low : ends().high;
  return `rgba(${end}, ${(0.75 * Math.min(1, Math.abs(share))).toFixed(3)})`;
}

function drawTokens(sample) {
  const effects = sample.effects && effectsOf(sample, state.head);
  const attended = state.query !== undefined && sample.pattern ? patternOf(sample, state.head)[state.query] : undefined;
  const most = effects ? Math.max(...effects.map(Math.abs)) || 1 : 1;
  const spans = sample.tokens.map((token, i) => {
    const span = document.createElement('span');
    span.textContent = shown(token) || ' ';
    span.dataset.position = i;
    if (attended) {
      const weight = attended[i] ?? 0;
      span.style.background = `rgba(${ends().high}, ${(0.85 * Math.sqrt(weight)).toFixed(3)})`;
      span.title = `attention ≈ ${weight.toFixed(2)}`;
    } else if (effects) {
      span.style.background = tint(effects[i] / most);
      span.title = `effect ≈ ${rough(effects[i])} nats`;
    }
    if (i === state.query) span.className = 'query';
    return span;
  });
  element('tokens').replaceChildren(...spans);
  element('tokens').dir = direction(sample.tokens);
  element('legend').textContent = attended
    ? `Attention of the outlined token with ${label(state.head)}, to within 0.07. Click it again for effects.`
    : `${effects ? `Effect of ${label(state.head)} at each token: violet helps, orange hurts; darkest ${short(most)} nats. ` : ''}`
      + `${sample.pattern ? 'Click a token to see what it attends to.' : ''}`;
}

// Axes and their tokens take most of the time: on the same text only the weights are drawn anew.
let patternDrawn = '';
function drawPattern(sample) {
  element('attention').hidden = !sample.pattern;
  if (!sample.pattern) return undefined;
  const rows = patternOf(sample, state.head);
  const wanted = `${state.sample} ${dark()}`;
  if (patternDrawn === wanted) return Plotly.restyle('pattern', { z: [rows] }, [0]);
  patternDrawn = wanted;
  const places = sample.tokens.map((_, i) => i);
  const names = sample.tokens.map(clipped);
  const side = Math.max(300, Math.min(620, 15 * names.length));
  const trace = { type: 'heatmap', z: rows, colorscale: SEQUENTIAL, zmin: 0, zmax: 1, hoverongaps: false,
    customdata: rows.map((row, q) => row.map((_, k) => `${names[q]} → ${names[k]}`)),
    hovertemplate: '%{customdata}: %{z:.2f}<extra></extra>', colorbar: { thickness: 10, title: { text: 'attention', side: 'right' } } };
  const axis = { tickvals: places, ticktext: names, showgrid: false, zeroline: false, tickfont: { size: 10 } };
  return Plotly.react('pattern', [trace], layout({ height: side + 105, margin: { t: 6, r: 10, b: 90, l: 90 },
    xaxis: { ...axis, tickangle: -90, title: { text: 'attended token' }, range: [-0.5, names.length - 0.5] },
    yaxis: { ...axis, title: { text: 'attending token' }, range: [names.length - 0.5, -0.5] } }), CONFIG);
}

// A further byte of a character is shown as "·"; the character stands where it began.
function wholeToken(tokens, i) {
  let start = i;
  while (start > 0 && tokens[start] === '·') start -= 1;
  return tokens[start];
}

// Over all samples: where the head helps most and hurts most.
function drawExtremes() {
  const found = [];
  about.samples.forEach((sample, number) => {
    if (sample.effects) effectsOf(sample, state.head).forEach((effect, i) => found.push({ effect, number, i, sample }));
  });
  found.sort((a, b) => b.effect - a.effect);
  const list = (title, items) => {
    const heading = Object.assign(document.createElement('h3'), { textContent: title });
    return [heading, ...items.map(({ effect, number, i, sample }) => {
      const button = Object.assign(document.createElement('button'), { type: 'button' });
      const token = Object.assign(document.createElement('bdi'), { textContent: shown(wholeToken(sample.tokens, i)).trim() || '␣' });
      button.append(token, ` ${rough(effect)} · ${sample.language}`);
      button.title = sample.tokens.slice(Math.max(0, i - 6), i + 3).join('');
      button.addEventListener('click', () => change({ sample: number, query: undefined }));
      return button;
    })];
  };
  element('extremes').replaceChildren(...(found.length ? [
    ...list('Helps most at (nats)', found.slice(0, 6).filter((row) => row.effect > 0)),
    ...list('Hurts most at (nats)', found.slice(-6).reverse().filter((row) => row.effect < 0)),
  ] : []));
}
