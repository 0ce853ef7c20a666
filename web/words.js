// The editors' words in the language of the page. Pure: language.js brings the translations.

let translations = {};

/** all: {English text: its translation}, as in locales/LANGUAGE/main.json under "montage"; undefined for English. */
export function speak(all) {
  translations = all ?? {};
}

/** A text in the language of the page, or as it is where that language lacks it. values: for its {name}s. */
export function t(text, values = {}) {
  return (translations[text] ?? text).replace(/\{(\w+)\}/g, (name, key) => values[key] ?? name);
}
