"""Write the table of findings in docs/schemas/finding.md from the rules: `python docs/findings.py`.

A test fails where the document and the rules differ.
"""

from __future__ import annotations

from pathlib import Path

from nemo_fp8_recipes import preflight

DOCUMENT = Path(__file__).resolve().parent / "schemas" / "finding.md"


def rows() -> list[str]:
    """One line of the table a rule."""
    return [
        f"| {rule.code} | {rule.severity} | {rule.title} | {rule.source} | {rule.versions or 'all'} |"
        for rule in preflight.all_rules().values()
    ]


def main() -> None:
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("| FP8-"))
    kept = [line for line in lines if not line.startswith("| FP8-")]
    DOCUMENT.write_text("\n".join([*kept[:first], *rows(), *kept[first:]]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
