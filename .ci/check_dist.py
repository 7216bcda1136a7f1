"""Check that the sdist and the wheel in a folder contain everything that they should, and nothing else.

    python .ci/check_dist.py DIST CHECKOUT

CHECKOUT is the tree that they were built from. The project's files are those that git tracks.
"""

import ast
import posixpath
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path, PurePosixPath

PARTS = ("msf_core", "tests", "docs", "examples", "benchmarks")  # folders that go into the sdist
ROOT_FILES = {"pyproject.toml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "LICENSE"}
RECORDS = {".md", ".png"}  # suffixes of the files that go in from benchmarks/results; .jsonl files do not


def version_of(checkout: Path) -> str:
    """Return ``__version__`` from the source, without importing the package."""
    for node in ast.parse((checkout / "msf_core" / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return str(ast.literal_eval(node.value))
    raise SystemExit("msf_core/__init__.py has no __version__")


def tracked(checkout: Path) -> set[str]:
    """Return the files that git tracks."""
    done = subprocess.run(["git", "-C", checkout, "ls-files", "-z"], check=True, capture_output=True, text=True)
    return set(filter(None, done.stdout.split("\0")))


def wheel_wants(files: set[str], version: str) -> set[str]:
    """Return what the wheel should hold: the package, and metadata with the license."""
    info = f"msf_core-{version}.dist-info"
    package = {name for name in files if name.startswith("msf_core/")}
    return package | {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE")}


def sdist_wants(files: set[str]) -> set[str]:
    """Return what the sdist should hold: the package, its tests, documentation, examples and benchmarks."""

    def goes_in(name: str) -> bool:
        path = PurePosixPath(name)
        if path.parts[0] != "benchmarks":
            return path.parts[0] in PARTS or name in ROOT_FILES
        if path.parent.name == "results":
            return path.suffix in RECORDS
        return path.suffix == ".py" or path.name == "README.md"

    return {name for name in files if goes_in(name)} | {"PKG-INFO", ".gitignore"}


def metadata_errors(text: str, version: str, pyproject: str) -> list[str]:
    """Return what is wrong with METADATA or PKG-INFO."""
    headers = HeaderParser().parsestr(text)
    python = re.search(r'^requires-python = "(.+)"$', pyproject, re.MULTILINE)
    wanted = {
        "Name": "msf_core",
        "Version": version,
        "License-Expression": "MIT",
        "License-File": "LICENSE",
        "Requires-Python": python and python[1],
        "Description-Content-Type": "text/markdown",
    }
    return [f"{key} is {headers[key]!r}, not {value!r}" for key, value in wanted.items() if headers[key] != value]


def main(dist: Path, checkout: Path) -> None:
    """Exit with a list of errors, if there are any."""
    version, files = version_of(checkout), tracked(checkout)
    names = sorted(path.name for path in dist.iterdir())
    wheel, sdist = f"msf_core-{version}-py3-none-any.whl", f"msf_core-{version}.tar.gz"
    if names != sorted([wheel, sdist]):
        raise SystemExit(f"{dist} holds {names}, not {wheel} and {sdist}")
    with zipfile.ZipFile(dist / wheel) as archive:
        found = {wheel: set(archive.namelist())}
        metadata = {wheel: archive.read(f"msf_core-{version}.dist-info/METADATA").decode()}
    with tarfile.open(dist / sdist) as archive:
        top = f"msf_core-{version}/"
        members = [member for member in archive.getmembers() if not member.isdir()]
        found[sdist] = {member.name.removeprefix(top) for member in members}
        links = {member.name: posixpath.join(posixpath.dirname(member.name), member.linkname) for member in members}
        errors = [
            f"{sdist}: {member.name} is neither a file nor a link to a file in the archive"
            for member in members
            if not member.isfile() and posixpath.normpath(links[member.name]).removeprefix(top) not in found[sdist]
        ]
        about = archive.extractfile(f"{top}PKG-INFO")
        metadata[sdist] = about.read().decode() if about else ""
    for name, wants in ((wheel, wheel_wants(files, version)), (sdist, sdist_wants(files))):
        errors += [f"{name} lacks {missing}" for missing in sorted(wants - found[name])]
        errors += [f"{name} should not hold {more}" for more in sorted(found[name] - wants)]
        pyproject = (checkout / "pyproject.toml").read_text()
        errors += [f"{name}: {error}" for error in metadata_errors(metadata[name], version, pyproject)]
    if errors:
        raise SystemExit("\n".join(errors))
    print(f"{wheel} and {sdist} hold {len(found[wheel])} and {len(found[sdist])} files, exactly those expected")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
