"""Labels that are numbers: the choice of the class list that they count in, and the checks that make it certain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from qatlab.core.errors import UserError, nearest
from qatlab.data.images.claims import Claim
from qatlab.data.images.classlists import ClassList

NUMBERS = ("auto", "own", "larger")


@dataclass(frozen=True)
class Counting:
    """The reading of a set's numbers: as rows of the list ``classes`` or of its larger list.

    ``numbers``, one of NUMBERS, says which list. ``where`` names the set in errors, and ``excluded`` are class folders
    that the set leaves out. Raises UserError for another value of ``numbers``, and for "larger" without a larger list.
    """

    classes: ClassList
    where: str
    numbers: str = "auto"
    excluded: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.numbers not in NUMBERS:
            known = f"{nearest(str(self.numbers), NUMBERS)}; there are {', '.join(NUMBERS)}"
            raise UserError(f"{self.where}: numbers={self.numbers} is unknown{known}.")
        if self.numbers == "larger" and self.classes.of is None:
            raise UserError(
                f"{self.where}: numbers=larger, but {self.classes.name} is a part of no larger list; leave it out."
            )

    def readings(self) -> list[tuple[ClassList, Callable[[int], int]]]:
        """Return (list, function from a number to the row in the whole list) for each list that the numbers may count in.

        The smaller list comes first.
        """
        classes, larger = self.classes, self.classes.of
        found: list[tuple[ClassList, Callable[[int], int]]] = []
        if self.numbers != "larger":
            # Here a number is a row of the set's own class list. Where that list is a part of a larger one,
            # classes.rows gives the row there.
            found.append((classes, classes.rows.__getitem__ if larger else int))
        if larger is not None and self.numbers != "own":
            found.append((larger, int))
        return found

    def rows(self, numbers: Sequence[int], claims: Sequence[Claim]) -> dict[int, int]:
        """Return {number: row in the whole list}, by the only list that agrees with everything that is known.

        ``claims`` about these labels decide between two lists. Raises UserError for a number outside of the lists, for
        claims that agree with no list, and where two lists are possible that give different rows.
        """
        widest = self.readings()[-1][0]
        if outside := [number for number in numbers if not 0 <= number < len(widest)]:
            remedy = "give the set the class list that its labels count in"
            remedy = "-1 stands for no label, and the set's role needs one" if outside[0] == -1 else remedy
            raise UserError(
                f"{self.where} has the label {outside[0]}, outside the {len(widest)} classes of {widest.name}; {remedy}."
            )
        # A list that is too short for the largest number is not possible.
        fitting = [(listed, row) for listed, row in self.readings() if max(numbers) < len(listed)]
        found: list[dict[int, int]] = []
        for _, row in fitting:
            # Without claims every list that is long enough stays possible.
            if all(row(int(claim.key)) == claim.row for claim in claims):
                found.append({number: row(number) for number in numbers})
        if not found:
            raise UserError(self._contradiction(claims, fitting))
        # If a number is too large for the smaller list, only the larger list is possible. That it is meant is still a
        # guess, unless a claim agrees with it, or each of its classes has a number, or no class outside the smaller
        # list has one.
        guessed = len(self.readings()) > len(fitting) and not claims and len({*numbers}) < len(widest)
        left_out = any(self.classes.label(row) is None for row in found[0].values())
        if any(other != found[0] for other in found) or (guessed and left_out):
            raise UserError(self._question(numbers))
        return found[0]

    def bare(self, folders: dict[str, int], among: int, claims: Sequence[Claim]) -> dict[str, int]:
        """Return {folder: row in the whole list} of the class folders that are bare numbers.

        ``among`` is the number of all class folders. Numbers are accepted if each number of a list is present, or if
        claims of the folders below them agree. Raises UserError in other cases, and where ``rows`` raises it.
        """
        present = {*folders.values()}
        if self.numbers == "auto":
            # A set of numbers is complete if it has all rows of a list, or all rows of the smaller list in the larger
            # one.
            whole = [set(range(len(listed))) for listed, _ in self.readings()]
            whole.append({*self.classes.rows})
            left_out = {int(folder) for folder in self.excluded if folder.isdecimal()}
            complete = len(folders) == among and (present in whole or present | left_out in whole)
            self._refuse_doubtful(folders, among, complete, claims)
            if complete and len({claim.row for claim in claims}) == 1:
                # If all numbers have the same class folder below them, it is a split: "train" is also a class of
                # CIFAR-100.
                claims = []
        said = [replace(claim, key=folders[str(claim.key)]) for claim in claims]
        found = self.rows([*folders.values()], said if self.numbers == "auto" else [])
        return {folder: found[number] for folder, number in folders.items()}

    def refuse_other(self, numbered: dict[str, int], rows: dict[str, int]) -> None:
        """Raise UserError where the numbers in front of names ({"9 ostrich": 9}) agree in no list with the names' ``rows``."""
        wrong: list[list[str]] = []
        for listed, row in self.readings():
            disagree = [f for f, number in numbered.items() if number >= len(listed) or row(number) != rows[f]]
            # It is enough that all numbers agree with one list.
            if not disagree:
                return
            wrong.append(disagree)
        # The list with the fewest disagreements was probably meant, so the error shows a disagreement with this list.
        folder, names = min(wrong, key=len)[0], self.classes.whole.names
        number = numbered[folder]
        other = f"'{names[number]}'" if number < len(names) else "no class"
        raise UserError(
            f"{self.where}: '{folder}' is '{names[rows[folder]]}' by its name and {other} by its number (from 0 on, in "
            f"{self.classes.whole.name}); rename it, or give classes= a file that says which class each folder is."
        )

    def _refuse_doubtful(self, folders: dict[str, int], among: int, complete: bool, claims: Sequence[Claim]) -> None:
        claimed, rows = {claim.key for claim in claims}, {claim.row for claim in claims}
        shown = ", ".join(list(folders)[:3])
        # Several classes below one number, or one class below several numbers, mean that the numbers are no classes but
        # a level of folders above them, such as the severities of ImageNet-C.
        if len(claims) > len(claimed) or (claims and not complete and len(rows) < len(folders)):
            raise UserError(
                f"{self.where}: the folders {shown} are bare numbers, and below them lie folders that are classes "
                f"({claims[0].text}). Did the path forget a folder? ImageNet-C lies as <corruption>/<severity>/<class>: give "
                f"the folder that holds the classes, such as its folder {claims[0].key}."
            )
        if not complete and len(claimed) < len(folders):
            raise UserError(
                f"{self.where}: {len(folders)} of {among} classes are bare numbers ({shown}), which label classes only where "
                f"all of {self.classes.name} are there (0 to {len(self.classes) - 1}); give them names, or say numbers=own "
                "where they count in that list."
            )

    def _contradiction(self, claims: Sequence[Claim], readings: list[tuple[ClassList, Callable[[int], int]]]) -> str:
        wrong: list[int] = []
        for claim in claims:
            wrong.append(sum(row(int(claim.key)) != claim.row for _, row in readings))
        # The error shows the claim that contradicts most lists.
        claim = claims[wrong.index(max(wrong))]
        names = self.classes.whole.names
        counted = " and ".join(f"'{names[row(int(claim.key))]}' in {listed.name}" for listed, row in readings)
        return (
            f"{self.where}: the label {claim.key} is {counted}, yet {claim.text} says '{names[claim.row]}'; correct what is wrong, "
            f"or give the set the class list that its labels count in{', or numbers=own to take them as they are' * claim.path}."
        )

    def _question(self, numbers: Sequence[int]) -> str:
        (own, row), (larger, _) = self.readings()
        # The error shows a number that means different classes in the two lists.
        number = next((number for number in numbers if number >= len(own) or row(number) != number), 0)
        mine = f"'{larger.names[row(number)]}' or " if number < len(own) else "outside the first, and "
        return (
            f"{self.where}: the labels {min(numbers)} to {max(numbers)} may count in the {len(own)} classes of {own.name} or in "
            f"the {len(larger)} of {larger.name} ({number} is {mine}'{larger.names[number]}'), and no folder says which: give "
            "the set numbers=own or numbers=larger."
        )
