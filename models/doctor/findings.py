"""What a doctor found, and how it is told."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

Level: TypeAlias = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was tested.

    Attributes:
        what: Its name, a word or two.
        found: How it is.
        advice: What to do about it; empty if it is well.
    """

    level: Level
    what: str
    found: str
    advice: str = ""


def ok(what: str, found: str) -> Finding:
    return Finding(level="ok", what=what, found=found)


def warn(what: str, found: str, advice: str) -> Finding:
    return Finding(level="warn", what=what, found=found, advice=advice)


def fail(what: str, found: str, advice: str) -> Finding:
    return Finding(level="fail", what=what, found=found, advice=advice)


def describe(findings: Sequence[Finding], *, as_json: bool) -> str:
    """Return what is printed: a line a finding, or a JSON list."""
    if as_json:
        return json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2)
    width = max(len(finding.what) for finding in findings)
    return "\n".join(
        f"{finding.level:<4}  {finding.what:<{width}}  {'; '.join(filter(None, (finding.found, finding.advice)))}"
        for finding in findings
    )


def find_failures(findings: Sequence[Finding]) -> str | None:
    """Return one line that names what failed; None if nothing did."""
    failed = [finding.what for finding in findings if finding.level == "fail"]
    return f"{len(failed)} of {len(findings)} checks failed: {', '.join(failed)}" if failed else None
