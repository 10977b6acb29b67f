/** The map's tiles: which of them a view needs, and what lies in them. */

const TILE_BYTES = 20;
const POINT_BYTES = 10;
/** Never more points than this on the page. */
export const MAX_POINTS = 1_000_000;

export interface Tile {
  depth: number;
  x: number;
  y: number;
  first: number;
  count: number;
}

/** Part of the map in view: places from 0 to 1. */
export interface Box {
  left: number;
  top: number;
  size: number;
  /** Height by width. */
  aspect: number;
}

export interface Points {
  x: Float32Array;
  y: Float32Array;
  latent: Uint32Array;
  heat: Uint8Array;
}

export function readTiles(data: ArrayBuffer): Tile[] {
  const view = new DataView(data);
  return Array.from({ length: Math.floor(data.byteLength / TILE_BYTES) }, (_, i) => {
    const [depth, x, y, first, count] = [0, 4, 8, 12, 16].map((at) => view.getUint32(i * TILE_BYTES + at, true)) as [number, number, number, number, number];
    return { depth, x, y, first, count };
  });
}

/** Tiles over a box, coarsest first, until `room` points. */
export function tilesOver(tiles: Tile[], box: Box, room: number): Tile[] {
  const found: Tile[] = [];
  let points = 0;
  for (const tile of tiles) {
    const size = 1 / 2 ** tile.depth;
    const isOver = tile.x * size < box.left + box.size && (tile.x + 1) * size > box.left && tile.y * size < box.top + box.size * box.aspect && (tile.y + 1) * size > box.top;
    if (!isOver) continue;
    if (points + tile.count > room) break;
    points += tile.count;
    found.push(tile);
  }
  return found;
}

export const bytesOf = (tile: Tile): { start: number; stop: number } => ({ start: tile.first * POINT_BYTES, stop: (tile.first + tile.count) * POINT_BYTES });

/** The cosine of two directions; 0 where one has no length. */
export function cosine(a: ArrayLike<number>, b: ArrayLike<number>): number {
  let [product, squareA, squareB] = [0, 0, 0];
  for (let i = 0; i < a.length; i++) {
    product += a[i]! * b[i]!;
    squareA += a[i]! ** 2;
    squareB += b[i]! ** 2;
  }
  return squareA && squareB ? product / Math.sqrt(squareA * squareB) : 0;
}

export function readPoints(data: ArrayBuffer): Points {
  const view = new DataView(data);
  const n = Math.floor(data.byteLength / POINT_BYTES);
  const points = { x: new Float32Array(n), y: new Float32Array(n), latent: new Uint32Array(n), heat: new Uint8Array(n) };
  for (let i = 0; i < n; i++) {
    points.x[i] = view.getUint16(i * POINT_BYTES, true) / 65535;
    points.y[i] = view.getUint16(i * POINT_BYTES + 2, true) / 65535;
    points.latent[i] = view.getUint32(i * POINT_BYTES + 4, true);
    points.heat[i] = view.getUint8(i * POINT_BYTES + 8);
  }
  return points;
}
