/** The one tooltip of the page: what it says and where it stands. */
export interface Tip {
  text: string;
  ids: string;
  value: number;
  share: number;
  note: string;
}

export const tip = $state<{ shown: (Tip & { x: number; y: number; isBelow: boolean }) | null }>({ shown: null });

export function showTip(element: Element, content: Tip): void {
  const box = element.getClientRects()[0] ?? element.getBoundingClientRect();
  const isBelow = box.top < 120;
  const x = Math.max(110, Math.min(innerWidth - 110, box.left + box.width / 2));
  tip.shown = { ...content, x, y: isBelow ? box.bottom + 8 : box.top - 8, isBelow };
}

export function hideTip(): void {
  tip.shown = null;
}
