"""Render the documentation into _docs: with Quarto where it is on PATH, otherwise with smalldocs.

Quarto is the reference renderer. smalldocs reads the same `_quarto.yml` and notebooks, but knows neither
cross-references nor offline mathematics; the functions below supply both, so that a page needs nothing but its
own site. Outputs are the ones stored in the notebooks; only imports and exported cells run.

    python tools/docs.py [--light] [--out DIR]
"""
import argparse
import ast
import html
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import yaml

ROOT = Path(__file__).resolve().parents[1]
NAMES = {"fig": "Figure", "tbl": "Table", "eq": "Equation"}
# parameters, fields and keys that happen to be called as a function of another page
OTHERWISE = "flat", "key", "lacking", "place", "rows", "smoothing", "spread"
CODE = re.compile(r"(^ *(`{3,}|~{3,}).*?^ *\2[ \t]*$|`+[^`]*`+)", re.M | re.S)
STYLE = """<style>
:root { --sd-sidebar-width: 11.5rem; --sd-margin-width: 11.5rem; --sd-body-width: 900px; --sd-gap: 1.75rem }
pre { font-size: .8125rem } :is(.cell-output pre, pre.sourceCode, pre.sourceCode code) { white-space: pre-wrap }
.cell-output pre { overflow-wrap: anywhere } .cell-output pre.columns { white-space: pre }
math [mathvariant*="bold"] { font-weight: bold } math [mathvariant="bold"] { font-style: normal }
mtd[columnalign="left"] { text-align: -webkit-left } mtd[columnalign="right"] { text-align: -webkit-right }
.equation { display: flex; justify-content: safe center; align-items: center; overflow: auto hidden; padding: .3rem 0; margin: .1rem 0 }
.equation-number { margin-left: 2em }
table.dataframe { width: auto } table.dataframe td, table.dataframe th { text-align: right; padding: .2rem .35rem }
table.numbers:not(.dataframe) :is(td, th) { padding: .2rem .5rem } table.numbers th { vertical-align: bottom } .whole { white-space: nowrap }
.words { display: inline-block; min-width: 9rem }
#quarto-search input::placeholder { color: #5c636a; opacity: 1 }
</style>"""


class DocsError(Exception):
    "A site that must not be published; the message says what to change."


def outside_code(change, text: str) -> str:
    "Apply `change` to the parts of a Markdown text that are neither fenced nor inline code."
    parts, start = [], 0
    for m in CODE.finditer(text):
        parts += [change(text[start:m.start()]), m.group()]
        start = m.end()
    return "".join(parts) + change(text[start:])


def signatures(text: str) -> str:
    "Mend what nbdev prints of `**options`, whose comment it gives to the result, and of a default None without a type."
    text = re.sub(r"(\*\*\w+)(\n\)->[^\n]*?): (# [^\n]*)", r"\1 \3\2:", text)
    return text.replace(":NoneType=None", "=None").replace("NoneType", "None")


def cross_reference(page: str, cells: list[dict]) -> None:
    "Number the figures, tables and equations of a page in order, and turn each `@fig-x` into a link."
    found: dict[str, int] = {}
    lost: list[str] = []

    def number(label: str) -> int:
        if label in found:
            raise DocsError(f"{page}: the label {label} is used twice; rename one")
        kind = label.split("-")[0]
        found[label] = 1 + sum(other.startswith(f"{kind}-") for other in found)
        return found[label]

    def caption(m: re.Match) -> str:
        return f"{m[1]}{NAMES[m['label'][:3]]} {number(m['label'])}: {m[2]}"

    def define(text: str) -> str:
        text = re.sub(r"\$\$[ \t]*\{#(eq-[\w-]+)\}", lambda m: rf"\label{{{m[1]}:{number(m[1])}}}$$", text)
        text = re.sub(r"^(: *)(.*\{#(?P<label>tbl-[\w-]+))", caption, text, flags=re.M)
        return re.sub(r"(!\[)(.*\]\(.*\)\{#(?P<label>fig-[\w-]+))", caption, text)

    def refer(text: str) -> str:
        return re.sub(r"(?<![\w\\.])@((fig|tbl|eq)-\w[\w-]*\w|(fig|tbl|eq)-\w)", link, text)

    def link(m: re.Match) -> str:
        if m[1] not in found:
            lost.append(f"@{m[1]}")
            return m[0]
        return f"[{NAMES[m[1].split('-')[0]]} {found[m[1]]}](#{m[1]})"

    for cell in cells:
        text = cell["source"]
        if cell["cell_type"] == "markdown":
            cell["source"] = outside_code(define, text)
        elif label := re.search(r"^#\| *label: *((?:fig|tbl)-[\w-]+)", text, re.M):
            title = f"{NAMES[label[1][:3]]} {number(label[1])}: "
            cell["source"] = re.sub(r"^(#\| *(?:fig|tbl)-cap: *)(.*)$",
                                    lambda m: m[1] + json.dumps(title + str(yaml.safe_load(m[2]))), text, flags=re.M)
    for cell in cells:
        if cell["cell_type"] == "markdown":
            cell["source"] = outside_code(refer, cell["source"])
        for output in cell.get("outputs", []):  # docstrings
            if text := output.get("data", {}).get("text/markdown"):
                output["data"]["text/markdown"] = signatures(outside_code(refer, "".join(text)))
    if lost:
        raise DocsError(f"{page}: {', '.join(lost)} refers to no label on this page; "
                        "correct it, or link to the other page")


