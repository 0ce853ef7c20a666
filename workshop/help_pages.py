"""Writes the help pages of the languages in locales/: what a node's words there say, as a page.

    python workshop/help_pages.py

help.json holds what only the page says, as {node: paragraph}. The page looks for docs/NODE/LANGUAGE.md first; without
one it shows docs/NODE.md, the full page in English.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "web" / "docs"
HEADINGS = {  # inputs, outputs, what each is for, and where the full page is
    "zh": ("输入", "输出", "说明", "更完整的说明（英文）：在设置中将语言切换为 English。"),
    "ja": ("入力", "出力", "説明", "詳しい説明（英語）は、設定で言語を English に切り替えると表示されます。"),
}


def table(heading: str, meaning: str, rows: dict[str, dict[str, str]]) -> list[str]:
    """Lines of a table of names and tooltips. rows: {id: {"name", "tooltip"}}."""
    if not rows:
        return []
    cells = [f"| {row['name']} | {row['tooltip'].replace('|', '/')} |" for row in rows.values()]
    return ["", f"| {heading} | {meaning} |", "| --- | --- |", *cells]


def page(language: str, node: str, words: dict, note: str | None) -> str:
    """The help page of a node. words: its part of nodeDefs.json; note: of help.json."""
    inputs, outputs, meaning, more = HEADINGS[language]
    english = (DOCS / f"{node}.md").read_text(encoding="utf-8")
    picture = re.search(r"!\[[^]]*\]\(([^)]+)\)", english)
    lines = [f"# {words['display_name']}", "", words["description"]]
    lines += ["", f"![{words['display_name']}]({picture[1]})"] if picture else []
    lines += table(inputs, meaning, words.get("inputs", {}))
    lines += table(outputs, meaning, words.get("outputs", {}))
    lines += ["", note] if note else []
    return "\n".join([*lines, "", more, ""])


def in_language(language: str, name: str) -> dict:
    """What locales/LANGUAGE/NAME.json holds."""
    return json.loads((ROOT / "locales" / language / f"{name}.json").read_text(encoding="utf-8"))


def pages() -> dict[Path, str]:
    """{file: its text} of all languages."""
    found = {}
    for language in HEADINGS:
        notes = in_language(language, "help")
        for node, words in in_language(language, "nodeDefs").items():
            found[DOCS / node / f"{language}.md"] = page(language, node, words, notes.get(node))
    return found


if __name__ == "__main__":
    for path, text in pages().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
