import js from "@eslint/js";
import globals from "globals";

export default [
  js.configs.recommended,
  {
    rules: {
      eqeqeq: ["error", "always", { null: "ignore" }],
      "no-unused-vars": ["error", { varsIgnorePattern: "^_" }],
      "no-var": "error",
      "prefer-const": "error",
    },
  },
  { files: ["web/**"], languageOptions: { globals: globals.browser } },
  // The tests run in Node and hand functions to a page.
  { files: ["tests/web/**"], languageOptions: { globals: { ...globals.node, ...globals.browser } } },
];
