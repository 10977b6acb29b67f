/** Values become places: intensities of colour, ticks and bars of charts. */

/**
 * Strength of a token's background, 0 to 1: weak firings stay visible, the feature's maximum is full. Slightly convex, because thresholds make
 * most firings of an SAE start well above zero.
 */
export function intensity(value: number, max: number): number {
  if (!(value > 0) || !(max > 0)) return 0;
  return 0.14 + 0.86 * Math.min(1, value / max) ** 1.4;
}

/** Powers of ten from 1 up to `max`: ticks of a logarithmic axis of counts. */
export function countTicks(max: number): number[] {
  const ticks: number[] = [];
  for (let tick = 1; tick <= max; tick *= 10) ticks.push(tick);
  return ticks.length > 4 ? ticks.filter((_, i) => i % 2 === 0) : ticks;
}

/** Place of a count on a logarithmic axis, 0 to 1; a single firing is still seen. */
export function logHeight(count: number, max: number): number {
  return count > 0 && max > 0 ? Math.log10(count + 1) / Math.log10(max + 1) : 0;
}

/** Round numbers inside [low, high], at most `n`, on a linear axis. */
export function linearTicks(low: number, high: number, n = 5): number[] {
  const raw = (high - low) / n;
  if (!(raw > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * ([1, 2, 5, 10].find((m) => m * power >= raw) ?? 10);
  const ticks: number[] = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high + step * 1e-9; tick += step) ticks.push(Math.abs(tick) < step * 1e-9 ? 0 : tick);
  return ticks;
}

/** Round numbers inside [low, high] on a logarithmic axis: 1-2-5 steps, thinned to powers of ten and further where there are more than `n`;
 * equal steps where the range is short. */
export function logTicks(low: number, high: number, n = 6): number[] {
  if (!(low > 0) || !(high >= low)) return [];
  if (high < 5 * low) return linearTicks(low, high, n);
  for (const digits of [[1, 2, 5], [1, 3], [1]]) {
    const ticks = roundNumbers(low, high, digits, 1);
    if (ticks.length <= n) return ticks;
  }
  const stride = Math.ceil(roundNumbers(low, high, [1], 1).length / n);
  return roundNumbers(low, high, [1], stride);
}

function roundNumbers(low: number, high: number, digits: number[], stride: number): number[] {
  const ticks: number[] = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
    if (power % stride !== 0) continue;
    for (const digit of digits) {
      const tick = Number(`${digit}e${power}`);
      if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push(tick);
    }
  }
  return ticks;
}

/** Place of a value between `low` and `high` on a logarithmic axis, 0 to 1. */
export function logPlace(value: number, low: number, high: number): number {
  return high > low ? (Math.log(value) - Math.log(low)) / (Math.log(high) - Math.log(low)) : 0.5;
}
