"""The documentation site: every page loads in a browser, complete, from its own files alone."""
import fcntl
import functools
import importlib.util
import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("docs", ROOT / "tools/docs.py")
docs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(docs)
FLAGS = """--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-background-networking
    --disable-component-update --disable-sync --disable-extensions --no-first-run --no-default-browser-check
    --remote-debugging-port=0""".split()


class Browser:
    "A headless Chromium driven over its DevTools protocol."

    def __init__(self, program: str, profile: Path):
        from websocket import create_connection
        flags = [*FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen([program, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port_file, deadline = profile / "DevToolsActivePort", time.monotonic() + 60
        while not port_file.exists() or len(port_file.read_text().splitlines()) < 2:
            assert self.process.poll() is None, f"{program} ended with code {self.process.returncode} at its start"
            assert time.monotonic() < deadline, f"{program} opened no DevTools port within 60 s"
            time.sleep(0.05)
        port, path = port_file.read_text().splitlines()
        self.socket = create_connection(f"ws://127.0.0.1:{port}{path}", timeout=60, suppress_origin=True)
        self.count, self.events, self.session = 0, [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in "Page", "Network", "Runtime", "Log":
            self.call(f"{domain}.enable")
        self.call("Network.setCacheDisabled", cacheDisabled=True)

    def receive(self) -> dict:
        "The next message, kept among the events if it is one."
        message = json.loads(self.socket.recv())
        if "method" in message:
            self.events.append(message)
        return message

    def call(self, method: str, **params) -> dict:
        "Send a command and return its result."
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        self.socket.send(json.dumps(message | ({"sessionId": self.session} if self.session else {})))
        while (answer := self.receive()).get("id") != self.count:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def visit(self, url: str) -> list[str]:
        "Load a page and return what went wrong: failed requests, console errors, uncaught exceptions."
        self.events.clear()
        answer = self.call("Page.navigate", url=url)
        while "errorText" not in answer and not any(e["method"] == "Page.loadEventFired" for e in self.events):
            self.receive()
        settle = "new Promise(done => setTimeout(done, 100))"  # scripts that run after the load event
        self.call("Runtime.evaluate", expression=settle, awaitPromise=True)
        return [p for e in self.events if (p := problem(e["method"], e["params"]))]

    def close(self):
        "End the browser that this object started."
        try:
            self.socket.close()
        finally:
            self.process.terminate()
            self.process.wait(30)


def problem(method: str, p: dict) -> str | None:
    "What a DevTools event reports as wrong, if anything."
    if method == "Network.loadingFailed":
        return f"request failed: {p['errorText']}"
    if method == "Network.responseReceived" and p["response"]["status"] >= 400:
        return f"status {p['response']['status']}: {p['response']['url']}"
    if method == "Runtime.exceptionThrown":
        return f"exception: {p['exceptionDetails']['text']}"
    if method == "Runtime.consoleAPICalled" and p["type"] in ("error", "assert"):
        return f"console: {[a.get('value', a.get('description')) for a in p['args']]}"
    if method == "Log.entryAdded" and p["entry"]["level"] == "error":
        return f"log: {p['entry']['text']} {p['entry'].get('url', '')}"
    return None


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    "The site, built by the renderer that needs no Quarto."
    out = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "tools/docs.py", "--light", "--out", str(out)]
    with open(tmp_path_factory.getbasetemp().parent / "docs.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # nbdev's folder _proc is one for all workers of pytest
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    "One browser for all pages, or a skip that says what is missing."
    names = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"
    found = [p for n in names
             if (p := shutil.which(n)) and subprocess.run([p, "--version"], capture_output=True).returncode == 0]
    if not found:
        pytest.skip(f"no browser on PATH (looked for {', '.join(names)}): pages were not loaded")
    browser = Browser(found[0], tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def serve():
    "A function that serves a folder on localhost and returns its address."
    servers = []

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    def start(folder: Path) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_every_page_loads(site, browser, serve):
    "No page of the site has a failed request, a console error or an uncaught exception."
    address = serve(site)
    pages = sorted(p.relative_to(site).as_posix() for p in site.rglob("*.html"))
    assert "index.html" in pages
    problems = {page: found for page in pages if (found := browser.visit(f"{address}/{page}"))}
    assert not problems


@pytest.mark.parametrize("fault, word", [
    ('<img src="missing.png">', "status 404"),
    ('<script>console.error("planted")</script>', "planted"),
    ('<script>throw new Error("planted")</script>', "exception"),
    ('<script src="http://127.0.0.1:9/x.js"></script>', "request failed"),
    ("", None)])
def test_browser_check_sees_faults(fault, word, browser, serve, tmp_path):
    "The check above fails on planted faults, and only on them."
    (tmp_path / "page.html").write_text(f'<!doctype html><link rel="icon" href="data:,"><title>x</title>{fault}')
    problems = browser.visit(f"{serve(tmp_path)}/page.html")
    assert bool(problems) == bool(word) and (not word or any(word in p for p in problems)), problems


def page_of(site: Path, path: Path) -> Path:
    "The page of a notebook, under its short name."
    name = path.stem.lstrip("0123456789")
    name = name.partition("_")[2] if name != path.stem else name
    return (site / path.relative_to(ROOT / "nbs")).with_name(f"{name}.html")


def test_every_notebook_has_its_page(site):
    "Each listed notebook is a page under its short name, and has kept its stored outputs."
    for path in (ROOT / "nbs").rglob("[!_.]*.ipynb"):
        page = page_of(site, path)
        assert page.is_file(), f"{path.name} has no page {page.relative_to(site)}"
        cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
        hidden = ("#| hide", "#| export", "#| output: false", "#| include: false")
        images = sum("image/png" in o.get("data", {}) for c in cells if not "".join(c["source"]).startswith(hidden)
                     for o in c["outputs"])
        assert page.read_text().count('src="data:image/png') >= images, f"{page.name} lost pictures of {path.name}"


def test_pages_show_the_source(site):
    "Every cell marked `exports` stands on its page."
    for path in (ROOT / "nbs").rglob("[!_.]*.ipynb"):
        shown = ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
        shown = sum(s.startswith("#| exports") for s in shown)
        page = page_of(site, path)
        assert page.read_text().count("<summary>Exported source</summary>") == shown, page.name
    text = html.unescape(re.sub("<[^>]+>", "", (site / "altub.html").read_text()))
    assert "self.optimizer.zero_grad(set_to_none=True)" in text


def test_site_stands_alone(site):
    "Nothing is loaded from another host, every link within the site leads somewhere, no TeX is left."
    assert docs.remote_assets(site) == []
    assert docs.broken_links(site) == []
    for page in site.rglob("*.html"):
        assert 'class="math' not in page.read_text(), f"{page.name} holds unconverted TeX"


def test_pages_are_readable_elsewhere(site):
    "Every picture has a text in its place, and nothing tells of this machine or of an unnamed module."
    for page in [*site.rglob("*.html"), *site.rglob("search.json")]:
        text = page.read_text()
        assert not [tag for tag in re.findall(r"<img\b[^>]*>", text) if not re.search(r'alt="[^"]+"', tag)], page.name
        assert str(ROOT) not in text and "__main__." not in text, page.name


def test_faults_of_a_site_are_found(tmp_path):
    "Planted remote assets and broken links are reported, ordinary links are not."
    (tmp_path / "good.html").write_text('<a href="https://example.org">x</a><a id="top" href="#top">x</a><a '
                                        'href="good.html#top">x</a>')
    assert docs.remote_assets(tmp_path) == docs.broken_links(tmp_path) == []
    (tmp_path / "bad.html").write_text('<img alt="x" src="https://example.org/a.png"><a href="none.html">x</a><a '
                                       'href="good.html#none">x</a>'
                                       '<link href="//example.org/a.css" rel="stylesheet"><script '
                                       'src=http://example.org/a.js></script>')
    (tmp_path / "a.css").write_text("@import 'https://example.org/b.css'; p { background: "
                                    "url(https://example.org/c.png) }")
    assert len(docs.remote_assets(tmp_path)) == 5
    assert docs.broken_links(tmp_path) == ["bad.html: good.html#none", "bad.html: none.html"]
    (tmp_path / "sub").mkdir(), (tmp_path / "empty").mkdir()
    (tmp_path / "sub/index.html").write_text('<a href="../good.html">x</a>')
    (tmp_path / "bad.html").write_text('<a href="sub/">x</a><a href="empty/">x</a>')
    assert docs.broken_links(tmp_path) == ["bad.html: empty/"]


def test_every_kind_of_link_and_load(tmp_path):
    "Names are as they are in the address and in HTML; a script's text links to nothing; a picture can be missing."
    (tmp_path / "a b&c.html").write_text('<p id="ü">')
    (tmp_path / "page.html").write_text('<a href="a%20b&amp;c.html#%C3%BC">x</a><script>"<a href=\'none\'>"; '
                                        '\'<a href="none">\'</script><img alt="x" src="none.png">')
    assert docs.broken_links(tmp_path) == ["page.html: none.png"] and docs.remote_assets(tmp_path) == []
    loads = ('<object data="https://x.org/a"></object>', '<link rel="icon" href="https://x.org/a">',
             '<script type="module">import { a } from "https://x.org/a"</script>')
    for text in loads:
        (tmp_path / "page.html").write_text(text)
        assert docs.remote_assets(tmp_path) == ["page.html: https://x.org/a"]


def test_a_picture_is_told_by_its_caption():
    "Below it, or in the words of the figure that code shows; one that has a text keeps it."
    page = ('<head></head><p><img src="a.png"></p><figcaption>Of <b>$a_i$</b>, `fit`</figcaption>'
            '<img src="b.png" alt="B"><div><img src="c.png"></div><div><p><strong>F1. C</strong></p></div><img src="d.png">')
    text = docs.finish("p.html", page, "https://x.org/", set())
    alts = re.findall(r'src="(.)\.png" alt="(.*?)">', text)
    assert alts[1:] == [("b", "B"), ("c", "F1. C"), ("d", "what the code above draws")]
    assert alts[0][0] == "a" and alts[0][1].startswith("Of") and "<figcaption>Of <b><math" in text
    assert "<code>fit</code></figcaption>" in text and "`" not in text


def test_formulas():
    "Formulas become MathML; what the converter cannot read is an error that names the page."
    assert "<mtable" in docs.mathml("p", r"\begin{aligned} z &= x \\ y &= 2 \end{aligned}", True)
    numbered = docs.mathml("p", r"x_i\label{eq-one:3}", True)
    assert 'id="eq-one"' in numbered and "(3)" in numbered and "<msub>" in numbered
    for tex in r"\nosuchcommand{x}", r"a \\ b", r"\left( a", "a & b":
        with pytest.raises(docs.DocsError, match="p: .*formula"):
            docs.mathml("p", tex, False)


def test_finished_page():
    "TeX becomes MathML, KaTeX goes, links into the site become relative, a method's link falls back to its class."
    page = ('<head><link href="https://cdn.jsdelivr.net/npm/katex@0.16/dist/katex.min.css" rel="stylesheet"></head>'
            '<a href="https://x.org/y/a.html#cls.fit">1</a><a href="https://x.org/y/a.html#cls.own">2</a><a '
            'href="https://x.org/z">3</a>'
            '<span class="math inline">\\(a &lt; b\\)</span>')
    text = docs.finish("sub/p.html", page, "https://x.org/y/", {"#cls", "#cls.own"})
    assert 'display="inline"' in text
    assert "katex" not in text and "<math" in text and 'href="https://x.org/z"' in text
    assert text.count('rel="icon"') == 1  # without one a browser asks for a file that is not there
    assert 'href="../a.html#cls">1' in text and 'href="../a.html#cls.own">2' in text


def test_cross_references():
    "Labels are numbered in order and references become links; code is left alone; a lost reference is an error."
    cells = [{"cell_type": "markdown", "source": "@fig-b and @eq-a, a@fig-b.org, `@fig-none`.\n\n$$\nx\n$$ "
                                                 "{#eq-a}\n\n: "
                                                 "Cap {#tbl-t}\n\n![Cap](a.png){#fig-a}\n```\n@eq-none\n```\n"},
             {"cell_type": "code", "source": '#| label: fig-b\n#| fig-cap: "A: b"\nplot()'}]
    docs.cross_reference("p", cells)
    text = cells[0]["source"]
    for part in ("[Figure 2](#fig-b) and [Equation 1](#eq-a), a@fig-b.org, `@fig-none`.", r"\label{eq-a:1}$$",
                 ": Table 1: Cap {#tbl-t}",
                 "![Figure 1: Cap](a.png){#fig-a}", "```\n@eq-none\n```"):
        assert part in text
    assert '#| fig-cap: "Figure 2: A: b"' in cells[1]["source"]
    with pytest.raises(docs.DocsError, match="@eq-none refers to no label"):
        docs.cross_reference("p", [{"cell_type": "markdown", "source": "See @eq-none."}])
    with pytest.raises(docs.DocsError, match="used twice"):
        docs.cross_reference("p", [{"cell_type": "markdown", "source": "$$x$$ {#eq-a}\n\n$$x$$ {#eq-a}"}])


def test_references_of_code_and_docstrings():
    "A table that code makes has its number; a docstring refers as text does; a formula in code is none."
    cells = [{"cell_type": "code", "source": "#| label: tbl-t\n#| tbl-cap: Seconds\nt", "outputs": [
        {"data": {"text/markdown": ["@tbl-t, a.@tbl-t\n", "a:NoneType=None"]}}]},
        {"cell_type": "markdown", "source": "```\n$$x$$ {#eq-a}\n```\n"}]
    docs.cross_reference("p", cells)
    assert '#| tbl-cap: "Table 1: Seconds"' in cells[0]["source"] and "{#eq-a}" in cells[1]["source"]
    assert cells[0]["outputs"][0]["data"]["text/markdown"] == "[Table 1](#tbl-t), a.@tbl-t\na=None"
    assert docs.signatures("f(**options\n)->list: # more") == "f(**options # more\n)->list:"


def test_exported_cells_and_imports_run_alone(monkeypatch):
    "An example is never run, even if it imports something."
    monkeypatch.setattr("nbdev.processors._do_eval", lambda cell: True)
    docs.run_no_examples()
    cell = lambda source, **directives: SimpleNamespace(cell_type="code", source=source, directives_=directives,
                                                        parsed_=lambda: docs.ast.parse(source).body)
    cells = [cell("x = 1", export=[]), cell("import a\nfrom b import c"), cell("show_doc(f)"), cell("import a\na.f()")]
    assert list(map(sys.modules["nbdev.processors"]._do_eval, cells)) == [True, True, True, False]


def test_bars_stand_in_pairs():
    "A norm's two bars are of one height, and a bar is no operator with spaces about it."
    for tex in r"\lVert z \rVert^2", r"\|z\|^2", r"\log|\det J|", "|a-b|/|b|":
        bars = re.findall(r"<mo([^>]*)>&#x0(?:007C|2016);", docs.mathml("p", tex, False))
        assert len(bars) % 2 == 0 and all('stretchy="false"' in b for b in bars), tex
        assert [re.search('form="(.*?)"', b)[1] for b in bars] == ["prefix", "postfix"] * (len(bars) // 2), tex
    assert "form=" not in docs.mathml("p", "p(x|y)", False)  # a single one has no other side


def test_parameters_are_not_linked_to_functions_of_their_name(site):
    "`rows`, `spread` and so on are parameters, fields or keys where they stand in a text, not another page's functions."
    for page in site.rglob("*.html"):
        wrong = re.findall(r'<a href="[^"#]+#(?:flat|key|lacking|place|rows|smoothing|spread)"><code>[^<]*', page.read_text())
        assert not wrong, (page.name, wrong)


def test_words_of_a_table_of_numbers_have_room():
    "Beside numbers that are kept whole, the words of a cell are not squeezed into a column of single words."
    row = "<tr><td>HGAD, score: as the public code</td>" + "<td>1.00</td>" * 8 + "</tr>"
    text = docs.finish("p.html", f"<head></head><table><tbody>{row}</tbody></table>", "https://x.org/", set())
    assert '<span class="words">HGAD, score' in text and re.search(r"\.words \{[^}]*min-width", text)


def test_signatures_say_what_the_code_says(site):
    "The comment of `**options` stands beside them, not beside the result; a default None is no type."
    texts = {p.name: docs.html.unescape(re.sub(r"<[^>]+>", "", p.read_text())) for p in site.glob("*.html")}
    assert not [name for name, text in texts.items() if "NoneType" in text]
    for page, line in (("data", "**options # of the reader, such as validation=True of mvtec3d"),
                       ("training", "# fields of `Schedule`\n)->list[dict]:")):
        assert line in texts[f"{page}.html"], page


def test_sidebar_shows_the_page_it_stands_beside(site, browser, serve):
    "In a window too low for the whole sidebar, the current page's link is in view."
    browser.call("Emulation.setDeviceMetricsOverride", width=1280, height=700, deviceScaleFactor=1, mobile=False)
    browser.visit(f"{serve(site)}/experiments/run.html")
    top = browser.call("Runtime.evaluate", returnByValue=True, expression="document.querySelector("
                       "'.sidebar-link.active').getBoundingClientRect().top")["result"]["value"]
    assert 0 < top < 700


def test_the_staging_names_every_page_with_a_lost_reference(tmp_path, monkeypatch):
    "Each page's error is kept with the page's name, and pages take the names that nbdev gives them."
    (tmp_path / "made").mkdir()
    settings = {"project": {}, "format": {"html": {"html-math-method": "katex"}},
                "website": {"site-url": "https://x.org/", "title": "another"}}
    own = {"website": {"title": "own", "sidebar": ["00_a.ipynb", "01_b.ipynb"]}}
    for name, text in ("nbdev.yml", settings), ("_quarto.yml", own):
        (tmp_path / "made" / name).write_text(json.dumps(text))
    for name in "a", "b", "c":
        cells = [nbformat.v4.new_raw_cell(f"---\noutput-file: {name}.html\n---"),
                 nbformat.v4.new_markdown_cell("words" if name == "c" else "see @eq-none, [b](01_b.ipynb)")]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "made" / f"0{'abc'.index(name)}_{name}.ipynb")
    monkeypatch.setattr("nbdev.quarto.refresh_quarto_yml", lambda: None)
    monkeypatch.setattr("nbdev.serve.proc_nbs", lambda n_workers, force: tmp_path / "made")
    problems = []
    assert docs.stage(tmp_path / "out", problems) == "https://x.org/"
    assert [re.match(r"0\d_\w\.ipynb: @?eq-none refers to no label", p) is not None for p in problems] == [True, True]
    assert sorted(p.name for p in (tmp_path / "out").glob("*.ipynb")) == ["a.ipynb", "b.ipynb", "c.ipynb"]
    assert "[b](b.ipynb)" in json.loads((tmp_path / "out/a.ipynb").read_text())["cells"][1]["source"]
    config = (tmp_path / "out/_quarto.yml").read_text()
    assert "01_b" not in config and "katex" not in config and "title: own" in config  # _quarto.yml has the last word


@pytest.mark.parametrize("page, warnings, found, words", [
    ('<a href="none.html">x</a>', [], [], "broken link: index.html: none.html"),
    ('<img alt="x" src="https://example.org/a.png">', [], [],
     "loads from another host: index.html: https://example.org"),
    (r'<span class="math inline">\(\nosuchcommand{x}\)</span>', [], [], "index.html: .*nosuchcommand"),
    ("", ["no such file: a.ipynb"], [], "no such file: a.ipynb"),
    ("", [], ["p: the label is used twice"], "used twice"),
    ("", [], [], None)])
def test_a_site_with_problems_is_not_published(page, warnings, found, words, tmp_path, monkeypatch):
    "The old one stays as it is, and the command ends with the problem; a good one takes its place whole."
    def build(folder, quiet):
        (folder / "_site").mkdir()
        (folder / "_site/index.html").write_text(f"<html><head></head><body>{page}</body></html>")
        return SimpleNamespace(out=folder / "_site", warnings=warnings)

    monkeypatch.setattr("smalldocs.site.build", build)
    monkeypatch.setattr(docs, "stage", lambda folder, problems: problems.extend(found) or "https://x.org/")
    monkeypatch.setattr(docs, "run_no_examples", lambda: None)
    monkeypatch.setattr(sys, "argv", ["docs.py", "--light", "--out", str(tmp_path / "out")])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old.html").write_text("old")
    if words:
        with pytest.raises(SystemExit) as stop:
            docs.main()
        assert re.search(words, str(stop.value))
    else:
        docs.main()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["old.html" if words else "index.html"]


def test_outputs_are_cleaned(tmp_path):
    """Words on stderr and the names of temporary folders go, in experiments, too; every other output stays, and
    a clean notebook is not touched."""
    v4, place = nbformat.v4, Path(tempfile.gettempdir()) / "tmpab_12c"
    stream = lambda name, text: v4.new_output("stream", name=name, text=text)
    (tmp_path / "tools").mkdir(), (tmp_path / "nbs/experiments").mkdir(parents=True)
    shutil.copy(ROOT / "tools/outputs.py", tmp_path / "tools")
    paths = [tmp_path / "nbs" / name for name in ("a.ipynb", "experiments/b.ipynb", "c.ipynb")]
    shown = v4.new_output("display_data", data={"text/plain": "a table"})
    for path in paths[:2]:
        outputs = [stream("stderr", "10 %"), stream("stdout", f"in {place}/x.npz"), shown]
        own = [v4.new_markdown_cell("words"), v4.new_code_cell("f()", outputs=outputs)]
        nbformat.write(v4.new_notebook(cells=own), path)
    paths[2].write_text(nbformat.writes(v4.new_notebook(cells=[v4.new_code_cell("f()", outputs=[shown])])) + "\n\n")
    before = paths[2].read_text()
    run = subprocess.run([sys.executable, "tools/outputs.py"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.split() == ["a.ipynb", "b.ipynb"], run.stderr
    for path in paths[:2]:
        words, code = nbformat.read(path, 4).cells
        assert (words.source, code.source) == ("words", "f()")
        assert code.outputs == [stream("stdout", "in FOLDER/x.npz"), shown]
    assert paths[2].read_text() == before
