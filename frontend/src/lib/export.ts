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
