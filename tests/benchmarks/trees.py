"""Repositories of any size, the same bytes every time."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

from tests.conftest import clean_environment

WORDS = """account address archive balance basket bridge buffer cache calendar canvas channel client cluster column cookie
    counter cursor customer database delivery device discount document driver editor engine entry event export factory
    feature filter folder gateway handler header history image import index invoice journal keyboard language layer
    ledger library listener location manager market matrix measure member message meter mirror module monitor network
    notice number object option order package packet parser password payment picture plugin policy pointer portal
    printer process product profile project protocol provider query queue reader receipt record region register remote
    report request resource result router sample schedule schema section sensor server session setting shipment signal
    socket source storage stream subject summary switch symbol system table target task template terminal thread ticket
    token tracker transfer tree trigger update upload user vendor version video viewer voucher wallet window worker
    writer""".split()


def make_tree(folder: Path, number: int) -> Path:
    """A git repository of ``number`` Python files of some 2 kB, fifty in a folder, in one commit."""
    dice = random.Random(number)
    for index in range(number):
        path = folder / f"{WORDS[index // 2500 % len(WORDS)]}/{WORDS[index // 50 % len(WORDS)]}_{index // 50}"
        if index % 50 == 0:
            path.mkdir(parents=True)
        name = f"{dice.choice(WORDS)}_{dice.choice(WORDS)}_{index}"
        (path / f"{name}.py").write_text(source(name, dice))
    git(folder, "init", "-q", "-b", "main")
    git(folder, "add", "-A")
    git(folder, "-c", "user.name=bench", "-c", "user.email=bench@example.com", "commit", "-q", "-m", "All of it")
    return folder


def source(name: str, dice: random.Random) -> str:
    """A module of some 2 kB with imports, a class and ten methods."""
    first, *names = dice.choices(WORDS, k=11)
    lines = [f'"""The {name.replace("_", " ")}."""', "", f"import {first}", "", "", f"class {name.title()}:"]
    for word in names:
        other, third = dice.choices(WORDS, k=2)
        lines += [
            f"    def {word}_{other}(self, {third}: int) -> int:",
            f'        """The {third} of the {other}, as the {word} counts it."""',
            f"        self.{word} = {third} + {dice.randrange(1000)}",
            f"        return self.{word} * {first}.{other}({third})",
            "",
        ]
    return "\n".join(lines)


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, env=clean_environment())