def run_no_examples() -> None:
    "Have nbdev run imports and exported cells alone: an example that imports would run without the cells before it."
    from nbdev import processors
    usual = processors._do_eval

    def run(cell) -> bool:
        keep = (set(cell.directives_ or ()) & {"export", "exports", "exporti", "exec_doc"}
                or "show_doc(" in (cell.source or ""))
        if (cell.cell_type == "code" and not keep
                and not all(isinstance(s, (ast.Import, ast.ImportFrom)) for s in cell.parsed_() or ())):
            return False
        return usual(cell)

    processors._do_eval = run


def stage(folder: Path, problems: list[str]) -> str:
    "Fill `folder` with nbdev's processed notebooks, made ready for smalldocs; return the site's address."
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs

    refresh_quarto_yml()
    shutil.copytree(proc_nbs(n_workers=0, force=True), folder, dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("_docs"))
    config = yaml.safe_load((folder / "nbdev.yml").read_text())
    for key, value in yaml.safe_load((folder / "_quarto.yml").read_text()).items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
    config["project"]["output-dir"] = "_site"
    config["format"]["html"].pop("html-math-method", None)
    for key in "format-links", "metadata-files":
        config.pop(key, None)
    renamed = {}
    for path in sorted(folder.rglob("*.ipynb")):
        notebook = json.loads(path.read_text())
        page = path.relative_to(folder).as_posix()
        for cell in notebook["cells"]:
            cell["source"] = "".join(cell["source"])
            cell["metadata"].pop("execution", None)
            if cell["cell_type"] == "raw" and (name := re.search(r"^output-file: (.*)\.html\n", cell["source"], re.M)):
                cell["source"] = cell["source"].replace(name[0], "")
                renamed[path.name] = f"{name[1]}.ipynb"
        try:
            cross_reference(page, notebook["cells"])
        except DocsError as error:
            problems.append(str(error))
        path.unlink()
        path.with_name(renamed.get(path.name, path.name)).write_text(json.dumps(notebook))
    text = yaml.safe_dump(config, sort_keys=False)
    (folder / "_quarto.yml").write_text(re.sub(r"[\w.-]+\.ipynb", lambda m: renamed.get(m[0], m[0]), text))
    for path in folder.rglob("*.ipynb"):
        notebook = json.loads(path.read_text())
        for cell in notebook["cells"]:
            if cell["cell_type"] != "code":
                cell["source"] = re.sub(r"(\]\([^)\s]*?)([\w.-]+\.ipynb)", lambda m: m[1] + renamed.get(m[2], m[2]),
                                        cell["source"])
        # in signatures: the page's own classes, defaults that are paths
        path.write_text(json.dumps(notebook).replace("__main__.", "").replace(f"{ROOT}/", ""))
    return config["website"]["site-url"].rstrip("/") + "/"


