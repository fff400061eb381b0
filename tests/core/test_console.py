"""Tables are as wide as the terminal, and names stand in them letter by letter."""

from __future__ import annotations

import pytest
from rich.table import Table

from qatlab.core.console import console


def test_names_are_printed_letter_by_letter(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(title="[bold]")
    table.add_column("[set]")
    table.add_row("[red]")
    console().print(table)
    said = capsys.readouterr().out
    assert all(name in said for name in ("[bold]", "[set]", "[red]"))


def test_a_line_in_a_file_is_broken_where_it_may_be_and_no_wider_than_asked(capsys: pytest.CaptureFixture[str]) -> None:
    line = "word " * 40
    console(100).print(line)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100
    console(100, soft_wrap=True).print(line)
    assert len(capsys.readouterr().out.splitlines()) == 1
