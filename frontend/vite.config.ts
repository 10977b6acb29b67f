import { svelte } from '@sveltejs/vite-plugin-svelte';
import { defineConfig } from 'vitest/config';

// Relative addresses, so that the pages work below any path; no inlined assets, because the content security policy forbids data: URLs.
export default defineConfig({
  base: './',
  plugins: [svelte()],
  build: { target: 'es2022', assetsInlineLimit: 0, modulePreload: { polyfill: false }, reportCompressedSize: false },
  server: { proxy: { '/api': 'http://127.0.0.1:8420', '/bundles': 'http://127.0.0.1:8420' } },
  test: { include: ['tests/**/*.test.ts'], environment: 'node' },
});
