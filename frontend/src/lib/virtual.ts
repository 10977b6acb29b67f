/**
 * Which rows of a very long list are in view. Browsers cap the height of an element near 33 million pixels, so a list that would be higher
 * gets a scroll bar of `MAX_HEIGHT` whose position is proportional: ten million rows scroll like ten.
 */
export const MAX_HEIGHT = 12_000_000;

export interface View {
  /** First and last (exclusive) row to draw. */
  first: number;
  last: number;
  /** Pixels from the top of the scrolled content to row `first`. */
  top: number;
}

export function contentHeight(nRows: number, rowHeight: number): number {
  return Math.min(nRows * rowHeight, MAX_HEIGHT);
}

export function viewAt(scrollTop: number, viewHeight: number, rowHeight: number, nRows: number, overscan = 6): View {
  const real = nRows * rowHeight;
  const shown = contentHeight(nRows, rowHeight);
  const room = shown - viewHeight;
  const scrolled = Math.max(0, Math.min(scrollTop, Math.max(0, room)));
  const offset = real > shown && room > 0 ? (scrolled / room) * (real - viewHeight) : scrolled;
  const first = Math.max(0, Math.floor(offset / rowHeight) - overscan);
  const last = Math.min(nRows, Math.ceil((offset + viewHeight) / rowHeight) + overscan);
  return { first, last, top: first * rowHeight - offset + scrolled };
}

/** Scroll position that brings a row into view, moving as little as possible. */
export function scrollTo(row: number, scrollTop: number, viewHeight: number, rowHeight: number, nRows: number): number {
  const real = nRows * rowHeight;
  const room = contentHeight(nRows, rowHeight) - viewHeight;
  if (room <= 0) return 0;
  const ratio = (real - viewHeight) / room;
  const offset = scrollTop * ratio;
  const wanted = Math.min(Math.max(offset, (row + 1) * rowHeight - viewHeight), row * rowHeight);
  return Math.max(0, Math.min(room, wanted / ratio));
}
