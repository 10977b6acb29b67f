/** What is on the screen becomes a file: JSON, CSV, or one HTML page that needs nothing else. */

export type Cell = string | number | boolean | null;

/** Rows of a table as RFC 4180 CSV. A cell that a spreadsheet would run as a formula gets an apostrophe. */
export function toCsv(header: string[], rows: Cell[][]): string {
  const cell = (value: Cell): string => {
    if (typeof value === 'number' || typeof value === 'boolean') return String(value);
    const text = value ?? '';
    const safe = /^[=+\-@\t\r]/.test(text) ? `'${text}` : text;
    return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  };
  return [header, ...rows].map((row) => row.map(cell).join(',')).join('\r\n') + '\r\n';
}

export const save = (name: string, type: string, content: string): void => saveBlob(name, new Blob([content], { type: `${type};charset=utf-8` }));

export function saveBlob(name: string, content: Blob): void {
  const address = URL.createObjectURL(content);
  const link = document.createElement('a');
  link.href = address;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

/** Runs of one colour that a picture may have to be drawn as rectangles. */
const MOST_RUNS = 20_000;
/** Labels that have room beside a picture. */
const MOST_LABELS = 128;

/** A picture as SVG: rectangles where these are few, else one image; labels down the side and across the top. */
export function toSvg(canvas: HTMLCanvasElement, title: string, labels: string[] = []): string {
  const { width, height } = canvas;
  const pixels = new Uint32Array(canvas.getContext('2d')!.getImageData(0, 0, width, height).data.buffer);
  const runs: string[] = [];
  for (let y = 0; y < height && runs.length <= MOST_RUNS; y++) {
    for (let x = 0, stop = 0; x < width; x = stop) {
      const pixel = pixels[y * width + x]!;
      for (stop = x + 1; stop < width && pixels[y * width + stop] === pixel; ) stop++;
      if (pixel >>> 24) runs.push(`<rect x="${x}" y="${y}" width="${stop - x}" height="1" fill="#${colourOf(pixel)}" fill-opacity="${((pixel >>> 24) / 255).toFixed(3)}"/>`);
    }
  }
  const drawn = runs.length <= MOST_RUNS ? `<g shape-rendering="crispEdges">${runs.join('')}</g>` : `<image width="${width}" height="${height}" style="image-rendering:pixelated" href="${canvas.toDataURL()}"/>`;
  const escape = (text: string): string => text.replace(/[<>&"]/g, (char) => `&#${char.charCodeAt(0)};`);
  const isLabelled = labels.length === width && labels.length <= MOST_LABELS;
  const room = isLabelled ? Math.min(20, Math.max(...labels.map((label) => label.length)) * 0.5 + 1) : 0;
  const write = (label: string, i: number): string => `<text x="-0.4" y="${i + 0.7}" text-anchor="end">${escape(label)}</text><text transform="translate(${i + 0.7} -0.4) rotate(-90)">${escape(label)}</text>`;
  const words = isLabelled ? `<g font-family="monospace" font-size="0.75" fill="#555">${labels.map(write).join('')}</g>` : '';
  const side = 8 * Math.max(width, 60);
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="${-room} ${-room} ${width + room} ${height + room}" width="${side}" height="${Math.round((side * (height + room)) / (width + room))}"><title>${escape(title)}</title>${drawn}${words}</svg>\n`;
}

const colourOf = (pixel: number): string => [0, 8, 16].map((shift) => ((pixel >>> shift) & 255).toString(16).padStart(2, '0')).join('');

/** The page as it is drawn now, with its styles and without its scripts. */
export function toHtml(): string {
  const inert = document.implementation.createHTMLDocument(''); // in which pictures are not loaded
  const page = inert.importNode(document.documentElement, true);
  for (const element of page.querySelectorAll('script, link, noscript, [data-screen-only]')) element.remove();
  for (const button of page.querySelectorAll('button')) button.setAttribute('disabled', '');
  for (const link of page.querySelectorAll('a[href]')) link.removeAttribute('href');
  for (const image of page.querySelectorAll('img')) image.remove();
  const drawn = document.querySelectorAll('canvas'); // a copy of a canvas is empty
  page.querySelectorAll('canvas').forEach((canvas, i) => {
    const image = inert.createElement('img');
    image.src = drawn[i]!.toDataURL();
    image.alt = canvas.getAttribute('aria-label') ?? '';
    canvas.replaceWith(image);
  });
  const rules = [...document.styleSheets].flatMap((sheet) => [...sheet.cssRules].map((rule) => rule.cssText)).filter((text) => !text.startsWith('@font-face'));
  const style = document.createElement('style');
  rules.push('img { display: block; width: 100%; height: 100%; image-rendering: pixelated }');
  style.textContent = rules.join('\n').replaceAll('</', '<\\/');
  const policy = document.createElement('meta');
  policy.httpEquiv = 'Content-Security-Policy';
  policy.content = "default-src 'none'; style-src 'unsafe-inline'; img-src data:";
  page.querySelector('head')?.append(policy, style);
  return `<!doctype html>\n${page.outerHTML}\n`;
}