def mathml(page: str, tex: str, display: bool) -> str:
    "Turn a formula into MathML; a command that the converter does not know is an error, never raw text."
    from latex2mathml.converter import convert

    label = re.search(r"\\label\{(.*?):(\d+)\}", tex)
    source = re.sub(r"(begin|end)\{aligned\}", r"\1{split}", tex.replace(label[0], "") if label else tex)
    try:
        formula = convert(source, display="block" if display else "inline")
    except Exception as error:
        raise DocsError(f"{page}: cannot read the formula {tex!r} ({type(error).__name__}); correct its TeX") from error
    if unknown := re.search(r">(\\[A-Za-z]+|&)<|(linebreak)", formula):
        what = unknown[1] or "a line break outside of aligned"
        raise DocsError(f"{page}: {what} in the formula {tex!r} is not understood; write it in other commands")
    # bars come in pairs, each as high as a letter; det is a word, as log is
    formula = formula.replace('<mo movablelimits="true">det</mo>', "<mi>det</mi>")
    bar = r"<mo(?: (?:fence|stretchy)=\"false\")*>(?=&#x(?:0007C|02016);</mo>)"
    if len(re.findall(bar, formula)) % 2 == 0:
        forms = itertools.cycle(("prefix", "postfix"))
        formula = re.sub(bar, lambda m: f'<mo stretchy="false" form="{next(forms)}">', formula)
    # log p
    formula = re.sub(r"(<mi>[a-z]{2,}</mi>)(?=<m(?:i|n|su[bp]|subsup|over)>)", r'\1<mspace width="0.17em"/>', formula)
    if not label:
        return f'<span class="equation">{formula}</span>' if display else formula
    return f'<span class="equation" id="{label[1]}">{formula}<span class="equation-number">({label[2]})</span></span>'


def of_numbers(m: re.Match) -> str:
    "Keep the short cells of a table of five columns or more, most of them numbers, on one line each."
    rows = [re.findall(r"<td\b[^>]*>(.*?)</td>", row, flags=re.S) for row in m[2].split("<tr")]
    cells = [re.sub(r"<[^>]+>", "", cell).strip() for row in rows for cell in row]
    if max(map(len, rows)) < 5 or 2 * sum(not cell or cell[0] in "0123456789+-−–" for cell in cells) < len(cells):
        return m[0]
    whole = lambda c: (f'{c[1]}<span class="whole">{c[2]}</span>' if len(c[2]) < 25 and ", " not in c[2]
                       else f'{c[1]}<span class="words">{c[2].replace(" ± ", "&nbsp;±&nbsp;")}</span>')
    head = m[1].replace('class="', 'class="numbers ', 1) if 'class="' in m[1] else f'{m[1]} class="numbers"'
    return head + re.sub(r"(<td\b[^>]*>(?:<[^>]+>)*)([^<]+)", whole, m[2])


def described(m: re.Match) -> str:
    "Give a picture its caption as the text that stands for it."
    words = " ".join(re.sub(r"<[^>]+>", "", m[2] or m[3] or "what the code above draws").split())
    return f'{m[1]} alt="{words.replace(chr(34), "&quot;")}">'


