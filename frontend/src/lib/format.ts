/** Numbers become text that people read at a glance. */

const counts = new Intl.NumberFormat('en');

export function formatCount(value: number): string {
  return counts.format(value);
}

/** 12,345,678 as 12.3M. */
export function formatShort(value: number): string {
  for (const [size, unit] of [[1e9, 'B'], [1e6, 'M'], [1e3, 'k']] as const) {
    if (value >= size) return `${significant(value / size, 3)}${unit}`;
  }
  return formatCount(value);
}

/** Three significant digits, without exponent where that is readable; zeros are kept, so that columns align. */
export function formatValue(value: number): string {
  if (value === 0) return '0';
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-4) return minus(value.toExponential(1));
  return minus(size >= 1000 ? counts.format(Math.round(value)) : value.toPrecision(3));
}

/** A term of a sum: three decimals, so that terms can be added by eye. */
export function formatTerm(value: number): string {
  return minus(value.toFixed(3));
}

/** A value on an axis or in a sentence: no more digits than it needs. */
export function formatTick(value: number): string {
  if (value === 0) return '0';
  const size = Math.abs(value);
  return minus(size >= 1e4 || size < 1e-3 ? value.toExponential(0) : String(Number(value.toPrecision(3))));
}

/** A share of the tokens in percent with two digits, as many as that needs: 0.0341 as 3.4 %. */
export function formatShare(value: number): string {
  if (value === 0) return '0 %';
  const percent = value * 100;
  if (percent < 1e-3) return `${minus(percent.toExponential(1))} %`;
  return `${percent >= 10 ? percent.toFixed(0) : percent.toPrecision(2)} %`;
}

/** The same share as "1 in 29". */
export function formatOneIn(value: number): string {
  return value > 0 ? `1 in ${formatShort(Math.round(1 / value))}` : 'never';
}

export function formatBytes(value: number): string {
  for (const [size, unit] of [[1 << 30, 'GiB'], [1 << 20, 'MiB'], [1 << 10, 'KiB']] as const) {
    if (value >= size) return `${significant(value / size, 3)} ${unit}`;
  }
  return `${value} B`;
}

/** A minus sign instead of a hyphen, and no plus in exponents. */
function minus(text: string): string {
  return text.replace('e+', 'e').replaceAll('-', '−');
}

function significant(value: number, digits: number): string {
  const text = value.toPrecision(digits);
  const plain = text.includes('e') ? String(Number(text)) : text;
  return plain.includes('.') ? plain.replace(/\.?0+$/, '') : plain;
}
