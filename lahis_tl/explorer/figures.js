// What all figures share: colours by theme, safe text, sizes.

// plotly reads tags and entities in labels; data is only ever text.
const plain = (text) => String(text).replace(/&/g, '&amp;').replace(/</g, '&lt;').replace(/>/g, '&gt;');
const short = (value) => (value === undefined || Number.isNaN(value) ? '–' : Number(value.toPrecision(3)).toString());
const rough = (value) => Number(value.toPrecision(2)).toString(); // what is packed to a few steps
const shown = (token) => token.replace(/\n/g, '⏎').replace(/\t/g, '⇥');
const clipped = (token) => { const text = shown(token); return plain(text.length > 12 ? `${text.slice(0, 11)}…` : text); };

const dark = () => document.documentElement.dataset.theme === 'dark';
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

// Both read the same with the common kinds of colour blindness; the diverging one rests on the page's ground.
const SEQUENTIAL = 'Cividis';
const ends = () => (dark() ? { low: [253, 141, 60], high: [158, 134, 216] } : { low: [230, 97, 1], high: [94, 60, 153] });
const diverging = () => [[0, `rgb(${ends().low})`], [0.5, dark() ? '#1c1f25' : '#f7f7f7'], [1, `rgb(${ends().high})`]];

const CONFIG = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ['select2d', 'lasso2d', 'autoScale2d'] };

function layout(more) {
  const axis = { gridcolor: color('line'), zerolinecolor: color('line'), linecolor: color('line') };
  const found = {
    paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)', font: { color: color('text'), size: 12 },
    margin: { t: 30, r: 10, b: 40, l: 50 }, hoverlabel: { font: { size: 12 } },
    modebar: { bgcolor: 'rgba(0,0,0,0)', color: color('quiet'), activecolor: color('accent') }, ...more,
  };
  for (const name of Object.keys(found)) if (/^[xy]axis/.test(name)) found[name] = { ...axis, ...found[name] };
  return found;
}
