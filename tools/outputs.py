"""Drop from the outputs of the notebooks what is of no use to who reads the documentation: what cells wrote to stderr
(progress bars), and the names of temporary folders.

    python tools/outputs.py
"""
import re
import tempfile
from pathlib import Path

import nbformat

NBS = Path(__file__).resolve().parents[1] / "nbs"
TEMPORARY = re.compile(re.escape(tempfile.gettempdir()) + r"/tmp\w+")
for path in sorted([*NBS.glob("*.ipynb"), *NBS.glob("experiments/*.ipynb")]):
    notebook = nbformat.read(path, 4)
    before = nbformat.writes(notebook)
    for cell in notebook.cells:
        if "outputs" in cell:
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
        for output in cell.get("outputs", []):
            if "text" in output:
                output.text = TEMPORARY.sub("FOLDER", output.text)
    if nbformat.writes(notebook) != before:
        nbformat.write(notebook, path)
        print(path.name)
