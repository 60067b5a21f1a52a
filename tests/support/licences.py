"""Check of the licences of all dependencies, including those of extras. It fails if one was not reviewed.

python -m tests.support.licences
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement

PERMISSIVE = re.compile(
    r"mit|bsd|apache|isc|psf|python software foundation|python-2\.0|unlicense|zlib|mpl|mozilla|0bsd|cc0|hpnd|cnri|"
    r"zpl|historical permission",
    re.IGNORECASE,
)
"""Licences that are compatible with software of any licence. (The MPL requires publishing changes to its own files.)"""

LOOKED_AT = {
    "psycopg": "LGPL-3.0: used unmodified, by the extra `postgres`",
    "skops": "MIT according to its LICENSE file, missing in its metadata",
    "psycopg-binary": "LGPL-3.0: used unmodified, by the extra `postgres`",
}
"""Other reviewed packages, with the reason why their licence is acceptable."""


def brought_along(root: str) -> dict[str, Distribution]:
    """Return the installed direct and indirect dependencies of a package with all its extras."""
    found: dict[str, Distribution] = {}
    waiting: list[tuple[str, frozenset[str]]] = [
        (root, frozenset(distribution(root).metadata.get_all("Provides-Extra") or ()))
    ]
    seen = set(waiting)
    while waiting:
        name, extras = waiting.pop()
        try:
            one = distribution(name)
        except PackageNotFoundError:  # for another platform, or of an extra that is not installed
            continue
        found[name] = one
        for line in one.requires or ():
            needed = Requirement(line)
            wanted = needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in {"", *extras})
            step = (re.sub(r"[-_.]+", "-", needed.name).lower(), frozenset(needed.extras))
            if wanted and step not in seen:
                seen.add(step)
                waiting.append(step)
    found.pop(root)
    return found


def licence(one: Distribution) -> str:
    """Return the licence of a distribution: its expression, classifiers, or the first line of its text."""
    said = one.metadata.get("License-Expression")
    classes = [line for line in one.metadata.get_all("Classifier") or () if line.startswith("License ::")]
    text = (one.metadata.get("License") or "").strip().splitlines()
    return said or "; ".join(line.rpartition(" :: ")[2] for line in classes) or (text[0] if text else "not said")


def main() -> int:
    """Print one line per package. Return 1 if a licence was not reviewed, otherwise 0."""
    strange = 0
    for name, one in sorted(brought_along("langchain-datashunt").items()):
        said = licence(one)
        copyleft = re.search(r"(?<!L)\bA?GPL|LGPL", said) is not None
        sound = name in LOOKED_AT or (PERMISSIVE.search(said) is not None and not copyleft)
        strange += not sound
        print(f"{'  ' if sound else '! '}{name:34} {one.version:14} {LOOKED_AT.get(name, said)}")
    return 1 if strange else 0


if __name__ == "__main__":
    sys.exit(main())
