"""Packaging: every field that pyproject.toml leaves dynamic comes from settings.ini."""
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
version = re.search(r'__version__ = "(.+)"', (here / "flowrepro/__init__.py").read_text()).group(1)
run, workflow, onnx, bench, dev = (cfg[f"{name}_requirements"].split()
                                   for name in ("run", "workflow", "onnx", "bench", "dev"))

setup(
    name=cfg["lib_name"],
    version=version,
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author=cfg["author"],
    author_email=cfg["author_email"],
    keywords=cfg["keywords"],
    url=cfg["git_url"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
    ],
    packages=find_packages(include=["flowrepro", "flowrepro.*"]),
    package_data={"flowrepro": ["experiments/*.ipynb", "published/*.csv", "workflow/*", "workflow/profiles/*/*"]},
    install_requires=cfg["requirements"].split(),
    extras_require={"run": run, "workflow": run + workflow, "onnx": onnx, "bench": run + bench,
                    "dev": run + workflow + onnx + bench + dev},
    entry_points={
        "console_scripts": ["flowrepro=flowrepro.cli:main"],
        "nbdev": ["flowrepro=flowrepro._modidx:d"],
    },
    zip_safe=False,
)
