"""GSM8K (arXiv 2110.14168): problems in its file format, the prompt, and two scorers.

A file has one JSON object a line: {"question": ..., "answer": worked solution, and "#### 72" in its last line}.

`strict` counts a completion that gives the right number behind "####", as the prompt asks for. `lenient` counts one
that ends in the right number, however it is written. The distance between them is format, not arithmetic: a model
that is rewarded by `strict` can gain it all without learning to calculate. Both are logged everywhere.
"""

import json
import os
import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

MARK = "####"

# A minus behind a digit is a subtraction's, and commas count where they separate thousands.
_NUMBER = r"(?:(?:(?<![0-9])-)?\$?|\$-)(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
_MARKED = re.compile(rf"{MARK}\s*({_NUMBER})")
_GOES_ON = re.compile(r"\s*[/:][0-9]|[.,]?[0-9]|[eE][-+]?[0-9]|[ \u00a0\u202f][0-9]")
_ANY = re.compile(_NUMBER)
_ANNOTATION = re.compile(r"<<[^<>]*>>")


class Problem(NamedTuple):
    """A question, its worked solution as the data set has it, and the number that stands behind the solution's mark."""

    question: str
    solution: str
    final: str

    @property
    def plain_solution(self) -> str:
        """The solution without the calculator's annotations, <<48/2=24>>, which nobody should learn to write."""
        return _ANNOTATION.sub("", self.solution)


def problem(record: dict, where: str) -> Problem:
    """A record of GSM8K as a problem. ValueError names `where` and what is missing."""
    question, solution = (record.get(k) if isinstance(record, dict) else None for k in ("question", "answer"))
    if not isinstance(question, str) or not isinstance(solution, str):
        raise ValueError(f'{where} is {str(record)[:80]!r}, expected a record with the texts "question" and "answer"')
    *_, last = (None, *_MARKED.finditer(_plain_minus(solution)))
    # A completion may say "5/2 apples"; of a reference 5 would be the wrong number to reward.
    if last is None or _GOES_ON.match(last.string, last.end()):
        raise ValueError(f'{where}: the answer ends in {solution[-40:]!r}, expected a line "{MARK} <number>"')
    return Problem(question, solution, _canonical(last[1]))


def read_jsonl(path: str | os.PathLike) -> list[Problem]:
    """The problems of a file in GSM8K's format. ValueError: no file, a line that is no such record, none at all."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist, expected a file in GSM8K's format")
    problems = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
            problems.append(problem(record, f"{path}, line {number}"))
    if not problems:
        raise ValueError(f"{path} is empty, expected problems in GSM8K's format")
    return problems


def prompt(question: str, instruction: str) -> str:
    """The question as it is put to the model. ValueError for an instruction without a place for it."""
    if "{question}" not in instruction:
        raise ValueError(f"instruction is {instruction!r}, expected a text with {{question}} in it")
    return instruction.replace("{question}", question.strip())


def _plain_minus(text: str) -> str:
    """With ASCII's minus for the typographic one, which models write, too."""
    return text.replace("\u2212", "-")


def strict_answer(completion: str) -> str | None:
    """The number behind the last "####" that has one, None if none has."""
    found = _MARKED.findall(_plain_minus(completion))
    return _canonical(found[-1]) if found else None


def lenient_answer(completion: str) -> str | None:
    """What `strict_answer` finds, and without it the last number in the text."""
    marked = strict_answer(completion)
    if marked is not None:
        return marked
    found = _ANY.findall(_plain_minus(completion))
    return _canonical(found[-1]) if found else None


def strict(completion: str, final: str) -> bool:
    """Whether the number behind the last "####" is `final`; 18, 18.0, $18 and 1,000 and 1000 are the same."""
    return strict_answer(completion) == _canonical(final)


def lenient(completion: str, final: str) -> bool:
    """Whether the number behind the last "####", or without one the last number of the text, is `final`."""
    return lenient_answer(completion) == _canonical(final)


SCORERS: dict[str, Callable[[str, str], bool]] = {"strict": strict, "lenient": lenient}


def _canonical(number: str) -> str:
    """One way to write each number: no dollar sign, no commas, no trailing zeros."""
    value = Decimal(number.replace("$", "").replace(",", ""))  # exact, where normalize() rounds to 28 digits
    text = format(value if value else Decimal(0), "f")
    return text.rstrip("0").rstrip(".") if "." in text else text
