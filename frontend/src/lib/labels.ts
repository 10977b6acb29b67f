/** Clusters of the map become names on it: those of the grid that the zoom has room for, none over another. */
import type { Box } from './map';
import { Problem } from './problem';
import { visibleAlone } from './vocabulary';

const VERSION = 1;

export interface Cluster {
  /** Place from 0 to 1. */
  x: number;
  y: number;
  /** Cells each way of the grid that it was found on. */
  cells: number;
  nLatents: number;
  names: { kind: 'peaks' | 'raised'; text: string }[];
}

export interface Placed {
  cluster: Cluster;
  left: number;
  top: number;
}

/** A cell must be so many pixels wide before the names of its grid are shown. */
const LEAST_CELL = 20;
export const LABEL_HEIGHT = 20;
const GAP = 4;

/** Names on a frame of `width` by `height` pixels: coarse grids first, larger clusters first, each centred on its place and inside the frame. */
export function placeLabels(clusters: Cluster[], view: Box, width: number, height: number, measure: (cluster: Cluster) => number): Placed[] {
  const factor = width / view.size;
  const placed: (Placed & { width: number })[] = [];
  const wanted = clusters.filter(({ cells }) => factor / cells >= LEAST_CELL).sort((a, b) => a.cells - b.cells || b.nLatents - a.nLatents);
  for (const cluster of wanted) {
    const own = measure(cluster);
    const [x, y] = [(cluster.x - view.left) * factor, (cluster.y - view.top) * factor];
    const [left, top] = [x - own / 2, y - LABEL_HEIGHT / 2];
    if (left < 0 || left + own > width || top < 0 || top + LABEL_HEIGHT > height) continue;
    const isFree = placed.every((other) => left > other.left + other.width + GAP || left + own + GAP < other.left || Math.abs(top - other.top) > LABEL_HEIGHT + GAP);
    if (isFree) placed.push({ cluster, left, top, width: own });
  }
  return placed;
}

/** What stands on the map: an arrow before what features raise. Spaces around a token are not told apart. */
export function nameOf({ names }: Cluster): string {
  return names.map(({ kind, text }) => (kind === 'raised' ? '↑' : '') + visibleAlone(text.trim() || text)).join(' ');
}

export function readClusters(content: unknown): Cluster[] {
  const file = content as { format?: string; version?: number; clusters?: { x: number; y: number; cells: number; n_latents: number; names: ['peaks' | 'raised', string][] }[] };
  if (file?.format !== 'interp-assets/map-clusters' || file.version !== VERSION || !Array.isArray(file.clusters)) {
    throw new Problem(`map/clusters.json is '${file?.format}' version ${file?.version}; these pages read version ${VERSION}.`, (file?.version ?? 0) > VERSION ? 'Upgrade interp-assets.' : 'Materialize `feature_browser` again.');
  }
  return file.clusters.map(({ x, y, cells, n_latents: nLatents, names }) => ({ x: x / 65535, y: y / 65535, cells, nLatents, names: names.map(([kind, text]) => ({ kind, text })) }));
}
