"""Collect what `tinytrain doctor` found, print it, and decide its exit code."""

from __future__ import annotations

from dataclasses import dataclass, field

OK, NOTE, PROBLEM = "ok", "note", "PROBLEM"
Finding = tuple[str, str]  # OK, NOTE or PROBLEM, and a sentence
Table = list[list[str]]  # rows of cells; the first row is the header


@dataclass
class Report:
    """Findings and tables in the order in which they are printed."""

    machine: list[Finding]  # of this machine; later of all machines
    findings: list[Finding] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    title: str = "tinytrain doctor"

    def add(self, topic: str, problems: list[str], ok_text: str) -> None:
        """Add each problem; if there is none, add a line that the topic is ok."""
        if problems:
            self.add_problems(problems)
        else:
            self.findings.append((OK, f"{topic}: {ok_text}"))

    def add_problems(self, problems: list[str]) -> None:
        """Add problems; each sentence begins with its own topic."""
        self.findings += [(PROBLEM, text) for text in problems]

    @property
    def all_findings(self) -> list[Finding]:
        """All findings, each once."""
        return list(dict.fromkeys(self.machine + self.findings))

    @property
    def problem_count(self) -> int:
        """The number of problems found."""
        return sum(level == PROBLEM for level, _ in self.all_findings)

    @property
    def exit_code(self) -> int:
        """0 without problems, else 1."""
        return 1 if self.problem_count else 0

    def print(self) -> None:
        """Print title, findings, tables and the number of problems."""
        print(self.title)
        for level, text in self.all_findings:
            print(f"  {level:<8} {text}")
        for table in self.tables:
            print()
            _print_table(table)
        count = self.problem_count
        print(f"\n{count or 'no'} problem{'s' if count != 1 else ''} found", flush=True)


def _print_table(table: Table) -> None:
    """Print rows; the first column is aligned left, all others right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = [f"{row[0]:<{widths[0]}}"]
        cells += [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  " + "  ".join(cells))
