/** Dark or light: the system's choice until a person makes one, which is then kept in this browser. */

type Choice = 'light' | 'dark';
const KEY = 'interp-theme';
const system = matchMedia('(prefers-color-scheme: dark)');

function stored(): Choice | null {
  try {
    const choice = localStorage.getItem(KEY);
    return choice === 'light' || choice === 'dark' ? choice : null;
  } catch {
    return null; // storage is forbidden in some private windows
  }
}

export const theme = $state<{ current: Choice }>({ current: stored() ?? (system.matches ? 'dark' : 'light') });

export function applyTheme(): void {
  document.documentElement.dataset.theme = theme.current;
}

export function toggleTheme(): void {
  theme.current = theme.current === 'dark' ? 'light' : 'dark';
  try {
    localStorage.setItem(KEY, theme.current);
  } catch {
    // Then the choice lasts as long as the page.
  }
  applyTheme();
}

system.addEventListener('change', () => {
  if (stored() === null) {
    theme.current = system.matches ? 'dark' : 'light';
    applyTheme();
  }
});
