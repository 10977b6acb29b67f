/** Columns of numbers as `interp_assets/visualize/digits.py` writes them: 91 printable characters, small numbers the shortest. */
const BASE = 91;
const ONE = 48;
const PAIR_LEADS = 36;
const FIRST_PAIR = ONE;
const FIRST_TRIPLE = FIRST_PAIR + PAIR_LEADS * BASE;
const FIRST_QUAD = FIRST_TRIPLE + 5 * BASE ** 2;
const FIRST_LONG = FIRST_QUAD + BASE ** 3;
const FIRST_CODE = 0x23;
const BACKSLASH = 0x5c;

function digitAt(text: string, at: number): number {
  const code = text.charCodeAt(at); // NaN beyond the end
  const digit = code - FIRST_CODE - (code > BACKSLASH ? 1 : 0);
  if (!(digit >= 0 && digit < BASE) || code === BACKSLASH) throw new RangeError('a column of numbers is cut off or holds another character');
  return digit;
}

export function decodeNumbers(text: string): number[] {
  const numbers: number[] = [];
  for (let at = 0; at < text.length; ) {
    const lead = digitAt(text, at++);
    if (lead < ONE) {
      numbers.push(lead);
      continue;
    }
    const [first, more, high] =
      lead < ONE + PAIR_LEADS ? [FIRST_PAIR, 1, lead - ONE] : lead < BASE - 2 ? [FIRST_TRIPLE, 2, lead - ONE - PAIR_LEADS] : lead === BASE - 2 ? [FIRST_QUAD, 3, 0] : [FIRST_LONG, 7, 0];
    let number = high;
    for (let i = 0; i < more; i++) number = number * BASE + digitAt(text, at++);
    numbers.push(first + number);
  }
  return numbers;
}

/** Decimals of some significant digits, written as how far they lie below 10^(exponent + 1). */
export function decodeDecimals(text: string, exponent: number, digits: number): number[] {
  const [steps, largest] = [9 * 10 ** (digits - 1), 10 ** digits - 1];
  return decodeNumbers(text).map((code) => Number(`${largest - (code % steps)}e${exponent - Math.floor(code / steps) - digits + 1}`));
}
