"""Drop from the notebooks what their cells wrote to stderr (progress bars): who reads the documentation does not wait.

    python tools/outputs.py
"""
from pathlib import Path

import nbformat

NBS = Path(__file__).resolve().parents[1] / "nbs"
for path in sorted([*NBS.glob("*.ipynb"), *NBS.glob("experiments/*.ipynb")]):
    notebook = nbformat.read(path, 4)
    before = sum(len(c.get("outputs", [])) for c in notebook.cells)
    for cell in notebook.cells:
        if "outputs" in cell:
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    if sum(len(c.get("outputs", [])) for c in notebook.cells) < before:
        nbformat.write(notebook, path)
        print(path.name)
