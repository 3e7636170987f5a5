"""`pando doctor` and `pando version`: about this machine and this installation."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    SubParsers = argparse._SubParsersAction[Any]


def configure(commands: SubParsers) -> None:
    """Add both commands."""
    doctor = commands.add_parser("doctor", help="check this machine and installation", allow_abbrev=False)
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.add_argument("--no-measure", action="store_true", help="skip the speed measurements")
    doctor.set_defaults(run=run_doctor, prog=doctor.prog)
    version = commands.add_parser("version", help="print the version", allow_abbrev=False)
    version.set_defaults(run=run_version, prog=version.prog)


def run_doctor(args: argparse.Namespace) -> int:
    """Print the findings; 1 if something needed is broken."""
    from pando import doctor

    findings = doctor.examine(measure=not args.no_measure)
    print(doctor.as_json(findings) if args.json else doctor.as_text(findings))
    return 1 if any(finding.state == "broken" for finding in findings) else 0


def run_version(args: argparse.Namespace) -> int:
    """Print the version."""
    from pando import __version__

    print(f"pando {__version__}")
    return 0