def finish(page: str, text: str, address: str, places: set[str]) -> str:
    """Make a rendered page stand alone: MathML in place of TeX, no KaTeX, links within the site
    relative and to known `places`."""
    def tex(m: re.Match) -> str:
        return mathml(page, html.unescape(m[2]), m[1] == "display")

    def reference(m: re.Match) -> str:  # a method without its own heading is described at its class
        return f'href="{"../" * page.count("/")}{m[1]}{m[2] if m[2] in places else m[2].partition(".")[0]}"'

    def caption(m: re.Match) -> str:
        words = re.sub(r"`([^`<]+)`", r"<code>\1</code>", m[2])
        return m[1] + re.sub(r"\$([^$]+)\$", lambda f: mathml(page, html.unescape(f[1]), False), words)

    text = re.sub(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', tex, text, flags=re.S)
    text = re.sub(r"(<(?:fig)?caption\b[^>]*>)(.*?)(?=</(?:fig)?caption>)", caption, text, flags=re.S)
    text = re.sub(r'<(link|script)\b[^>]*/katex@[^>]*>(</script>)?', "", text)
    text = re.sub(rf'href="{re.escape(address)}([^"#]*)((?:#[^"]*)?)"', reference, text)
    text = re.sub(rf'<a href="[^"#]+#({"|".join(OTHERWISE)})"><code>([^<]*)</code></a>', r"<code>\2</code>", text)
    text = text.replace('class="dataframe"', 'class="dataframe table table-sm"')
    text = re.sub(r"(<th\b[^>]*>AUPRO)@", r"\1<wbr>@", text)
    # printed tables are not broken into lines
    text = re.sub(r"<pre>(?=(?:(?!</pre>).)*\S {3,}\S)", '<pre class="columns">', text, flags=re.S)
    after = r"(?=\s*</p>\s*<figcaption\b[^>]*>(.*?)</figcaption>|\s*</div>\s*<div\b[^>]*>\s*<p><strong>(.*?)</strong>|)"
    text = re.sub(r"(<img\b(?![^>]*\salt=)[^>]*)>" + after, described, text, flags=re.S)
    text = re.sub(r"(<table\b[^>]*)(>.*?</table>)", of_numbers, text, flags=re.S)
    # the sidebar shows the page that it stands beside
    text = text.replace("</body>", """<script>{
  const bar = document.getElementById("quarto-sidebar"), here = bar && bar.querySelector(".sidebar-link.active")
  if (here) bar.scrollTop = here.getBoundingClientRect().top - bar.getBoundingClientRect().top - bar.clientHeight / 2
}</script></body>""", 1)
    icon = "" if 'rel="icon"' in text else '<link rel="icon" href="data:,">'  # else browsers ask for /favicon.ico
    return text.replace("</head>", STYLE + icon + "</head>", 1)


def remote_assets(site: Path) -> list[str]:
    "List everything that a page or style sheet of the site would load from another host."
    loads = re.compile(r"""<(?:script|img|iframe|source|video|audio|embed|object)\b[^>]*?\s(?:src|data)=["']?((?:https?:)?//[^"'\s>]+)
        |<link\b(?=[^>]*rel=["']?(?:stylesheet|preload|icon|modulepreload))[^>]*?\shref=["']?((?:https?:)?//[^"'\s>]+)
        |(?:@import\s+|url\()["']?((?:https?:)?//[^"')\s]+)|\bimport\b[^;'"]*["']((?:https?:)//[^"']+)""", re.X | re.I)
    files = [p for p in sorted(site.rglob("*")) if p.suffix in (".html", ".css")]
    return [f"{p.relative_to(site)}: {next(filter(None, m.groups()))}" for p in files
            for m in loads.finditer(p.read_text())]


def broken_links(site: Path) -> list[str]:
    "List the links within the site that lead to no file, or to no place on the page."
    pages = {p: re.sub(r"<(script|style)\b.*?</\1>", "", p.read_text(), flags=re.S) for p in site.rglob("*.html")}
    places = {p: set(re.findall(r'\sid="([^"]+)"', text)) for p, text in pages.items()}
    broken = []
    for page, text in pages.items():
        for link in set(re.findall(r'<[a-z][^>]*?\s(?:href|src)="([^"]*)"', text)):
            path, place = urldefrag(html.unescape(link))
            if urlsplit(path).scheme or path.startswith("//"):
                continue
            target = (page.parent / unquote(path)).resolve() if path else page
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file() or (place and target in places and unquote(place) not in places[target]):
                broken.append(f"{page.relative_to(site)}: {link}")
    return sorted(broken)


def light(out: Path) -> None:
    "Build the site with smalldocs into `out`; a warning, a remote asset or a broken link is an error."
    from smalldocs.site import build

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch).resolve()
        problems: list[str] = []
        address = stage(folder, problems)
        site = build(folder, quiet=True)
        texts = {path: path.read_text() for path in sorted(site.out.rglob("*.html"))}
        places = {f"#{name}" for text in texts.values() for name in re.findall(r'\sid="([^"]+)"', text)}
        for path, text in texts.items():
            try:
                path.write_text(finish(path.relative_to(site.out).as_posix(), text, address, places))
            except DocsError as error:
                problems.append(str(error))
        problems += site.warnings + [f"loads from another host: {a}" for a in remote_assets(site.out)]
        problems += [f"broken link: {link}" for link in broken_links(site.out)]
        if problems:
            raise DocsError("the site has problems:\n  " + "\n  ".join(problems))
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(site.out, out)


def main() -> None:
    "Render the site and say where it is."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--light", action="store_true", help="use smalldocs even where Quarto is on PATH")
    parser.add_argument("--out", type=Path, default=ROOT / "_docs", help="folder of the light renderer's site")
    args = parser.parse_args()
    out = args.out.resolve()
    os.chdir(ROOT)
    run_no_examples()
    if shutil.which("quarto") and not args.light:
        from nbdev.quarto import nbdev_docs

        nbdev_docs.__wrapped__(n_workers=0)
        out = ROOT / "_docs"
    else:
        try:
            light(out)
        except DocsError as error:
            sys.exit(f"docs: {error}")
    print(f"{len(list(out.rglob('*.html')))} pages: {out / 'index.html'}")


if __name__ == "__main__":
    main()
