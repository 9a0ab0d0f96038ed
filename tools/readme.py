"""Write README.md from nbs/index.ipynb, or with --check say whether it is up to date.

    python tools/readme.py [--check]
"""
import base64
import difflib
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURES: dict[str, bytes] = {}
BANNER = "<!-- Generated from nbs/index.ipynb by `make export`. Edit the notebook, not this file. -->"


def directives(source: str) -> str:
    "The lines of a code cell that are directives (`#| name`)."
    return "\n".join(line for line in source.splitlines() if line.startswith("#|"))


def option(name: str, source: str) -> str | None:
    "The value of a cell option such as `#| label: fig-x`."
    found = re.search(rf'^#\| *{name}: *"?(.*?)"?$', source, re.M)
    return found and found.group(1)


def picture(png: str, source: str) -> str:
    "The Markdown of a figure, whose file is named by the cell's label; the file is written when README.md is."
    path = f"nbs/images/{option('label', source)}.png"
    PICTURES[path] = base64.b64decode(png)
    return f"![{option('fig-cap', source)}]({path})"


def output(out: dict, source: str) -> str:
    "The Markdown of one stored output: a picture, Markdown as it is, text as a code block, other kinds not at all."
    if png := out.get("data", {}).get("image/png"):
        return picture(png, source)
    data = {"text/plain": out.get("text", "")} if out["output_type"] == "stream" else out.get("data", {})
    kind = next((k for k in ("text/markdown", "text/plain") if data.get(k)), None)
    text = "".join(data.get(kind, "")).rstrip()
    return text if kind == "text/markdown" or not text else f"```\n{text}\n```"


def blocks(cell: dict) -> list[str]:
    "The Markdown blocks of one cell."
    source = "".join(cell["source"]).strip()
    if cell["cell_type"] == "markdown":
        return [re.sub(r"(\]\()(?=[\w./-]+\.ipynb)", r"\1nbs/", source)]  # the notebook's neighbours, seen from the top
    if cell["cell_type"] != "code" or re.search(r"^#\| *(hide|include: *false)\b", directives(source), re.M):
        return []
    code = "\n".join(line for line in source.splitlines() if not line.startswith("#|")).strip()
    hidden = re.search(r"^#\| *echo: *false", directives(source), re.M)
    return (([] if hidden or not code else [f"```python\n{code}\n```"])
            + [text for o in cell["outputs"] if (text := output(o, source))])


def readme() -> str:
    "The text of README.md, as the notebook has it."
    cells = json.loads((ROOT / "nbs/index.ipynb").read_text(encoding="utf-8"))["cells"]
    return "\n\n".join([BANNER, *(block for cell in cells for block in blocks(cell))]) + "\n"


def main() -> None:
    "Write the file, or compare it."
    path, new = ROOT / "README.md", readme()
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    if "--check" not in sys.argv:
        for name, content in PICTURES.items():
            (ROOT / name).parent.mkdir(exist_ok=True)
            (ROOT / name).write_bytes(content)
        if new != old:
            path.write_text(new, encoding="utf-8")
            print("wrote README.md")
    elif new != old:
        sys.stdout.writelines(difflib.unified_diff(old.splitlines(True), new.splitlines(True), "README.md",
                                                   "nbs/index.ipynb"))
        sys.exit("README.md differs from nbs/index.ipynb; run: make export")


if __name__ == "__main__":
    main()
