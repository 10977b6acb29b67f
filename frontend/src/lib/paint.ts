/** Strengths become pixels: one hue on the ground, and for differences another one below zero. */

const ramps = new Map<string, Uint32Array>();

/** The 256 pixels of a colour of the theme from nothing to full, as the browser paints it. */
function rampOf(name: string): Uint32Array {
  const colour = getComputedStyle(document.documentElement).getPropertyValue(name);
  const found = ramps.get(colour);
  if (found) return found;
  const context = new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true })!;
  context.fillStyle = colour;
  context.fillRect(0, 0, 1, 1);
  const [r, g, b] = context.getImageData(0, 0, 1, 1).data;
  const bytes = Uint8ClampedArray.from({ length: 1024 }, (_, i) => [r!, g!, b!, i >> 2][i & 3]!);
  const ramp = new Uint32Array(bytes.buffer);
  ramps.set(colour, ramp);
  return ramp;
}

function put(canvas: HTMLCanvasElement, width: number, height: number, pixels: Uint32Array<ArrayBuffer>): void {
  [canvas.width, canvas.height] = [width, height];
  canvas.getContext('2d', { willReadFrequently: true })!.putImageData(new ImageData(new Uint8ClampedArray(pixels.buffer), width, height), 0, 0);
}

/** Draw a square of bytes, each as strongly as `strengthOf` says, from 0 to 1; of a triangle the lower half alone. */
export function paintBytes(canvas: HTMLCanvasElement, side: number, bytes: Uint8Array, isTriangle: boolean, strengthOf: (byte: number) => number): void {
  const ramp = rampOf('--up');
  const colours = Uint32Array.from({ length: 256 }, (_, byte) => ramp[Math.round(255 * strengthOf(byte))]!);
  const pixels = new Uint32Array(side * side);
  for (let row = 0; row < side; row++) {
    const stop = row * side + (isTriangle ? row + 1 : side);
    for (let i = row * side; i < stop; i++) pixels[i] = colours[bytes[i]!]!;
  }
  put(canvas, side, side, pixels);
}

/** Draw strengths from -1 to 1, asked for by place, row by row. */
export function paint(canvas: HTMLCanvasElement, width: number, height: number, strengthAt: (place: number) => number): void {
  const [up, down] = [rampOf('--up'), rampOf('--down')];
  const pixels = new Uint32Array(width * height);
  for (let i = 0; i < pixels.length; i++) {
    const value = strengthAt(i);
    if (value) pixels[i] = (value > 0 ? up : down)[Math.round(255 * Math.min(1, Math.abs(value)))]!;
  }
  put(canvas, width, height, pixels);
}

/** Draw several squares of `from` x `from` bytes, each `side` pixels wide, at their places of one picture. */
export function paintSheet(canvas: HTMLCanvasElement, width: number, height: number, cells: { bytes: Uint8Array; x: number; y: number }[], from: number, side: number): void {
  const ramp = rampOf('--up');
  const nearest = Int32Array.from({ length: side }, (_, i) => Math.floor((i * from) / side));
  const pixels = new Uint32Array(width * height);
  for (const { bytes, x, y } of cells) {
    for (let row = 0; row < side; row++) {
      const [source, target] = [nearest[row]! * from, (y + row) * width + x];
      for (let column = 0; column < side; column++) pixels[target + column] = ramp[bytes[source + nearest[column]!]!]!;
    }
  }
  put(canvas, width, height, pixels);
}
