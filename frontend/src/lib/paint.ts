/** Strengths become pixels: one hue on the ground, and for differences another one below zero. */

/** The channels of a colour of the theme, as the browser paints it. */
export function channelsOf(name: string): [number, number, number] {
  const context = new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true })!;
  context.fillStyle = getComputedStyle(document.documentElement).getPropertyValue(name);
  context.fillRect(0, 0, 1, 1);
  const [r, g, b] = context.getImageData(0, 0, 1, 1).data;
  return [r!, g!, b!];
}

/** Draw `width` x `height` strengths from -1 to 1, asked for by place, row by row. */
export function paint(canvas: HTMLCanvasElement, width: number, height: number, strengthAt: (place: number) => number): void {
  const context = canvas.getContext('2d')!;
  [canvas.width, canvas.height] = [width, height];
  const image = context.createImageData(width, height);
  const [up, down] = [channelsOf('--up'), channelsOf('--down')];
  for (let i = 0; i < width * height; i++) {
    const value = strengthAt(i);
    if (!value) continue;
    const [r, g, b] = value > 0 ? up : down;
    image.data[4 * i] = r;
    image.data[4 * i + 1] = g;
    image.data[4 * i + 2] = b;
    image.data[4 * i + 3] = Math.round(255 * Math.min(1, Math.abs(value)));
  }
  context.putImageData(image, 0, 0);
}
